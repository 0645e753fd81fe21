"""The measuring side of a bench: the whole base and its suites, the scores of three models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from expunge.errors import DataError
from expunge.evaluation.suite import Suite
from expunge.functions.base import Measured
from expunge.model.patch import Patch
from expunge.progress import Progress
from expunge.records import ModelRole, Score, Split


class Measuring:
    """Scores on the same data of a base, of patches to it, of models never taught the function.

    Base and oracles are measured once a split.

    Args:
        base: directory or hub name of the base.
        measured: the data of each split.
        open_model: directory or hub name -> (whole model, tokenizer).
        max_tokens: longest text in tokens.
        progress: told what is going on.
    """

    def __init__(
        self,
        base: str,
        measured: Mapping[Split, Measured],
        *,
        open_model: Callable[[str], tuple[Any, Any]],
        max_tokens: int,
        progress: Progress,
    ) -> None:
        self.base, self.measured, self.max_tokens = base, measured, max_tokens
        self.open_model, self.progress = open_model, progress
        self._base: dict[Split, list[Score]] = {}
        self._oracles: dict[tuple[str, Split], list[Score]] = {}

    def scores(
        self, patch: Patch | None, *, oracle: str | None = None, split: Split = "test"
    ) -> list[Score]:
        """Scores of base, patched and oracle, in this order."""
        model, _ = self._whole
        if split not in self._base:
            self._base[split] = self._measure(model, "base", split)
        scores = list(self._base[split])
        if patch is not None:
            with patch.applied(model):
                scores += self._measure(model, "patched", split)
        if oracle is not None:
            scores += self._oracle_scores(oracle, split)
        return scores

    @cached_property
    def _whole(self) -> tuple[Any, Any]:
        """The base with its head, and the tokenizer."""
        return self.open_model(self.base)

    @cached_property
    def _suites(self) -> dict[Split, Suite]:
        _, tokenizer = self._whole
        return {
            split: Suite.build(tokenizer, split=split, max_tokens=self.max_tokens, **vars(data))
            for split, data in self.measured.items()
        }

    def _oracle_scores(self, oracle: str, split: Split) -> list[Score]:
        if (oracle, split) not in self._oracles:
            model, tokenizer = self.open_model(oracle)
            _, own = self._whole
            _check_same_tokenizer(own, tokenizer, oracle)
            self._oracles[oracle, split] = self._measure(model, "oracle", split)
        return self._oracles[oracle, split]

    def _measure(self, model: Any, role: ModelRole, split: Split) -> list[Score]:
        suite = self._suites[split]
        with self.progress.phase(f"measure {role}", suite.rows) as advance:
            scores, _ = suite.measure(model, role, advance)
        return scores


def _check_same_tokenizer(base: Any, other: Any, name: str) -> None:
    if base.get_vocab() != other.get_vocab():
        raise DataError(
            what="The oracle has another vocabulary than the base, so their scores do not compare",
            got=name,
            allowed="a model with the base's tokenizer",
            fix="leave --oracle out, or retrain the oracle with the base's tokenizer",
        )
