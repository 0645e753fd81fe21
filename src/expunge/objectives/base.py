"""What an objective is: a pure function from activations to a loss, and its registry.

An objective never sees a model, an optimiser or a recipe. It says by its registration what it
needs, and the engine cuts the model accordingly. Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.objectives.targets import TargetKind
from expunge.registry import Registry


@dataclass(frozen=True)
class Activations:
    """An objective's need: activations after the chosen layers, and whether of the original too.

    The original activations of retain texts are always given.

    Attributes:
        forget_reference: also give the original activations of the forget texts.
        probes: read the layers whose probe passes (``many``) or the best of them (``one``), and
            give their directions; ``none``: read the recipe's layer.
        twin_logprobs: where the data is paired, also give the log-probabilities of each forget
            text's other wording; the whole model is then opened, and run for these wordings.
        reference_settings: settings of the objective that, unless they are 0, need
            ``forget_reference`` too.
    """

    forget_reference: bool = False
    probes: Literal["none", "many", "one"] = "none"
    twin_logprobs: bool = False
    reference_settings: tuple[str, ...] = ()

    def given(self, settings: Mapping[str, Any]) -> Activations:
        """What is needed with these settings of the objective."""
        asked = any(settings[name] for name in self.reference_settings)
        return replace(self, forget_reference=self.forget_reference or asked)


@dataclass(frozen=True)
class Logprobs:
    """An objective's need: log-probabilities of the texts, now and under the original model.

    The whole model is run, head included, with gradients from the first trained layer on. The
    original's are computed once, before the first step. The forget term is a mean over texts, the
    retain term over tokens. The original's log-probabilities of retain texts are always given.

    Attributes:
        twin: also give each forget text's other wording, so the data must be paired.
        forget_reference: also give the original's log-probabilities of the forget texts.
    """

    twin: bool = False
    forget_reference: bool = True

    @property
    def probes(self) -> Literal["none"]:
        """Log-probabilities are read, no layers."""
        return "none"

    def given(self, _settings: Mapping[str, Any]) -> Logprobs:
        """What is needed with these settings of the objective: always the same."""
        return self


Needs = Activations | Logprobs


@dataclass(frozen=True)
class Direction:
    """What a probe found at one layer, as an objective sees it.

    Attributes:
        unit_D: unit direction w, from neutral to toxic.
        move_D: the difference of the class means, scaled so that w·move is 1: adding it raises
            the projection by 1.
        neutral, toxic: mean projection of each class's tokens on w.
        spread: standard deviation of the projections within the classes.
        gap: norm of the difference of the class means.
        weight: of this layer among those read; the weights have mean 1.
    """

    unit_D: Tensor
    move_D: Tensor
    neutral: float
    toxic: float
    spread: float
    gap: float
    weight: float = 1.0


@dataclass(frozen=True)
class Captured:
    """What an objective sees of one batch of forget or retain texts.

    Values under a false mask are replaced by zeros, so that nothing there, not even NaN, reaches
    a loss or, as 0·NaN, a gradient.

    Attributes:
        acts: layer -> activations BTD, with gradient; empty for log-probability objectives.
        reference: layer -> original activations BTD, no gradient; empty if not needed.
        mask_BT: true where a token counts.
        target: unit target directions u, layer -> D or BTD; empty for retain texts.
        first_norm: layer -> mean norm of the original activations of the first forget batch.
        directions: layer -> what its probe found; empty if not needed.
        logprobs_BT: log-probability in nats of each token given those before it, with gradient.
        reference_logprobs_BT: the original model's; None if not needed.
        twin: the other wordings of the same texts, row by row; None if not needed, or where the
            data is not paired.
        weight: of a twin: what a mean over its tokens is multiplied by, so that pieces of a batch,
            weighed by their forget tokens, add up to the mean over the whole; 1 for a whole batch.
    """

    acts: Mapping[int, Tensor]
    reference: Mapping[int, Tensor]
    mask_BT: Tensor
    target: Mapping[int, Tensor] = field(default_factory=dict)
    first_norm: Mapping[int, float] = field(default_factory=dict)
    directions: Mapping[int, Direction] = field(default_factory=dict)
    logprobs_BT: Tensor | None = None
    reference_logprobs_BT: Tensor | None = None
    twin: Captured | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        mask_BT1 = self.mask_BT[..., None]
        acts = {layer: torch.where(mask_BT1, h_BTD, 0) for layer, h_BTD in self.acts.items()}
        object.__setattr__(self, "acts", acts)
        for name in ("logprobs_BT", "reference_logprobs_BT"):
            value_BT = getattr(self, name)
            if value_BT is not None:
                object.__setattr__(self, name, torch.where(self.mask_BT, value_BT, 0))


@dataclass(frozen=True)
class Loss:
    """Forget and retain terms, not yet weighed: weighing them is the trade-off's work.

    Attributes:
        forget, retain: float32 scalars with gradient; lower is better for both.
        watch: computes detached scalars worth watching, e.g. ``cos_target`` and ``norm_forget``;
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


