"""Detoxify's classifier of Jigsaw comments (https://github.com/unitaryai/detoxify), an extra.

Its weights are a ``.ckpt`` file, downloaded on first use. PyTorch is told to read nothing but
tensors from it, so that no code in it can run; safetensors of the same model are on the hub as
``hf:unitary/toxic-bert``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from expunge.errors import ModelError, RecipeError
from expunge.evaluation.scorers.base import judged

TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
BATCH = 32


@dataclass(frozen=True)
class DetoxifyScorer:
    """The ``toxicity`` output of Detoxify's ``original`` model; made by `load`."""

    model: Any
    name: str = "detoxify"
    about: str = "Detoxify 'original', fitted on Jigsaw's Toxic Comment Classification Challenge"

    @classmethod
    def load(cls, *, name: str = "detoxify", device: str = "cpu") -> DetoxifyScorer:
        """Open it. Raises RecipeError if the package is absent, ModelError if it does not load."""
        try:
            from detoxify import Detoxify
        except ImportError as error:
            raise RecipeError(
                what="The scorer detoxify needs a package that is not installed",
                got="no module named detoxify",
                allowed="expunge installed with its extra `detoxify`",
                fix="pip install 'expunge[detoxify]', or use hf:unitary/toxic-bert",
            ) from error
        try:
            with _tensors_only():
                return cls(Detoxify("original", device=device), name)
        # Network, unpickling, missing weights: each its own class, and all mean the same.
        except Exception as error:
            raise ModelError(
                what="Detoxify cannot be opened",
                got=f"{type(error).__name__}: {str(error)[:300]}",
                allowed="its checkpoint, downloaded or in PyTorch's cache",
                fix="check the network, or use hf:unitary/toxic-bert",
            ) from error

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """Probability of ``toxicity``; None for a blank text."""
        return judged(texts, self._judge)

    def _judge(self, texts: list[str]) -> list[float]:
        scores: list[float] = []
        for at in range(0, len(texts), BATCH):
            scores += map(float, self.model.predict(texts[at : at + BATCH])["toxicity"])
        return scores


@contextmanager
def _tensors_only() -> Iterator[None]:
    """`torch.load` reads tensors and plain containers only inside the block."""
    before = os.environ.get(TENSORS_ONLY)
    os.environ[TENSORS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[TENSORS_ONLY]
        else:
            os.environ[TENSORS_ONLY] = before
