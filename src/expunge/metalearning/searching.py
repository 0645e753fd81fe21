"""Random search over the knobs that a learned trade-off moves: the plain rival of learning.

Each trial is a run of full length that holds its knobs; the first keeps to the usual values. Trials
with one seed differ in nothing else. What learning draws before its policy begins is the same, but
short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from expunge.training.tradeoff import Actor, Scale

# Shares of a knob's range that a search may choose; a policy reaches its ends only in the limit.
LOW, HIGH = 0.02, 0.98
# A usual value may lie at an end itself, which no finite place has; this near, nobody can tell.
END = 1e-12


def constant(scales: Sequence[Scale], shares: Mapping[str, float]) -> Actor:
    """An actor that holds every knob at a share of its range."""
    found = np.array([min(max(shares[s.knob.name], END), 1 - END) for s in scales])
    place_K = np.log(found) - np.log1p(-found)
    return lambda _state: place_K


def trial(scales: Sequence[Scale], seed: int, number: int) -> Actor:
    """The actor of a trial: the usual values at first, then shares drawn evenly of each range."""
    if number == 0:
        return constant(scales, {scale.knob.name: scale.usual_share for scale in scales})
    generator = np.random.default_rng([seed, number])
    drawn = generator.uniform(LOW, HIGH, len(scales))
    return constant(scales, {s.knob.name: float(x) for s, x in zip(scales, drawn, strict=True)})
