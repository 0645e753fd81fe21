"""The policy: its score is the gradient of its density, its step the expected one, its noise AR(1).

Worlds here are functions of the places alone, with gradients known by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.training.policy import (
    LARGEST_INNOVATION,
    LEAST_SPREAD,
    N_FEATURES,
    Explorer,
    Policy,
    PolicySettings,
    Trajectory,
    features,
)
from expunge.training.tradeoff import START, State
from expunge.training.watch import Point

# Its features are 1, 0, 0, 0, so that a mean is one weight.
PLAIN = Point(0.5, 0.5)


def states(n: int) -> list[State]:
    return [State(0.5, PLAIN, number) for number in range(n)]


def play(
    policy: Policy,
    gains: Callable[[Any], Sequence[float]],
    seed: Any,
    actions: int = 1,
) -> Trajectory:
    """An episode of ``actions`` actions; gains: places AK -> what each action brought."""
    explorer = Explorer(policy, np.random.default_rng(seed))
    places_AK = np.array([explorer(state) for state in states(actions)])
    returns_A = np.cumsum(np.array(gains(places_AK))[::-1])[::-1]
    return trajectory(policy, seen(states(actions)), places_AK, returns_A)


def seen(some: Sequence[State]) -> Any:
    """φ of each state, AF."""
    return np.array([features(state) for state in some])


def trajectory(policy: Policy, features_AF: Any, places_AK: Any, returns_A: Any) -> Trajectory:
    """An episode that this policy played."""
    density = policy.log_density(features_AF, places_AK)
    return Trajectory(features_AF, places_AK, np.array(returns_A), density)


def once(**changes: Any) -> PolicySettings:
    """Settings of a single step of size one, however few the episodes."""
    plain = {"rate": 1.0, "spread_rate": 0.2, "passes": 1, "warm_up": 1}
    return PolicySettings(**{**plain, **changes})


def batch(policy: Policy, gains: Any, n: int, seed: int = 0, actions: int = 1) -> list[Trajectory]:
    return [play(policy, gains, [seed, i], actions) for i in range(n)]


def valley(target: float) -> Callable[[Any], list[float]]:
    return lambda places_AK: [-float(((row - target) ** 2).sum()) for row in places_AK]


def plain_mean(policy: Policy) -> Any:
    return policy.mean(State(0.5, PLAIN, 0))


# ---- the mean and what is seen


def test_features_by_hand() -> None:
    assert features(State(0.25, Point(0.7, 0.9), 3)).tolist() == pytest.approx([1, -0.25, 0.2, 0.4])
    assert features(State(0.0, START, 0)).tolist() == [1.0, -0.5, -0.5, 0.5]


@given(share=st.floats(0, 1), forget=st.floats(0, 1), retain=st.floats(0, 1))
def test_a_starting_policy_means_the_start_whatever_it_sees(
    share: float, forget: float, retain: float
) -> None:
    policy = Policy.starting([0.3, -2.0])
    assert policy.mean(State(share, Point(forget, retain), 4)).tolist() == [0.3, -2.0]


def test_json_form_comes_back() -> None:
    policy = Policy.starting([0.3, -2.0]).updated(batch(Policy.starting([0.3, -2.0]), valley(1), 5))
    back = Policy.from_dict(policy.to_dict())
    assert np.array_equal(back.weights, policy.weights)
    assert np.array_equal(back.spread, policy.spread)


# ---- noise


def noises(rho: float, actions: int, knobs: int = 4000) -> Any:
    """Noise of some actions in units of the spread, AK: knobs stand for repeats."""
    policy = Policy.starting([0.7] * knobs, PolicySettings(spread=0.4, persistence=rho))
    explorer = Explorer(policy, np.random.default_rng(3))
    return (np.array([explorer(state) for state in states(actions)]) - 0.7) / 0.4


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_noise_has_unit_variance_and_the_stated_correlation(rho: float) -> None:
    found_AK = noises(rho, 5)
    assert found_AK.var(1) == pytest.approx(np.ones(5), abs=0.1)
    correlation = np.corrcoef(found_AK)
    for a in range(5):
        for b in range(5):
            assert correlation[a, b] == pytest.approx(rho ** abs(a - b), abs=0.06)


def test_one_seed_is_one_exploration() -> None:
    policy = Policy.starting([0.3, -2.0])

    def places(seed: int) -> Any:
        explorer = Explorer(policy, np.random.default_rng(seed))
        return [explorer(state).tolist() for state in states(4)]

    assert places(1) == places(1)
    assert places(1) != places(2)


def test_what_keeps_to_the_mean_surprises_nobody() -> None:
    policy = Policy.starting([0.3, -2.0])
    for actor in (policy.mean, policy.within([])):
        assert [actor(state).tolist() for state in states(3)] == [[0.3, -2.0]] * 3
    places_AK = np.array([[0.3, -2.0]] * 3)
    assert not policy.innovations(seen(states(3)), places_AK).any()


# ---- the score


def log_density(places_A: Any, mean_A: Any, spread: float, rho: float) -> float:
    """Of one knob's places, by the joint Gaussian: an oracle that knows no innovations."""
    n = len(places_A)
    covariance = spread**2 * rho ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    away = np.asarray(places_A) - mean_A
    return float(
        -0.5 * away @ np.linalg.solve(covariance, away)
        - 0.5 * np.linalg.slogdet(covariance)[1]
        - n / 2 * math.log(2 * math.pi)
    )


