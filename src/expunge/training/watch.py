"""Looks at validation while a run goes on: the best state is kept, a collapse ends the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from expunge.errors import DivergedError
from expunge.training.log import StepLog


class Point(NamedTuple):
    """How far a model is, against the base; both in [0, 1].

    Attributes:
        forget: 0 as the base, 1 nothing of the function left.
        retain: 1 as the base, 0 nothing of the rest left.
    """

    forget: float
    retain: float

    def worth(self, floor: float) -> float:
        """Forget times retain, in [0, 1]; nothing where retain is ``floor`` or less."""
        return max(0.0, self.forget) * self.retain if self.retain > floor else 0.0

    def area(self, floor: float) -> float:
        """Hypervolume of this point alone: between it and (0, ``floor``), as a share of all."""
        return max(0.0, self.forget) * max(0.0, self.retain - floor) / (1 - floor)


@dataclass
class Watch:
    """Takes a look every ``every`` steps and after the last one.

    Attributes:
        look: measures the model as it is.
        floor: retain below which the rest counts as lost, and the run stops.
        retain_floor: retain above which a state is worth going back to rather than others; None:
            ``floor``.
        keep_best: whether to hold a copy of the best weights, to go back to after a collapse.
        on_point: told of each point: steps done, the point, the weights; None instead of weights
            for what an interrupted run had seen.
        points: steps done -> what was seen.
        best_step, best: the state of largest worth so far.
        collapsed: steps done when retain fell through the floor.
    """

    look: Callable[[], Point]
    every: int
    floor: float
    retain_floor: float | None = None
    keep_best: bool = True
    on_point: Callable[[int, Point, Mapping[str, Tensor] | None], None] = lambda _d, _p, _w: None
    points: dict[int, Point] = field(default_factory=dict)
    best_step: int | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    collapsed: int | None = None

    def after(self, done: int, steps: int, weights: Mapping[str, Tensor]) -> Point | None:
        """Look, if it is time to; the point seen. Sets ``collapsed``."""
        if done % self.every and done != steps:
            return None
        point = self.look()
        self.points[done] = point
        self.on_point(done, point, weights)
        if point.retain < self.floor:
            self.collapsed = done
        elif self.keep_best and self._is_best(point):
            self.best_step = done
            self.best = {name: p.detach().cpu().clone() for name, p in weights.items()}
        return point

    def resume(self, log: Sequence[StepLog], best: Mapping[str, Tensor]) -> None:
        """Take up what an interrupted run had seen."""
        self.points = {e.step + 1: Point(*e.point) for e in log if e.point is not None}
        self.best = dict(best)
        kept = {done: p for done, p in self.points.items() if p.retain >= self.floor}
        self.best_step = max(kept, key=lambda done: self._worth(kept[done]), default=None)
        for done, point in self.points.items():
            self.on_point(done, point, None)
        # A collapse ends a run, so only the last look can have seen one.
        if len(kept) < len(self.points):
            self.collapsed = max(self.points)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Put the best state's weights back. Raises DivergedError if there is none."""
        if self.best_step is None:
            at = self.collapsed
            assert at is not None
            raise DivergedError(
                what=f"What is to be kept collapsed within {at} steps, before any good state",
                got=f"retain {self.points[at].retain:.2f} of the base's",
                allowed=f"at least {self.floor:g}",
                fix="lower lr, raise retain_weight, or let --tradeoff learned set them",
            )
        for name, parameter in weights.items():
            parameter.copy_(self.best[name])

    def tell_collapse(self, say: Callable[[str], None]) -> None:
        """Say that the run was stopped because the rest was lost, if it was."""
        if self.collapsed is not None:
            say(
                f"what is to be kept fell below {self.floor:g} of the base's after "
                f"{self.collapsed} steps: the run stopped, with its best state on validation, "
                f"that of step {self.best_step}"
            )

    def _is_best(self, point: Point) -> bool:
        if self.best_step is None:
            return True
        return self._worth(point) > self._worth(self.points[self.best_step])

    def _worth(self, point: Point) -> tuple[float, float]:
        wanted = self.floor if self.retain_floor is None else self.retain_floor
        return point.area(wanted), point.area(self.floor)
