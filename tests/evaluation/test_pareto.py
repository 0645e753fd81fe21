"""Hypervolume against sums by hand and a count of cells; fronts against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.evaluation.pareto import contributions, front, hypervolume
from expunge.training.watch import Point

# Hundredths: sets then hold ties, duplicates and points on the floor.
AXIS = st.integers(0, 100).map(lambda n: n / 100)
SETS = st.lists(st.builds(Point, AXIS, AXIS), max_size=8)
FLOORS = st.sampled_from([0.0, 0.25, 0.5, 0.9])


def covered(points: list[Point], floor: float) -> float:
    """Share of the cells of a 100·100 grid above the floor that some point dominates."""
    middles = (np.arange(100) + 0.5) / 100
    forget, retain = np.meshgrid(middles, floor + (1 - floor) * middles)
    held = np.zeros_like(forget, dtype=bool)
    for point in points:
        held |= (forget < point.forget) & (retain < point.retain)
    return float(held.mean())


def dominates(one: Point, other: Point) -> bool:
    return one != other and one.forget >= other.forget and one.retain >= other.retain


@pytest.mark.parametrize(
    ("points", "floor", "expected"),
    [
        ([], 0.9, 0.0),
        ([(0.5, 0.5)], 0.0, 0.25),
        ([(0.5, 0.95)], 0.9, 0.25),
        ([(1.0, 1.0)], 0.9, 1.0),
        # A staircase: 0.2·0.9 + 0.4·0.6 + 0.3·0.3.
        ([(0.2, 0.9), (0.6, 0.6), (0.9, 0.3)], 0.0, 0.51),
        # Above 0.5 the same is, scaled, 0.2·0.8 + 0.4·0.2.
        ([(0.2, 0.9), (0.6, 0.6), (0.9, 0.3)], 0.5, 0.24),
        # A dominated point and a duplicate add nothing.
        ([(0.5, 0.5), (0.4, 0.4), (0.5, 0.5)], 0.0, 0.25),
    ],
)
def test_hypervolume_by_hand(
    points: list[tuple[float, float]], floor: float, expected: float
) -> None:
    assert hypervolume([Point(*p) for p in points], floor) == pytest.approx(expected)


@pytest.mark.parametrize("outside", [(0.0, 1.0), (-0.5, 1.0), (1.0, 0.9), (1.0, 0.0), (0.0, 0.0)])
def test_points_outside_are_ignored(outside: tuple[float, float]) -> None:
    inside = [Point(0.5, 0.95), Point(0.2, 1.0)]
    assert hypervolume([Point(*outside)], 0.9) == 0.0
    assert hypervolume([*inside, Point(*outside)], 0.9) == hypervolume(inside, 0.9) > 0


@given(points=SETS)
def test_hypervolume_is_the_share_of_cells_covered(points: list[Point]) -> None:
    assert hypervolume(points, 0.0) == pytest.approx(covered(points, 0.0), abs=1e-9)


@given(points=SETS, floor=FLOORS)
def test_hypervolume_is_a_share(points: list[Point], floor: float) -> None:
    """Within a cell's width of the grid where the floor does not fall on its lines."""
    assert 0.0 <= hypervolume(points, floor) <= 1.0 + 1e-12
    assert hypervolume(points, floor) == pytest.approx(covered(points, floor), abs=0.02)


@given(point=st.builds(Point, AXIS, AXIS), floor=FLOORS)
def test_of_one_point_it_is_its_area(point: Point, floor: float) -> None:
    assert hypervolume([point], floor) == pytest.approx(point.area(floor))


@given(points=SETS, more=st.builds(Point, AXIS, AXIS), floor=FLOORS)
def test_a_further_point_takes_nothing_away(points: list[Point], more: Point, floor: float) -> None:
    grown = hypervolume([*points, more], floor)
    assert grown >= hypervolume(points, floor) - 1e-12
    if any(dominates(p, more) or p == more for p in points):
        assert grown == pytest.approx(hypervolume(points, floor))


@given(points=SETS)
def test_the_front_is_what_nothing_dominates(points: list[Point]) -> None:
    expected = {
        index
        for index, point in enumerate(points)
        if not any(dominates(other, point) for other in points) and point not in points[:index]
    }
    found = front(points)
    assert set(found) == expected and len(found) == len(expected)
    assert [points[i].forget for i in found] == sorted(points[i].forget for i in found)


def test_ties_and_duplicates_by_hand() -> None:
    """Of equal points the first; one that is equal on one axis and worse on the other goes."""
    given_points = [(0.5, 0.5), (0.5, 0.5), (0.5, 0.4), (0.4, 0.9), (0.3, 0.9), (0.4, 0.9)]
    assert front([Point(*p) for p in given_points]) == [3, 0]
    assert front([]) == []


@given(points=SETS, floor=FLOORS)
def test_contributions_add_up_to_no_more_than_the_whole(points: list[Point], floor: float) -> None:
    shares = contributions(points, floor)
    assert len(shares) == len(points) and all(share >= -1e-12 for share in shares)
    assert sum(shares) <= hypervolume(points, floor) + 1e-9
    kept = set(front(points))
    for index, share in enumerate(shares):
        if index not in kept or points.count(points[index]) > 1:
            assert share == pytest.approx(0.0, abs=1e-12)


def test_contributions_by_hand() -> None:
    points = [Point(0.2, 0.9), Point(0.6, 0.6), Point(0.9, 0.3)]
    assert contributions(points, 0.0) == pytest.approx([0.2 * 0.3, 0.4 * 0.3, 0.3 * 0.3])
    assert contributions([Point(0.5, 0.5)], 0.0) == pytest.approx([0.25])
    assert contributions([], 0.0) == []
