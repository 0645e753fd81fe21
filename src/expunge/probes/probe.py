"""The artefact: a Probe, one direction at one layer that tells toxic from neutral.

Shapes: D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from expunge.errors import DataError, ModelError, RecipeError
from expunge.model.shards import read_header, save_tensors
from expunge.model.structure import Structure

FORMAT = "expunge-probes"
FORMAT_VERSION = "1"
CHANCE = 0.5
TENSORS = ("direction_D", "difference_D")

ProbeKind = Literal["logistic", "mean-difference", "lda"]
Pooling = Literal["mean", "token"]


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe of one layer's output (the residual stream).

    Attributes:
        layer: 0-based decoder layer.
        kind, pooling: how it was fitted; ``mean``: on means over a text's tokens.
        direction_D: unit vector, float32, on the CPU; the toxic side is positive.
        difference_D: mean of the toxic class's tokens minus that of the neutral class's, fitting
            data, float32, on the CPU.
        bias: ``acts · direction_D + bias > 0`` means toxic, in units of the activations.
        neutral, toxic: mean projection ``acts · direction_D`` of each class's tokens, fitting data.
        spread: standard deviation of such projections of single tokens within the classes.
        accuracy, accuracy_low, accuracy_high: on held-out texts, as many of each class, with a
            95 % interval.
        auroc, auroc_low, auroc_high: the same for the area under the ROC curve.
        n: held-out texts. The intervals count texts, also where tokens were classified.
        control: held-out accuracy of the same fit when the texts' labels are shuffled. What
            ``accuracy`` has above it is the probe's selectivity.

    Raises DataError if the direction is not a finite unit vector.
    """

    layer: int
    kind: ProbeKind
    pooling: Pooling
    direction_D: Tensor = field(repr=False)
    difference_D: Tensor = field(repr=False)
    bias: float
    neutral: float
    toxic: float
    spread: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    auroc: float
    auroc_low: float
    auroc_high: float
    n: int
    control: float

    def __post_init__(self) -> None:
        direction_D = self.direction_D.detach().to("cpu", torch.float32).contiguous()
        norm = float(direction_D.double().norm())
        if direction_D.ndim != 1 or not abs(norm - 1) < 1e-4:
            raise DataError(
                what=f"The direction of the probe at layer {self.layer} is no unit vector",
                got=f"shape {list(direction_D.shape)}, norm {norm:g}",
                allowed="a finite vector of norm 1",
                fix="fit the probe again",
            )
        object.__setattr__(self, "direction_D", direction_D)
        difference_D = self.difference_D.detach().to("cpu", torch.float32).contiguous()
        if difference_D.shape != direction_D.shape or not difference_D.isfinite().all():
            raise DataError(
                what=f"The class difference of the probe at layer {self.layer} does not fit it",
                got=f"shape {list(difference_D.shape)}",
                allowed=f"finite numbers of shape {list(direction_D.shape)}",
                fix="fit the probe again",
            )
        object.__setattr__(self, "difference_D", difference_D)

    @property
    def at_chance(self) -> bool:
        """Whether the held-out accuracy cannot be told from chance (0.5)."""
        return self.accuracy_low <= CHANCE

    @property
    def selectivity(self) -> float:
        """Held-out accuracy above that of the same fit on shuffled labels."""
        return self.accuracy - self.control

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the numbers, without the tensors."""
        return _numbers(self)

    def score(self, acts: Tensor) -> Tensor:
        """``acts · direction_D + bias`` over the last dimension, float32; above 0: toxic."""
        return acts.float() @ self.direction_D.to(acts.device) + self.bias

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Probe):
            return NotImplemented
        return _numbers(self) == _numbers(other) and all(
            torch.equal(getattr(self, name), getattr(other, name)) for name in TENSORS
        )

    # Equal by value, and tensors can change: no hash.
    __hash__ = None  # type: ignore[assignment]


def save_probes(
    path: Path | str, probes: Sequence[Probe], metadata: dict[str, Any] | None = None
) -> Path:
    """Write one safetensors file, atomically; numbers and metadata are JSON in its header.

    Args:
        path: the file.
        probes: at least one.
        metadata: JSON-able facts such as the base model and the data.

    Raises:
        DataError: there are no probes, or the metadata has no JSON form.
        ResourceError: the file cannot be written.
    """
    if not probes:
        raise DataError(
            what="There are no probes to save",
            got="0 probes",
            allowed="at least one",
            fix="fit probes at one layer or more",
        )
    try:
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "probes": json.dumps([_numbers(probe) for probe in probes], allow_nan=False),
            "metadata": json.dumps(metadata or {}, ensure_ascii=False, allow_nan=False),
        }
    except (TypeError, ValueError) as error:
        raise DataError(
            what="The metadata of the probes has no JSON form",
            got=str(error),
            allowed="dicts, lists, strings, finite numbers, booleans, None",
            fix="convert the value, for example a path by str()",
        ) from error
    path = Path(path)
    tensors = {
        f"{i}.{name}": getattr(probe, name) for i, probe in enumerate(probes) for name in TENSORS
    }
    save_tensors(path, tensors, header)
    return path


def load_probes(path: Path | str) -> tuple[tuple[Probe, ...], dict[str, Any]]:
    """The probes and the metadata that `save_probes` wrote. Raises DataError for anything else."""
    path = Path(path)
    try:
        _, header = read_header(path)
        if header.get("format") != FORMAT:
            raise ValueError("no probes, or not written by expunge")
        if header.get("version") != FORMAT_VERSION:
            raise ValueError(f"format version {header.get('version')}, not {FORMAT_VERSION}")
        tensors = load_file(path)
        numbers, metadata = json.loads(header["probes"]), json.loads(header["metadata"])
        probes = tuple(
            Probe(**known, **{name: tensors[f"{i}.{name}"] for name in TENSORS})
            for i, known in enumerate(numbers)
        )
        for probe in probes:
            _check_kinds(probe)
        if not isinstance(metadata, dict):
            raise TypeError(f"a {type(metadata).__name__} where an object is expected")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(
            what=f"{path} holds no readable probes",
            got=f"{type(error).__name__}: {error}",
            allowed=f"a .safetensors file that `save_probes` wrote, version {FORMAT_VERSION}",
            fix="fit the probes again, or copy the file again",
        ) from error
    return probes, metadata


def choose_layers(
    probes: Sequence[Probe],
    layers: Literal["auto"] | Sequence[int],
    threshold: float = 0.6,
    *,
    allow_chance: bool = False,
) -> tuple[int, ...]:
    """The layers to work at, ascending.

    Args:
        probes: one for each layer.
        layers: a list, or ``auto``: all whose held-out accuracy is at least ``threshold``.
        threshold: from 0 to 1; only ``auto`` uses it.
        allow_chance: also take probes whose accuracy cannot be told from chance.

    Raises:
        RecipeError: a listed layer has no probe, or the list is empty.
        DataError: a listed layer's probe is at chance, or no probe passes.
    """
    by_layer = {probe.layer: probe for probe in probes}
    usable = {
        layer: probe for layer, probe in by_layer.items() if allow_chance or not probe.at_chance
    }
    if layers == "auto":
        chosen = sorted(layer for layer, probe in usable.items() if probe.accuracy >= threshold)
        if not chosen:
            raise DataError(
                what="No layer's probe tells toxic from neutral text well enough",
                got=_table(probes),
                allowed=f"a held-out accuracy of {threshold:g} whose interval lies above {CHANCE}",
                fix="give more texts, check that their labels are right, or lower the threshold",
            )
        return tuple(chosen)
    listed = sorted({int(layer) for layer in layers})
    without = [layer for layer in listed if layer not in by_layer]
    if without or not listed:
        raise RecipeError(
            what="There is no probe at a layer asked for",
            got=f"layer {without[0]}" if without else "no layer",
            allowed=", ".join(map(str, sorted(by_layer))) or "fit probes first",
            fix="choose among these layers, or fit a probe there",
        )
    chance = [by_layer[layer] for layer in listed if layer not in usable]
    if chance:
        raise DataError(
            what="A probe is at chance: its direction says nothing about toxicity",
            got=_table(chance),
            allowed=f"a held-out accuracy whose 95 % interval lies above {CHANCE}",
            fix="leave the layer out, give more texts, or allow probes at chance",
        )
    return tuple(listed)


def check_fit(probes: Sequence[Probe], structure: Structure) -> None:
    """Raise ModelError unless every probe has a layer and a width of this model."""
    for probe in probes:
        width = len(probe.direction_D)
        if not 0 <= probe.layer < structure.n_layers or width != structure.hidden_size:
            raise ModelError(
                what="The probes do not fit this model",
                got=f"a probe of layer {probe.layer} with {width} dimensions",
                allowed=f"layers 0 to {structure.n_layers - 1}, {structure.hidden_size} dimensions",
                fix="use the model that the probes were fitted on, or fit them again",
            )


def _table(probes: Sequence[Probe]) -> str:
    return "; ".join(
        f"layer {probe.layer}: {probe.accuracy:.2f} "
        f"[{probe.accuracy_low:.2f}, {probe.accuracy_high:.2f}], n {probe.n}"
        for probe in sorted(probes, key=lambda probe: probe.layer)
    )


def _numbers(probe: Probe) -> dict[str, Any]:
    """All fields but the tensors."""
    return {f.name: getattr(probe, f.name) for f in fields(probe) if f.name not in TENSORS}


def _check_kinds(probe: Probe) -> None:
    """Raise ValueError unless the fields read from JSON have the kinds that they should."""
    if probe.kind not in get_args(ProbeKind) or probe.pooling not in get_args(Pooling):
        raise ValueError(f"unknown kind {probe.kind!r} or pooling {probe.pooling!r}")
    for name, value in _numbers(probe).items():
        if name not in ("kind", "pooling") and (
            isinstance(value, bool) or not isinstance(value, int | float)
        ):
            raise ValueError(f"{name} is {value!r}, not a number")
