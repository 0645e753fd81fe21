"""The trade-off: how the forget and the retain term are weighed, and other knobs set, as training
goes on.

``fixed`` holds the weights, ``schedule`` shifts them linearly from forgetting to retaining,
``learned`` lets a policy set the knobs from what validation says on the way, ``search`` tries
knobs at random, each for a whole run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from expunge.objectives.base import COMMON_KNOBS, Knob
from expunge.training.watch import Point

TradeoffKind = Literal["fixed", "schedule", "learned", "search"]
# Kinds that play episodes, keep a front, and take a point of it.
EXPLORING: tuple[TradeoffKind, ...] = ("learned", "search")

START = Point(0.0, 1.0)
# Of a run, unless its recipe says how many steps each has.
ACTIONS = 16


@dataclass(frozen=True)
class Dials:
    """What is set at one step.

    Attributes:
        forget, retain: weights of the two terms.
        lr: learning rate before the run's own decay; None: the run's.
        settings: settings of the objective that differ from the run's.
        knobs: what a policy chose, for the log.
    """

    forget: float
    retain: float
    lr: float | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    knobs: Mapping[str, float] = field(default_factory=dict)


class Tradeoff(Protocol):
    """A rule for the dials of each step."""

    def at(self, step: int, steps: int, points: Mapping[int, Point]) -> Dials:
        """The dials at a step (0-based) of a run of ``steps``.

        Args:
            points: what looks at validation said so far, by the number of steps done before.
        """


@dataclass(frozen=True)
class Fixed:
    """Forget 1, retain ``retain_weight`` throughout."""

    retain_weight: float

    def at(self, step: int, steps: int, points: Mapping[int, Point]) -> Dials:
        return Dials(1.0, self.retain_weight)


@dataclass(frozen=True)
class Schedule:
    """With progress p from 0 to 1/2 over the run, forget 1 − p and retain ``retain_weight``·p.

    The rule of circuit breakers (arXiv:2406.04313 and its repository, where 150 steps are run
    against a horizon of 300).
    """

    retain_weight: float

    def at(self, step: int, steps: int, points: Mapping[int, Point]) -> Dials:
        progress = step / (2 * steps)
        return Dials(1.0 - progress, self.retain_weight * progress)


def rule(kind: TradeoffKind, retain_weight: float) -> Tradeoff:
    """A rule for a single run; those that explore have none and count as ``fixed``."""
    return Schedule(retain_weight) if kind == "schedule" else Fixed(retain_weight)


@dataclass(frozen=True)
class Scale:
    """The way between a knob's values and the whole line, where a policy moves.

    Attributes:
        low, high: the range, in the knob's own unit; ``usual`` lies in it.
        usual: what a run without learning uses.
    """

    knob: Knob
    low: float
    high: float
    usual: float

    @classmethod
    def of(cls, knob: Knob, usual: float) -> Scale:
        """The scale of a knob for a run that would use ``usual``.

        A range in multiples of a usual value of 0 has no width; such a knob stays where it is.
        """
        unit = usual if knob.relative else 1.0
        return cls(knob, min(unit * knob.low, usual), max(unit * knob.high, usual), usual)

    @property
    def moves(self) -> bool:
        """Whether there is anything to choose."""
        return self.high > self.low and (self.knob.scale == "linear" or self.low > 0)

    def value(self, place: float) -> float:
        """The knob's value at a place between minus and plus infinity."""
        return self.at_share((1 + math.tanh(place / 2)) / 2)

    def at_share(self, share: float) -> float:
        """The knob's value at a share of its range, from 0 to 1."""
        if self.knob.scale == "linear":
            return self.low + share * (self.high - self.low)
        return float(self.low * (self.high / self.low) ** share)

    @property
    def usual_share(self) -> float:
        """Where in its range the usual value lies."""
        if self.knob.scale == "linear":
            return (self.usual - self.low) / (self.high - self.low)
        return math.log(self.usual / self.low) / math.log(self.high / self.low)

    @property
    def start_share(self) -> float:
        """The usual value's, but a tenth off the ends: where a policy begins at first."""
        return min(max(self.usual_share, 0.1), 0.9)

    @property
    def start(self) -> float:
        """The place of `start_share`."""
        return math.log(self.start_share / (1 - self.start_share))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        names = ("low", "high", "usual")
        return {name: getattr(self, name) for name in names} | {"scale": self.knob.scale}


def declared(knobs: Sequence[Knob]) -> dict[str, Knob]:
    """The common and an objective's own knobs by name; its own take the place of common ones."""
    return {knob.name: knob for knob in (*COMMON_KNOBS, *knobs)}


def ranges_of(knobs: Sequence[Knob]) -> dict[str, list[Any]]:
    """What places of a policy mean, in JSON form: of each knob its range, by name."""
    return {
        name: [knob.low, knob.high, knob.scale, knob.relative]
        for name, knob in declared(knobs).items()
    }


def scales_of(knobs: Sequence[Knob], usual: Mapping[str, float]) -> tuple[Scale, ...]:
    """The scales of the common and an objective's own knobs, those that cannot move left out.

    Args:
        usual: what a run without learning uses, by the knob's name.
    """
    found = [Scale.of(knob, usual[name]) for name, knob in declared(knobs).items()]
    return tuple(scale for scale in found if scale.moves)


@dataclass(frozen=True)
class State:
    """What a policy sees: the share of the run done, the latest point, which action it is."""

    share: float
    point: Point
    number: int


def steps_of_action(given: int | Literal["auto"], steps: int) -> int:
    """Steps between actions in a run of ``steps``; auto: as many as make `ACTIONS`."""
    return math.ceil(steps / ACTIONS) if given == "auto" else given


def steps_of_episode(given: int | Literal["auto"], steps: int, action: int) -> int:
    """Steps of a short episode, for a run of ``steps`` with so many to an action: whole actions.

    Auto: two actions, of which the second can answer to what the first one did.
    """
    actions = 2 if given == "auto" else math.ceil(given / action)
    return min(steps, actions * action)


# (state) -> the places of all knobs
Actor = Callable[[State], NDArray[np.float64]]


@dataclass
class Learned:
    """An actor sets the knobs every ``every`` steps from the latest point on validation.

    Attributes:
        retain_weight: of a run without learning; used where no knob is for it.
        states: action number -> what was seen, for the actions taken.
        places: action number -> the places of all knobs.
    """

    scales: tuple[Scale, ...]
    actor: Actor
    every: int
    retain_weight: float
    states: dict[int, State] = field(default_factory=dict)
    places: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def at(self, step: int, steps: int, points: Mapping[int, Point]) -> Dials:
        number = step // self.every
        # A run that goes on where it was interrupted takes its earlier actions again, for the log.
        for taken in range(len(self.places), number + 1):
            begun = taken * self.every
            point = points[begun] if begun else START
            self.states[taken] = State(begun / steps, point, taken)
            self.places[taken] = self.actor(self.states[taken])
        values = self.values(number)
        own = {name: value for name, value in values.items() if name not in ("retain_weight", "lr")}
        weight = values.get("retain_weight", self.retain_weight)
        return Dials(1.0, weight, values.get("lr"), own, values)

    def values(self, number: int) -> dict[str, float]:
        """Knob -> value of an action taken."""
        pairs = zip(self.scales, self.places[number], strict=True)
        return {scale.knob.name: scale.value(float(place)) for scale, place in pairs}
