"""What an objective is: a pure function from activations to a loss, and its registry.

An objective never sees a model, an optimiser or a recipe. It says by its registration what it
needs, and the engine cuts the model accordingly. Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.errors import RecipeError
from expunge.objectives.targets import TargetKind
from expunge.registry import Entry, Registry, nearest


@dataclass(frozen=True)
class Activations:
    """An objective's need: activations after the chosen layers, and whether of the original too.

    The original activations of retain texts are always given.

    Attributes:
        forget_reference: also give the original activations of the forget texts.
    """

    forget_reference: bool = False


@dataclass(frozen=True)
class Captured:
    """The activations of one batch of forget or retain texts.

    Activations under a false mask are replaced by zeros, so that nothing there, not even NaN,
    reaches a loss or, as 0·NaN, a gradient.

    Attributes:
        acts: layer -> activations BTD, with gradient.
        reference: layer -> original activations BTD, no gradient; empty if not needed.
        mask_BT: true where a token counts.
        target: unit target directions u, layer -> D or BTD; empty for retain texts.
        first_norm: layer -> mean norm of the original activations of the first forget batch.
    """

    acts: Mapping[int, Tensor]
    reference: Mapping[int, Tensor]
    mask_BT: Tensor
    target: Mapping[int, Tensor] = field(default_factory=dict)
    first_norm: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mask_BT1 = self.mask_BT[..., None]
        acts = {layer: torch.where(mask_BT1, h_BTD, 0) for layer, h_BTD in self.acts.items()}
        object.__setattr__(self, "acts", acts)


@dataclass(frozen=True)
class Loss:
    """Forget and retain terms, not yet weighed: weighing them is the trade-off's work.

    Attributes:
        forget, retain: float32 scalars with gradient; lower is better for both.
        watch: computes detached scalars worth watching, e.g. ``cos_target`` and ``norm_ratio``;
            called at some steps only, since it costs as much as a loss.
    """

    forget: Tensor
    retain: Tensor
    watch: Callable[[], Mapping[str, Tensor]] = dict

    @property
    def logs(self) -> Mapping[str, Tensor]:
        """What `watch` computes."""
        return self.watch()

    def total(self, *, forget_weight: float, retain_weight: float) -> Tensor:
        """The weighed sum."""
        return forget_weight * self.forget + retain_weight * self.retain


Objective = Callable[..., Loss]
OBJECTIVES: Registry[Objective] = Registry("objective")


def objective(
    name: str,
    *,
    source: str,
    deviations: str,
    needs: Activations,
    retain_weight: float,
    target: TargetKind = "positive",
) -> Callable[[Objective], Objective]:
    """Register ``f(forget: Captured, retain: Captured, *, settings…) -> Loss``.

    Args:
        name: what recipes call it.
        source: paper or repository, with revision.
        deviations: how this differs from the source; say "reconstruction" where it is one.
        needs: what the engine must provide.
        retain_weight: default weight of the retain term (the forget term's is 1).
        target: default kind of target direction, for objectives that have one.
    """
    return OBJECTIVES.register(
        name,
        source=source,
        deviations=deviations,
        needs=needs,
        retain_weight=retain_weight,
        target=target,
    )


def settings_of(entry: Entry[Objective], given: Mapping[str, Any]) -> dict[str, Any]:
    """The objective's keyword settings with defaults filled in.

    Raises:
        RecipeError: a key that the objective does not have, with the nearest one.
    """
    parameters = inspect.signature(entry.part).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for key, value in given.items():
        if key not in defaults:
            raise RecipeError(
                what=f"Objective {entry.name} has no setting of that name",
                got=repr(key),
                allowed=", ".join(defaults) or "no settings",
                fix=nearest(key, defaults),
            )
        wanted = type(defaults[key])
        # A whole number will do for a float; bool, which Python calls an int, is no number here.
        kinds = (int, float) if wanted is float else wanted
        if isinstance(value, bool) is not (wanted is bool) or not isinstance(value, kinds):
            raise RecipeError(
                what=f"Setting {key} of objective {entry.name} is of the wrong kind",
                got=f"{value!r} ({type(value).__name__})",
                allowed=f"{wanted.__name__}, for example {defaults[key]!r}",
                fix=f"set objective_settings.{key} to a {wanted.__name__}",
            )
    return {**defaults, **given}


def mean_over_layers(values: list[Tensor]) -> Tensor:
    """Average of one scalar per layer."""
    return torch.stack(values).mean()
