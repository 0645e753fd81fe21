"""The artefact: a Patch, the change that a run learned.

A value with + − ×, a file form (one safetensors file) and a base it belongs to: each touched
tensor is named as `AutoModelForCausalLM` names it and carries the fingerprint of the original.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge.errors import PatchError
from expunge.model.shards import FLOATS, dtype_name, fingerprint, read_header, save_tensors

FORMAT = "expunge-patch"
FORMAT_VERSION = "1"
_FLOAT_NAMES = {dtype_name(dtype): dtype for dtype in FLOATS.values()}
_OTHER_BASE = "give the base model the patch was made for, as it was before any patch"


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base as it lies on disk: what a delta may be added to."""

    fingerprint: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> BaseTensor:
        """The base tensor held in memory as ``tensor`` and on disk in ``dtype`` (its own)."""
        dtype = dtype or tensor.dtype
        return cls(fingerprint(tensor, dtype), dtype, tuple(tensor.shape))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        return {
            "fingerprint": self.fingerprint,
            "dtype": dtype_name(self.dtype),
            "shape": list(self.shape),
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> BaseTensor:
        """Inverse of `to_dict`. Raises KeyError for a dtype that is no float."""
        return cls(str(raw["fingerprint"]), _FLOAT_NAMES[raw["dtype"]], tuple(raw["shape"]))


@dataclass(frozen=True, eq=False)
class Patch:
    """Deltas of some tensors of a base model.

    Attributes:
        deltas: full causal-LM parameter name -> what is added, float32, on the CPU.
        base: the same names -> the original tensor's fingerprint, dtype and shape.
        metadata: base model, objective, function, recipe, seed, scores, …; JSON-able. The keys
            ``scale`` and ``parts`` belong to the algebra.

    Raises PatchError if names or shapes disagree, a delta is not finite, or the metadata has no
    JSON form.
    """

    deltas: Mapping[str, Tensor]
    base: Mapping[str, BaseTensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        deltas = {name: _owned(delta) for name, delta in sorted(self.deltas.items())}
        if deltas.keys() != self.base.keys():
            raise PatchError(
                what="The deltas of a patch and the tensors of its base differ",
                got=", ".join(sorted(deltas.keys() ^ self.base.keys())),
                allowed="one base tensor for each delta",
                fix="make the patch with Patch.between, or give `base` for the same names",
            )
        for name, delta in deltas.items():
            if tuple(delta.shape) != self.base[name].shape:
                raise _shape_error(name, tuple(delta.shape), self.base[name].shape)
            if not delta.isfinite().all():
                raise PatchError(
                    what=f"The patch is not finite at {name}",
                    got=f"{int((~delta.isfinite()).sum())} values are NaN or infinite",
                    allowed="finite float32 deltas",
                    fix="the training diverged or the file is damaged; lower the rate, run again",
                )
        object.__setattr__(self, "deltas", deltas)
        object.__setattr__(self, "base", {name: self.base[name] for name in deltas})
        object.__setattr__(self, "metadata", _json_copy(self.metadata))

    @classmethod
    def between(
        cls,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        base: Mapping[str, BaseTensor] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Patch:
        """The patch that leads from ``before`` to ``after``, without the tensors that stayed.

        Args:
            before, after: the same names, on any device.
            base: the original tensors as on disk; None takes ``before`` in its own dtype.
        """
        if before.keys() != after.keys():
            raise PatchError(
                what="The tensors before and after training have different names",
                got=", ".join(sorted(before.keys() ^ after.keys())),
                allowed="the same names on both sides",
                fix="pass the same selection of parameters twice",
            )
        deltas = {
            name: after[name].detach().float() - before[name].detach().float()
            for name in before
            if not torch.equal(before[name], after[name])
        }
        known = {name: BaseTensor.of(before[name]) for name in deltas} if base is None else base
        kept = {name: known[name] for name in deltas if name in known}
        return cls(deltas, kept, metadata or {})

    # ---- algebra

    def __mul__(self, factor: float) -> Patch:
        if not isinstance(factor, int | float):
            return NotImplemented
        deltas = {name: delta * factor for name, delta in self.deltas.items()}
        return Patch(deltas, self.base, _scaled(self.metadata, factor))

    __rmul__ = __mul__

    def __neg__(self) -> Patch:
        return self * -1.0

    def __add__(self, other: Patch) -> Patch:
        """Union of the tensors; shared ones are added and must have the same base."""
        if not isinstance(other, Patch):
            return NotImplemented
        deltas = dict(self.deltas)
        for name, delta in other.deltas.items():
            if name not in deltas:
                deltas[name] = delta
            elif self.base[name] == other.base[name]:
                deltas[name] = deltas[name] + delta
            else:
                raise PatchError(
                    what=f"Two patches of different bases cannot be added; they differ at {name}",
                    got=f"fingerprints {self.base[name].fingerprint[:12]} "
                    f"and {other.base[name].fingerprint[:12]}",
                    allowed="patches made from the same base model",
                    fix="add only patches of one base, or train the second on the first's result",
                )
        parts = [*_parts(self.metadata), *_parts(other.metadata)]
        return Patch(deltas, {**self.base, **other.base}, {"parts": parts})

    def __sub__(self, other: Patch) -> Patch:
        return self + -other if isinstance(other, Patch) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Patch):
            return NotImplemented
        return (
            self.base == other.base
            and self.metadata == other.metadata
            and all(torch.equal(self.deltas[name], other.deltas[name]) for name in self.deltas)
        )

    # Equal by value, and tensors can change: no hash.
    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.deltas)

    @property
    def names(self) -> tuple[str, ...]:
        """The touched tensors, sorted."""
        return tuple(self.deltas)

    def norm(self) -> float:
        """Frobenius norm over all deltas together."""
        return math.hypot(*(float(delta.double().norm()) for delta in self.deltas.values()))

    # ---- to a model in memory

    def apply_(self, model: nn.Module, scale: float = 1.0) -> None:
        """Add ``scale`` × the deltas to ``model`` for good.

        Raises PatchError, before anything is changed, if the model is not the base: a tensor is
        missing, differs, was read in a dtype narrower than on disk, or is patched already.
        """
        with torch.no_grad():
            for parameter, changed in self._changes(model, scale):
                parameter.copy_(changed)

    @contextmanager
    def applied(self, model: nn.Module, scale: float = 1.0) -> Iterator[nn.Module]:
        """`apply_` inside the block; afterwards the model is what it was, bit for bit."""
        changes = self._changes(model, scale)
        originals = [parameter.detach().clone() for parameter, _ in changes]
        try:
            with torch.no_grad():
                for parameter, changed in changes:
                    parameter.copy_(changed)
            yield model
        finally:
            with torch.no_grad():
                for (parameter, _), original in zip(changes, originals, strict=True):
                    parameter.copy_(original)

    def _changes(self, model: nn.Module, scale: float) -> list[tuple[nn.Parameter, Tensor]]:
        """Each touched parameter with its new value. Nothing is changed yet."""
        parameters = {
            causal_lm_name(model, name): parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        changes = []
        for name, delta in self.deltas.items():
            if name not in parameters:
                raise PatchError(
                    what=f"The model has no parameter {name}",
                    got=f"{type(model).__name__} with {len(parameters)} parameters",
                    allowed="the base model of the patch, with all the layers it touches",
                    fix=_OTHER_BASE,
                )
            parameter = parameters[name]
            _verify(name, parameter.detach(), self.base[name])
            changes.append((parameter, add(name, parameter.detach(), delta, scale)))
        if len({id(parameter) for parameter, _ in changes}) < len(changes):
            raise PatchError(
                what="The patch changes one parameter under two names",
                got=", ".join(self.names),
                allowed="tied weights named once",
                fix="make the patch from named_parameters(), which lists tied weights once",
            )
        return changes

    # ---- to a file

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, atomically; base and metadata are JSON in its header."""
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "base": json.dumps({name: tensor.to_dict() for name, tensor in self.base.items()}),
            "metadata": json.dumps(self.metadata, ensure_ascii=False),
        }
        path = Path(path)
        save_tensors(path, self.deltas, header)
        return path

    @classmethod
    def load(cls, path: Path | str) -> Patch:
        """Read what `save` wrote. Raises PatchError for anything else."""
        path = Path(path)
        try:
            _, header = read_header(path)
        except (OSError, ValueError) as error:
            raise _unreadable(path, str(error)) from error
        if header.get("format") != FORMAT:
            raise _unreadable(path, "safetensors, but not written by expunge")
        if header.get("version") != FORMAT_VERSION:
            raise PatchError(
                what=f"{path} has a format that this version of expunge does not know",
                got=f"format version {header.get('version')}",
                allowed=f"format version {FORMAT_VERSION}",
                fix="upgrade expunge, or make the patch again",
            )
        try:
            raw = json.loads(header["base"])
            base = {name: BaseTensor.from_dict(tensor) for name, tensor in raw.items()}
            metadata = json.loads(header["metadata"])
            if not isinstance(metadata, dict):
                raise TypeError(f"a {type(metadata).__name__} where an object is expected")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(path, f"damaged metadata ({error})") from error
        try:
            deltas = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, str(error)) from error
        return cls(deltas, base, metadata)


def causal_lm_name(model: nn.Module, name: str) -> str:
    """The name that the causal LM gives to parameter ``name`` of ``model``.

    A model opened by `AutoModel` has no head and lacks the prefix: ``layers.0.…`` is
    ``model.layers.0.…``. Names of a causal LM come back as they are.
    """
    prefix = getattr(model, "base_model_prefix", "")
    is_base = bool(prefix) and not hasattr(model, prefix)
    return f"{prefix}.{name}" if is_base else name


def add(name: str, original: Tensor, delta: Tensor, scale: float) -> Tensor:
    """``original + scale * delta``, summed in at least float32, in the dtype of ``original``.

    Raises PatchError if the sum does not fit into that dtype.
    """
    wide = torch.promote_types(original.dtype, torch.float32)
    total = original.to(wide) + scale * delta.to(original.device, wide)
    changed = total.to(original.dtype)
    if not changed.isfinite().all():
        raise PatchError(
            what=f"The patched {name} is not finite",
            got=f"values up to {float(total.abs().max()):g} in {dtype_name(original.dtype)}",
            allowed=f"at most {torch.finfo(original.dtype).max:g}",
            fix="use a smaller scale, or a base stored in bfloat16 or float32",
        )
    return changed


def _verify(name: str, original: Tensor, base: BaseTensor) -> None:
    """Raise PatchError unless ``original`` holds the base tensor without loss."""
    if tuple(original.shape) != base.shape:
        raise _shape_error(name, tuple(original.shape), base.shape)
    if torch.promote_types(original.dtype, base.dtype) != original.dtype:
        raise PatchError(
            what=f"{name} was read in a dtype that cannot hold what is on disk",
            got=f"{dtype_name(original.dtype)} in memory, {dtype_name(base.dtype)} on disk",
            allowed=f"{dtype_name(base.dtype)}, or a dtype that holds all its values",
            fix=f"load the model with dtype=torch.{dtype_name(base.dtype)} or torch.float32",
        )
    # The way there and back shows a change too small to survive the dtype on disk.
    narrow = original.to(base.dtype)
    same = torch.equal(narrow.to(original.dtype), original)
    if not same or fingerprint(narrow, base.dtype) != base.fingerprint:
        raise mismatch(name, base, fingerprint(original, original.dtype), base.shape)


def mismatch(name: str, base: BaseTensor, got: str, shape: tuple[int, ...]) -> PatchError:
    """The error for a tensor that is not the one the patch was made from."""
    if shape != base.shape:
        return _shape_error(name, shape, base.shape)
    return PatchError(
        what=f"The patch does not belong to this model: {name} differs from its base",
        got=f"fingerprint {got[:12]}",
        allowed=f"fingerprint {base.fingerprint[:12]} ({dtype_name(base.dtype)})",
        fix=_OTHER_BASE,
    )


def _shape_error(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> PatchError:
    return PatchError(
        what=f"The patch does not fit: {name} has another shape",
        got=str(list(got)),
        allowed=str(list(expected)),
        fix=_OTHER_BASE,
    )


def _unreadable(path: Path, got: str) -> PatchError:
    return PatchError(
        what=f"{path} is no readable patch",
        got=got,
        allowed="a .safetensors file that `Patch.save` wrote",
        fix="give the patch of a finished run, or copy the file again",
    )


def _owned(delta: Tensor) -> Tensor:
    """Float32, CPU, contiguous, and not a window into a larger tensor (safetensors refuses it)."""
    delta = delta.detach().to("cpu", torch.float32).contiguous()
    return delta if delta.untyped_storage().nbytes() == delta.nbytes else delta.clone()


def _json_copy(metadata: dict[str, Any]) -> dict[str, Any]:
    """What a JSON file would give back: lists for tuples, strings for keys."""
    try:
        copied: dict[str, Any] = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PatchError(
            what="The metadata of a patch has no JSON form",
            got=str(error),
            allowed="dicts, lists, strings, finite numbers, booleans, None",
            fix="convert the value, for example a path by str() and a tensor by .tolist()",
        ) from error
    return copied


def _scaled(metadata: dict[str, Any], factor: float) -> dict[str, Any]:
    """Metadata of a patch times ``factor``; the key is left out where the scale is 1."""
    scale = metadata.get("scale", 1.0) * factor
    rest = {key: value for key, value in metadata.items() if key != "scale"}
    return rest if scale == 1.0 else {**rest, "scale": scale}


def _parts(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """What the patch is a sum of: flat, each with its own scale."""
    if "parts" not in metadata:
        return [metadata]
    return [_scaled(part, metadata.get("scale", 1.0)) for part in metadata["parts"]]
