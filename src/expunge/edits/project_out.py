"""Project out: subtract the toxic direction from the last layer's output while the model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from expunge.edits.base import EditInputs, Intervention, edit
from expunge.errors import PatchError, RecipeError
from expunge.model.structure import find_structure
from expunge.probes.fit import fit_probes
from expunge.probes.probe import ProbeKind, choose_layers

# Of the probe, told in the metadata.
_FACTS = ("accuracy", "accuracy_low", "accuracy_high", "auroc", "n", "control")


@dataclass(frozen=True, eq=False)
class ProjectOut(Intervention):
    """h ← h − α·gap·w after one layer, at every token.

    Attributes:
        layer: 0-based; the model's last.
        direction_D: w, a unit vector, toxic side positive; float32, on the CPU.
        gap: distance between the means of both classes along w, in activation units.
        alpha: how many gaps are subtracted.
    """

    name = "project-out"

    layer: int
    direction_D: Tensor
    gap: float
    alpha: float
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        direction_D = self.direction_D.detach().to("cpu", torch.float32).clone()
        if direction_D.ndim != 1 or not direction_D.isfinite().all():
            raise ValueError(f"a direction of shape {tuple(direction_D.shape)}, or not finite")
        object.__setattr__(self, "direction_D", direction_D)

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        """See `Intervention.applied`."""
        structure = find_structure(model)
        fits = (structure.n_layers, structure.hidden_size)
        wanted = (self.layer + 1, self.direction_D.shape[0])
        if fits != wanted:
            raise PatchError(
                what="The intervention was made for a model of another shape",
                got="{} layers of width {}".format(*fits),
                allowed="{} layers of width {}".format(*wanted),
                fix="give the base model that the edit was made on",
            )
        shift_D = self.alpha * self.gap * self.direction_D

        def subtract(_layer: Any, _args: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (out[0] - shift_D.to(out[0]), *out[1:])
            return out - shift_D.to(out)

        handle = structure.layers[self.layer].register_forward_hook(subtract)
        try:
            yield model
        finally:
            handle.remove()

    def tensors(self) -> Mapping[str, Tensor]:
        """The direction."""
        return {"direction": self.direction_D}

    def values(self) -> Mapping[str, Any]:
        """Layer, gap and α."""
        return {"layer": self.layer, "gap": self.gap, "alpha": self.alpha}

    @classmethod
    def restored(
        cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> ProjectOut:
        """See `Intervention.restored`."""
        numbers = float(values["gap"]), float(values["alpha"])
        return cls(int(values["layer"]), tensors["direction"], *numbers, metadata)


@edit(
    "project-out",
    source="arXiv:2401.01967 (Lee et al. 2024, subtracting the probe's weight); repository "
    "ajyl/dpo_toxic",
    deviations="alpha counts distances between the class means along w, 1 laying the toxic mean "
    "on the neutral one; the source chooses it by perplexity. The probe is fitted on the run's "
    "own texts at the output of the last layer, before the final norm, without first tokens. All "
    "tokens are moved, where the source moves the one sampled from: at the last layer the samples "
    "are the same",
    intervention=ProjectOut,
)
def project_out(
    given: EditInputs, *, alpha: float = 1.0, probe: str = "logistic", allow_chance: bool = False
) -> ProjectOut:
    """h ← h − α·gap·w at the last layer's output, w a probe's unit direction.

    Despite its name nothing is projected: every token is shifted alike, however far it lies along
    w. Both classes' likelihoods change, for the shift does not ask which text it is in.

    Args:
        given: needs texts of both classes.
        alpha: above 0. With 1 the toxic texts' mean comes to lie on the neutral texts', along w.
        probe: kind of probe, fitted on means over tokens: logistic, mean-difference or lda.
        allow_chance: also take a direction whose held-out accuracy cannot be told from chance.

    Raises:
        DataError: a class is missing or too small, or the probe is at chance.
        RecipeError: a setting is out of range.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise RecipeError(
            what="alpha of project-out is out of range",
            got=str(alpha),
            allowed="a finite number above 0, in distances between the class means",
            fix="use 1, which removes the distance, or 2 to 8 for a stronger push",
        )
    last = given.structure.n_layers - 1
    probes = fit_probes(
        given.model,
        given.structure,
        given.toxic,
        given.neutral,
        layers=[last],
        kind=cast(ProbeKind, probe),  # checked by fit_probes
        pooling="mean",
        paired=given.paired,
    )
    choose_layers(probes, [last], allow_chance=allow_chance)
    (found,) = probes
    facts = {name: getattr(found, name) for name in ("kind", *_FACTS)}
    gap = found.toxic - found.neutral
    return ProjectOut(last, found.direction_D, gap, float(alpha), {"probe": facts})