@dataclass(frozen=True)
class Knob:
    """A number that weighs forgetting against retaining, and its sensible range.

    Attributes:
        name: of the objective's setting, or of one that all have.
        low, high: the range, in the setting's unit, or with ``relative`` in multiples of the
            value that a run without learning uses.
        scale: ``log`` or ``linear``: on which scale the range is even.
    """

    name: str
    low: float
    high: float
    scale: Literal["log", "linear"] = "log"
    relative: bool = False


# Knobs that every objective has, in multiples of what a run without learning would use.
COMMON_KNOBS = (
    Knob("lr", 0.2, 5.0, relative=True),
    Knob("retain_weight", 0.1, 10.0, relative=True),
)

Objective = Callable[..., Loss]
OBJECTIVES: Registry[Objective] = Registry("objective")


def objective(
    name: str,
    *,
    source: str,
    deviations: str,
    needs: Needs,
    retain_weight: float,
    target: TargetKind = "positive",
    knobs: tuple[Knob, ...] = (),
) -> Callable[[Objective], Objective]:
    """Register ``f(forget: Captured, retain: Captured, *, settings…) -> Loss``.

    Args:
        name: what recipes call it.
        source: paper or repository, with revision.
        deviations: how this differs from the source; say "reconstruction" where it is one.
        needs: what the engine must provide.
        retain_weight: default weight of the retain term (the forget term's is 1).
        target: default kind of target direction, for objectives that have one.
        knobs: settings of the objective that a learned trade-off may move, besides the learning
            rate and the retain weight (`COMMON_KNOBS`); one of these names takes the place of the
            common one.

    Raises:
        ValueError: a knob that is no setting; or ``reference_settings`` of the needs names no
            setting, or a knob: what is stored is decided before a run begins.
    """
    register = OBJECTIVES.register(
        name,
        source=source,
        deviations=deviations,
        needs=needs,
        retain_weight=retain_weight,
        target=target,
        knobs=knobs,
    )

    def add(part: Objective) -> Objective:
        given = inspect.signature(part).parameters.values()
        settings = {one.name for one in given if one.kind is one.KEYWORD_ONLY}
        moved = {knob.name for knob in knobs}
        asking = set(needs.reference_settings) if isinstance(needs, Activations) else set()
        if unknown := moved - settings - {knob.name for knob in COMMON_KNOBS}:
            raise ValueError(f"knobs of {name!r}: no settings: {sorted(unknown)}")
        if refused := asking - (settings - moved):
            raise ValueError(
                f"reference_settings of {name!r}: no settings, or knobs: {sorted(refused)}"
            )
        return register(part)

    return add


def mean_over_layers(values: list[Tensor]) -> Tensor:
    """Average of one scalar per layer."""
    return torch.stack(values).mean()
