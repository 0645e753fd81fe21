"""The trade-off: how the forget and the retain term are weighed at each step.

``fixed`` holds the weights, ``exchange`` shifts them linearly from forgetting to retaining.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

TradeoffKind = Literal["fixed", "exchange"]


class Weights(NamedTuple):
    """Weights of the two terms at one step."""

    forget: float
    retain: float


@dataclass(frozen=True)
class Tradeoff:
    """A rule for the weights of the two terms.

    Attributes:
        kind: ``fixed``: forget 1, retain ``retain_weight`` throughout. ``exchange``: with progress
            p from 0 to 1/2 over the run, forget 1 − p and retain ``retain_weight``·p, the rule of
            circuit breakers (arXiv:2406.04313 and its repository, where 150 steps are run against
            a horizon of 300).
        retain_weight: of the retain term, relative to the forget term.
    """

    kind: TradeoffKind
    retain_weight: float

    def at(self, step: int, steps: int) -> Weights:
        """The weights at a step (0-based) of a run of ``steps``."""
        if self.kind == "fixed":
            return Weights(1.0, self.retain_weight)
        progress = step / (2 * steps)
        return Weights(1.0 - progress, self.retain_weight * progress)
