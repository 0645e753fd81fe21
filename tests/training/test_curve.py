"""What a record keeps of a run's log."""

from __future__ import annotations

import pytest

from expunge.training.log import StepLog, curve


def entry(step: int) -> StepLog:
    point = (0.5, 0.9) if step % 5 == 4 else None
    return StepLog(step, 0, float(step), 0.0, 0.0, 1.0, 0.1, {"cos": 0.5}, {"lr": 0.01}, point)


@pytest.mark.parametrize(
    ("n", "kept"), [(0, 0), (1, 1), (80, 80), (100, 100), (101, 100), (750, 100)]
)
def test_a_curve_reaches_over_the_whole_run(n: int, kept: int) -> None:
    drawn = curve([entry(step) for step in range(n)])
    assert len(drawn["step"]) == len(drawn["loss"]) == kept
    assert drawn["step"] == sorted(set(drawn["step"]))
    if n:
        assert drawn["step"][-1] == n - 1 and drawn["step"][0] <= n / 100
    assert len(drawn["points"]) == n // 5