@settings(deadline=None)
@given(
    rho=st.floats(0, 0.97),
    spread=st.floats(0.2, 2),
    mean=st.floats(-3, 3),
    actions=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_scores_are_the_gradient_of_the_log_density(
    rho: float, spread: float, mean: float, actions: int, seed: int
) -> None:
    """In every weight, and (ξ² − 1) in the logarithm of the spread, by central differences."""
    policy = Policy.starting([mean], PolicySettings(spread=spread, persistence=rho))
    explorer = Explorer(policy, np.random.default_rng(seed))
    shares = [State(a / actions, Point(0.1 * a, 1 - 0.05 * a), a) for a in range(actions)]
    places_A1, phi_AF = np.array([explorer(state) for state in shares]), seen(shares)
    places_A = places_A1[:, 0]
    xi_A1 = policy.innovations(phi_AF, places_A1)
    score_F = (xi_A1 * policy._reach(phi_AF)).sum(axis=0)
    h = 1e-4
    for place in range(N_FEATURES):
        up, down = (
            log_density(places_A, mean + sign * h * phi_AF[:, place], spread, rho)
            for sign in (1, -1)
        )
        expected = spread * (up - down) / (2 * h)
        assert float(score_F[place]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    up, down = (log_density(places_A, mean, spread * math.exp(s * h), rho) for s in (1, -1))
    assert float((xi_A1**2 - 1).sum()) == pytest.approx((up - down) / (2 * h), rel=1e-4, abs=1e-4)


@given(seed=st.integers(0, 100), shift=st.floats(-1, 1))
def test_densities_differ_between_policies_as_joint_gaussians_do(seed: int, shift: float) -> None:
    """What weighs old episodes: the ratio of the two policies' densities of the same places."""
    rho = PolicySettings().persistence
    one, other = (
        Policy.starting([mean], PolicySettings(spread=spread))
        for mean, spread in ((0.3, 0.5), (0.3 + shift, 0.8))
    )
    explorer = Explorer(one, np.random.default_rng(seed))
    places_A1 = np.array([explorer(state) for state in states(3)])
    ratio = other.log_density(seen(states(3)), places_A1) - one.log_density(
        seen(states(3)), places_A1
    )
    expected = log_density(places_A1[:, 0], 0.3 + shift, 0.8, rho) - log_density(
        places_A1[:, 0], 0.3, 0.5, rho
    )
    assert ratio == pytest.approx(expected, rel=1e-6, abs=1e-6)


# ---- the expected step


@pytest.mark.parametrize(("away", "spread"), [(0.0, 0.5), (0.8, 0.5), (-2.0, 1.0)])
def test_the_expected_step_in_a_valley(away: float, spread: float) -> None:
    """For R = −(d + σξ)²: Cov(R, ξ) = −2dσ, Cov(R, ξ²) = −2σ², Var R = 4d²σ² + 2σ⁴."""
    policy = Policy.starting([away], once(spread=spread))
    after = policy.updated(batch(policy, valley(0.0), 12_000))
    deviation = math.sqrt(4 * away**2 * spread**2 + 2 * spread**4)
    expected = spread * -2 * away * spread / deviation
    assert float(plain_mean(after)[0]) - away == pytest.approx(expected, abs=0.05 * spread)
    change = math.log(float(after.spread[0] / spread))
    rate = policy.settings.spread_rate
    assert change == pytest.approx(rate * -2 * spread**2 / deviation, abs=0.1 * rate)


def test_the_expected_step_of_several_actions() -> None:
    """For a gain of Σ c_a·place_a the gradient in a constant mean is Σ c_a, whatever the noise."""
    weights_A = np.array([1.0, -0.5, 2.0])
    policy = Policy.starting([0.4], once(spread=0.7))
    played = batch(policy, lambda places_AK: weights_A * places_AK[:, 0], 8000, actions=3)
    deviation = float(np.std([one.returns[0] for one in played]))
    after = policy.updated(played)
    expected = 0.7 * (0.7 * weights_A.sum()) / deviation
    assert float(plain_mean(after)[0]) - 0.4 == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("start", [-2.0, 3.0])
def test_small_batches_lead_to_the_optimum_over_seeds(start: float) -> None:
    ends = []
    for seed in range(8):
        policy = Policy.starting([start, start], once(spread=1.0))
        for round_number in range(12):
            policy = policy.updated(batch(policy, valley(0.5), 5, seed=100 * seed + round_number))
        ends.append(plain_mean(policy))
    assert abs(float(np.mean(ends)) - 0.5) < 0.35
    assert np.abs(np.array(ends) - 0.5).max() < abs(start - 0.5)


def hill(target: float) -> Callable[[Any], list[float]]:
    """A bump of width 1: round at its top, hollow far from it."""
    return lambda places_AK: [
        math.exp(-float(((row - target) ** 2).sum()) / 2) for row in places_AK
    ]


@pytest.mark.parametrize(("away", "grows"), [(0.0, False), (3.0, True)])
def test_the_spread_shrinks_on_a_hill_and_grows_far_from_it(away: float, grows: bool) -> None:
    policy = Policy.starting([away], once(spread=0.5))
    after = policy.updated(batch(policy, hill(0.0), 3000))
    assert (float(after.spread[0]) > 0.5) is grows


def test_the_spread_stays_within_its_bounds() -> None:
    eager = once(spread=0.5, spread_rate=30.0)
    for away, bound in ((0.0, LEAST_SPREAD), (3.0, 1.0)):
        policy = Policy.starting([away], eager)
        assert float(policy.updated(batch(policy, hill(0.0), 500)).spread[0]) == bound


def test_a_knob_without_effect_moves_less_than_one_with() -> None:
    policy = Policy.starting([2.0, 2.0], once())
    after = policy.updated(batch(policy, lambda places_AK: -(places_AK[:, 0] ** 2), 3000))
    moved = np.abs(plain_mean(after) - 2.0)
    assert moved[1] < 0.1 * moved[0]


# ---- the baseline


@given(value=st.floats(-1, 1), n=st.integers(2, 9), actions=st.integers(1, 3))
def test_equal_returns_teach_nothing(value: float, n: int, actions: int) -> None:
    """Whatever the value: the mean of equal numbers is rounded, and may differ from them."""
    policy = Policy.starting([0.3, -2.0], once())
    played = [
        replace(one, returns=np.full(actions, value))
        for one in batch(policy, valley(0.0), n, actions=actions)
    ]
    after = policy.updated(played)
    assert np.array_equal(after.weights, policy.weights)
    assert np.array_equal(after.spread, policy.spread)


@pytest.mark.parametrize("change", [lambda r: r + 5.0, lambda r: r - 0.3, lambda r: 40.0 * r])
def test_shifted_or_stretched_returns_teach_the_same(change: Callable[[Any], Any]) -> None:
    policy = Policy.starting([0.3, -2.0], once())
    played = batch(policy, valley(0.0), 5, actions=3)
    one = policy.updated(played)
    other = policy.updated([replace(t, returns=change(t.returns)) for t in played])
    assert one.weights != pytest.approx(policy.weights)
    assert other.weights == pytest.approx(one.weights)
    assert other.spread == pytest.approx(one.spread)


def test_an_update_by_hand() -> None:
    """Two episodes of one action, returns 1 and 3: their deviation is 1, advantages −1 and 1."""
    policy = Policy.starting([0.0], once(spread=0.5, rate=2.0, feedback=0.5))
    phi = np.array([[1.0, -0.5, 0.0, 0.5]])
    played = [
        trajectory(policy, phi, np.array([[0.2]]), [1.0]),
        trajectory(policy, phi, np.array([[0.6]]), [3.0]),
    ]
    after = policy.updated(played)
    # Places 0.4 and 1.2 spreads away: σ · rate · (−0.4 + 1.2) / 2 · φ, what is seen at half rate.
    assert after.weights[0].tolist() == pytest.approx([0.4, -0.1, 0.0, 0.1])
    # (−(0.16 − 1) + (1.44 − 1)) / 2 = 0.64
    assert float(after.spread[0]) == pytest.approx(0.5 * math.exp(0.2 * 0.64))


@pytest.mark.parametrize("away", [LARGEST_INNOVATION, 90.0, 1e6])
def test_an_episode_far_away_counts_no_more_than_one_at_the_limit(away: float) -> None:
    """It would throw the policy further still, and its spread beyond all numbers."""
    policy = Policy.starting([0.0], once(spread=0.5))
    phi = np.array([[1.0, -0.5, 0.0, 0.5]])
    played = [
        trajectory(policy, phi, np.array([[0.0]]), [1.0]),
        trajectory(policy, phi, np.array([[0.5 * away]]), [3.0]),
    ]
    # As likely under the policy as when it was played, so that its weight does not hide it.
    with np.errstate(all="raise"):
        after = policy.updated(played)
    assert after.weights[0, 0] == pytest.approx(0.5 * LARGEST_INNOVATION / 2)
    assert after.spread[0] == 1.0  # twice the first, as far as it goes


def test_an_action_that_one_episode_alone_took_teaches_nothing() -> None:
    """It has nothing to be compared with."""
    policy = Policy.starting([0.0], once())
    phi = np.array([[1.0, 0.0, 0.0, 0.0]])
    short = [trajectory(policy, phi, np.array([[x]]), [r]) for x, r in ((0.4, 1.0), (1.2, 3.0))]
    places_A1 = np.array([[1.2], [9.0]])
    longer = trajectory(policy, np.repeat(phi, 2, 0), places_A1, [3.0, 7.0])
    assert policy.updated([short[0], longer]).weights == pytest.approx(
        policy.updated(short).weights
    )


# ---- a run that goes beyond what was seen


def test_beyond_what_was_seen_the_mean_stays_at_the_edge() -> None:
    policy = replace(Policy.starting([0.0]), weights=np.array([[1.0, 0.0, 8.0, -4.0]]))
    shown = [State(0.0, Point(0.0, 1.0), 0), State(0.5, Point(0.6, 0.9), 1)]
    actor = policy.within([trajectory(policy, seen(shown), np.zeros((2, 1)), [1.0, 0.5])])
    for state in (*shown, State(0.3, Point(0.4, 0.95), 1)):
        assert actor(state) == pytest.approx(policy.mean(state))
    edge = policy.mean(State(0.5, Point(0.6, 0.9), 9))
    assert actor(State(0.5, Point(1.0, 0.2), 9)) == pytest.approx(edge)


# ---- what was played before


def test_nothing_is_learned_before_the_warm_up() -> None:
    policy = Policy.starting([2.0], PolicySettings(warm_up=5))
    played = batch(policy, valley(0.0), 5)
    assert policy.updated(played[:4]) is policy
    assert float(plain_mean(policy.updated(played))[0]) < 2.0


def test_episodes_of_another_policy_teach_the_gradient_of_this_one() -> None:
    """Weighed by the ratio of densities, they give the step that its own episodes would."""
    mine = Policy.starting([1.0], once(spread=0.5))
    near = Policy.starting([1.2], once(spread=0.55))
    own, others = (
        float(plain_mean(mine.updated(batch(by, valley(0.0), 20_000)))[0]) for by in (mine, near)
    )
    assert own < 0.8
    assert others == pytest.approx(own, abs=0.03)


def test_an_unlikely_episode_hardly_counts() -> None:
    policy = Policy.starting([0.0], once())
    played = batch(policy, valley(1.0), 6)
    far = Policy.starting([9.0], once())
    stray = play(far, valley(1.0), 1)
    with_it, without = (policy.updated(some).weights for some in ([*played, stray], played))
    assert with_it == pytest.approx(without, abs=1e-3)
