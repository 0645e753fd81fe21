"""A small stochastic policy over knobs, trained by REINFORCE (Williams 1992).

Places are Gaussian around a mean that is linear in what is seen: μ(s) = W·φ(s). The noise of the
actions of one episode is an AR(1) process, so that an episode explores in one direction long enough
for its effect to be seen (autoregressive policies, arXiv:1903.11524). With innovations ξ, the
gradient of an action's log-density in μ is ξ scaled by 1/σ; it is multiplied by σ², the inverse of
the Gaussian's Fisher information, so that a step is measured in the policy's own spread (natural
gradient).

Episodes are few, so all of them teach at every update, each weighed by how likely the present
policy would have acted so, against the policy that did (importance weights, truncated and flattened
where they would let a few episodes count alone).

**Reconstruction:** the paper names meta-learning of the trade-off by REINFORCE, not its settings.

Shapes: A actions, K knobs, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.training.tradeoff import Actor, State

Array = NDArray[np.float64]
N_FEATURES = 4
# The spread never falls below this: a policy that is sure too early learns no more.
LEAST_SPREAD = 0.15
# An episode counts at most so many times as much as under the policy that played it.
LARGEST_WEIGHT = 3.0
# Least effective share of the episodes, (Σw)² / Σw² over their number.
LEAST_EFFECTIVE = 1 / 6
# Innovations count no further from 0, in spreads: a policy that has moved far from an early episode
# would be thrown further still by it.
LARGEST_INNOVATION = 3.0
# Returns closer than this are equal: their mean, and so the rest, is rounded.
LEAST_SCALE = 1e-9


@dataclass(frozen=True)
class PolicySettings:
    """How a policy begins, explores and learns (LOG.md, "The policy").

    Attributes:
        spread: first standard deviation of the places; ±1 covers the middle half of a range.
        persistence: correlation of the noise of consecutive actions, in [0, 1).
        rate: step size of the mean, in spreads for an advantage of one standard deviation.
        spread_rate: step size of the logarithm of the spread.
        feedback: step size of the weights on what is seen, relative to that of the constant.
        passes: steps of one update.
        drawn: short episodes that draw their knobs evenly before the policy begins.
        warm_up: episodes of its own before the first update.
    """

    spread: float = 0.8
    persistence: float = 0.9
    rate: float = 0.7
    spread_rate: float = 0.15
    feedback: float = 0.3
    passes: int = 2
    drawn: int = 5
    warm_up: int = 5


@dataclass(frozen=True)
class Trajectory:
    """One episode, as the policy learns from it.

    Attributes:
        features: φ of each action, AF.
        places: what was chosen, AK.
        returns: what was gained from each action on, A.
        log_density: of all places under the policy that chose them.
    """

    features: Array
    places: Array
    returns: Array
    log_density: float


@dataclass(frozen=True)
class Policy:
    """Parameters of the policy.

    Attributes:
        weights: W, of shape KF; the first feature is constant.
        spread: σ of each knob, of shape K.
    """

    weights: Array
    spread: Array
    settings: PolicySettings = PolicySettings()

    @classmethod
    def starting(
        cls, starts: Sequence[float], settings: PolicySettings = PolicySettings()
    ) -> Policy:
        """A policy whose mean is one place for each knob, whatever it sees."""
        weights_KF = np.zeros((len(starts), N_FEATURES))
        weights_KF[:, 0] = starts
        return cls(weights_KF, np.full(len(starts), settings.spread), settings)

    def mean(self, state: State) -> Array:
        """The places of all knobs without noise, of shape K."""
        mean_K: Array = self.weights @ features(state)
        return mean_K

    def within(self, played: Sequence[Trajectory]) -> Actor:
        """The mean as an actor that is asked about nothing but what the episodes saw.

        A long run gets to states that no short episode reached; there each feature is taken at
        the nearest value that was seen, so that the linear mean does not run away.
        """
        if not played:
            return self.mean
        seen_NF = np.concatenate([one.features for one in played])
        low_F, high_F = seen_NF.min(axis=0), seen_NF.max(axis=0)

        def act(state: State) -> Array:
            place_K: Array = self.weights @ np.clip(features(state), low_F, high_F)
            return place_K

        return act

    def innovations(self, features_AF: Array, places_AK: Array) -> Array:
        """ξ, the part of each action's noise that the action before does not tell; AK."""
        rho = self.settings.persistence
        noise_AK = (places_AK - features_AF @ self.weights.T) / self.spread
        xi_AK: Array = noise_AK.copy()
        xi_AK[1:] = (noise_AK[1:] - rho * noise_AK[:-1]) / np.sqrt(1 - rho**2)
        return xi_AK

    def log_density(self, features_AF: Array, places_AK: Array) -> float:
        """Of an episode's places, in nats, up to a constant that no parameter moves."""
        xi_AK = self.innovations(features_AF, places_AK)
        return float(-0.5 * (xi_AK**2).sum() - len(places_AK) * np.log(self.spread).sum())

    def updated(self, played: Sequence[Trajectory]) -> Policy:
        """The policy after one update on all episodes played so far.

        The baseline of an action is the weighted mean return of the actions of the same number;
        advantages are divided by the standard deviation of the returns of whole episodes.
        """
        policy = self
        if len(played) >= self.settings.warm_up:
            for _ in range(self.settings.passes):
                policy = policy._step(played)
        return policy

    def _step(self, played: Sequence[Trajectory]) -> Policy:
        weights = self._importance(played)
        whole = np.array([e.returns[0] for e in played])
        middle = np.average(whole, weights=weights)
        scale = float(np.sqrt(np.average((whole - middle) ** 2, weights=weights)))
        if scale < LEAST_SCALE:
            return self
        baselines = self._baselines(played, weights)
        step_KF, step_K = np.zeros_like(self.weights), np.zeros_like(self.spread)
        for weight, one in zip(weights, played, strict=True):
            advantage_A = (one.returns - baselines[: len(one.returns)]) / scale
            xi_AK = self.innovations(one.features, one.places)
            xi_AK = xi_AK.clip(-LARGEST_INNOVATION, LARGEST_INNOVATION)
            reach_AF = self._reach(one.features)
            step_KF += weight * np.einsum("a,ak,af->kf", advantage_A, xi_AK, reach_AF)
            step_K += weight * (advantage_A[:, None] * (xi_AK**2 - 1)).mean(axis=0)
        total, s = weights.sum(), self.settings
        rates_F = s.rate * np.array([1.0] + [s.feedback] * (N_FEATURES - 1))
        spread_K = self.spread * np.exp(s.spread_rate * step_K / total)
        return replace(
            self,
            weights=self.weights + self.spread[:, None] * rates_F * step_KF / total,
            spread=np.clip(spread_K, LEAST_SPREAD, 2 * s.spread),
        )

    def _importance(self, played: Sequence[Trajectory]) -> Array:
        """How much each episode counts: the ratio of its densities now and then, truncated.

        Ratios of whole episodes spread with the number of actions and knobs, until one episode
        counts alone; their logarithms are halved until a sixth of the episodes count in effect.
        """
        log_ratios = np.array(
            [self.log_density(one.features, one.places) - one.log_density for one in played]
        )
        while True:
            shifted = np.minimum(log_ratios, np.log(LARGEST_WEIGHT))
            weights: Array = np.exp(shifted - shifted.max())
            if weights.sum() ** 2 / (weights**2).sum() >= len(played) * LEAST_EFFECTIVE:
                return weights
            log_ratios = log_ratios / 2

    def _baselines(self, played: Sequence[Trajectory], weights: Array) -> Array:
        """Weighted mean return from each action on, over the episodes that got there."""
        longest = max(len(one.returns) for one in played)
        means = []
        for action in range(longest):
            there = [i for i, one in enumerate(played) if len(one.returns) > action]
            values = [played[i].returns[action] for i in there]
            means.append(np.average(values, weights=weights[there]))
        return np.array(means)

    def _reach(self, features_AF: Array) -> Array:
        """-σ·∂ξ/∂W, of each action: what the noise carries over is not moved by W; AF."""
        rho = self.settings.persistence
        reach_AF: Array = features_AF.copy()
        reach_AF[1:] = (features_AF[1:] - rho * features_AF[:-1]) / np.sqrt(1 - rho**2)
        return reach_AF

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"weights": self.weights.tolist(), "spread": self.spread.tolist()}

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], settings: PolicySettings = PolicySettings()
    ) -> Policy:
        """Inverse of `to_dict`."""
        return cls(np.array(raw["weights"]), np.array(raw["spread"]), settings)


class Explorer:
    """An actor that explores around a policy; one for each episode."""

    def __init__(self, policy: Policy, generator: np.random.Generator) -> None:
        self.policy, self.generator = policy, generator
        self._noise = np.zeros_like(policy.spread)

    def __call__(self, state: State) -> Array:
        rho = self.policy.settings.persistence
        xi_K = self.generator.standard_normal(len(self.policy.spread))
        if state.number == 0:
            self._noise = xi_K
        else:
            self._noise = rho * self._noise + np.sqrt(1 - rho**2) * xi_K
        place_K: Array = self.policy.mean(state) + self.policy.spread * self._noise
        return place_K


def features(state: State) -> Array:
    """φ(s): 1, the share of steps done, forget and retain, each moved to [-½, ½]; of shape F."""
    seen = (state.share, state.point.forget, state.point.retain)
    return np.array([1.0, *(value - 0.5 for value in seen)])
