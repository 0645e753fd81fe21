"""What an edit is: a baseline that changes a model without training it, and its registry.

An edit returns new weights, which become a patch like any other, or an `Intervention`, which acts
while the model runs and leaves its weights alone.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from expunge.errors import PatchError
from expunge.model.shards import read_header, save_tensors
from expunge.model.structure import Structure
from expunge.registry import Registry

FORMAT = "expunge-intervention"
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class EditInputs:
    """What an edit may look at.

    Attributes:
        model: with all its decoder layers, with or without a head; an edit never changes it.
        structure: of that model.
        tokenizer: the model's own.
        toxic, neutral: token ids of the training texts of both classes, two or more a text.
        paired: whether ``neutral[i]`` is the other wording of ``toxic[i]``.
        words: what a decoding filter bans.
    """

    model: Any
    structure: Structure
    tokenizer: Any
    toxic: Sequence[Sequence[int]] = ()
    neutral: Sequence[Sequence[int]] = ()
    paired: bool = False
    words: Sequence[str] = ()


class Intervention(ABC):
    """A change that acts while a model runs: a frozen value with a file form.

    Subclasses are frozen dataclasses with a field ``metadata`` (JSON-able) and a class attribute
    ``name``, the edit's. What they hold besides is named twice: by `tensors` and `values`, which
    go into the file, and by `restored`, which takes them back.
    """

    name: ClassVar[str]
    metadata: Mapping[str, Any]

    @abstractmethod
    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """The causal LM under the intervention; undone when the block is left, by an error too.

        Raises PatchError, before anything is changed, for a model that it was not made for.
        """

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """What is saved as tensors; at least one, on the CPU."""

    @abstractmethod
    def values(self) -> Mapping[str, Any]:
        """What is saved as JSON, without the metadata."""

    @classmethod
    @abstractmethod
    def restored(
        cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> Intervention:
        """Inverse of `tensors` and `values`. KeyError, TypeError, ValueError: a damaged file."""

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, atomically; values and metadata are JSON in its header."""
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "edit": self.name,
            "values": json.dumps(dict(self.values()), ensure_ascii=False, allow_nan=False),
            "metadata": json.dumps(dict(self.metadata), ensure_ascii=False, allow_nan=False),
        }
        path = Path(path)
        save_tensors(path, self.tensors(), header)
        return path


Weights = Mapping[str, Tensor]
Edit = Callable[..., Weights | Intervention]
EDITS: Registry[Edit] = Registry("edit")


def edit(
    name: str,
    *,
    source: str,
    deviations: str,
    intervention: type[Intervention] | None = None,
    needs_words: bool = False,
    choices: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> Callable[[Edit], Edit]:
    """Register ``f(given: EditInputs, *, settings…) -> Weights | Intervention``.

    Weights are whole new parameters, by their names in ``given.model``, in their dtype, on the CPU;
    `causal_lm_name` gives the names that a patch needs.

    Args:
        name: what recipes call it.
        source: paper or repository, with revision.
        deviations: how this differs from the source; say "reconstruction" where it is one.
        intervention: the class of what it returns; None: it returns weights.
        needs_words: whether it uses ``given.words``, which are learned only then.
        choices: setting -> the values that a search tries, in all combinations.
    """
    return EDITS.register(
        name,
        source=source,
        deviations=deviations,
        intervention=intervention,
        needs_words=needs_words,
        choices=choices,
    )


def load_intervention(path: Path | str) -> Intervention:
    """Read what `Intervention.save` wrote. Raises PatchError for anything else."""
    path = Path(path)
    try:
        _, header = read_header(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if header.get("format") != FORMAT:
        raise _unreadable(path, f"format {header.get('format', 'unknown')!r}")
    if header.get("version") != FORMAT_VERSION:
        raise PatchError(
            what=f"{path} has a format that this version of expunge does not know",
            got=f"format version {header.get('version')}",
            allowed=f"format version {FORMAT_VERSION}",
            fix="upgrade expunge, or make the intervention again",
        )
    kind = _class_of(path, header.get("edit", ""))
    try:
        values, metadata = json.loads(header["values"]), json.loads(header["metadata"])
        return kind.restored(load_file(path), values, metadata)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, OSError) as error:
        raise _unreadable(path, f"damaged ({type(error).__name__}: {error})") from error


def _class_of(path: Path, name: str) -> type[Intervention]:
    """The class that an edit registered, or PatchError."""
    found = {entry.name: entry.extras["intervention"] for entry in EDITS}
    kind: type[Intervention] | None = found.get(name)
    if kind is None:
        raise PatchError(
            what=f"{path} was made by an edit that is not installed",
            got=repr(name),
            allowed=", ".join(sorted(key for key, value in found.items() if value is not None)),
            fix="install the package that brings this edit, or upgrade expunge",
        )
    return kind


def _unreadable(path: Path, got: str) -> PatchError:
    return PatchError(
        what=f"{path} is no readable intervention",
        got=got,
        allowed="a .safetensors file that `Intervention.save` wrote",
        fix="give the file that the edit left; a patch is read by `Patch.load`",
    )
