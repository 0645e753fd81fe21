"""From rows and labels to a hyperplane, and how well it parts rows it has not seen.

Shapes: S rows, D hidden size. Labels: true is toxic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri

Floats = NDArray[np.floating]
Interval = tuple[float, float]
# Weight of the data against the ridge, in standardised units. From here to 100 times as much, the
# held-out accuracy on small models moves within its interval; the ridge steadies the direction.
INVERSE_RIDGE = 0.01
ITERATIONS = 500
Z = float(ndtri(0.975))


@dataclass(frozen=True)
class Plane:
    """``rows @ weight_D + bias > 0``: toxic. The weight is a unit vector, or all zeros."""

    weight_D: NDArray[np.float64]
    bias: float

    @classmethod
    def of(cls, weight_D: Floats, bias: float) -> Plane:
        """The plane scaled to a unit weight; zero stays zero."""
        norm = float(np.linalg.norm(weight_D.astype(np.float64)))
        return cls(weight_D.astype(np.float64) / (norm or 1.0), bias / (norm or 1.0))

    def scores(self, rows_SD: Floats) -> Floats:
        """Signed distances of the rows, S."""
        return np.asarray(rows_SD @ self.weight_D.astype(rows_SD.dtype) + self.bias)


def mean_difference(neutral_D: Floats, toxic_D: Floats) -> Plane:
    """From the mean of one class to that of the other; the bias puts the cut midway."""
    weight_D = toxic_D - neutral_D
    return Plane.of(weight_D, -float(weight_D @ (toxic_D + neutral_D)) / 2)


def logistic(rows_SD: Floats, labels_S: NDArray[np.bool_]) -> Plane:
    """L2-regularised logistic regression, both classes weighing the same."""
    from sklearn.linear_model import LogisticRegression

    # Standardised, or a few huge dimensions of the residual stream would slow the solver down. By
    # the spread within the classes: that of all rows holds the difference itself, and the ridge
    # would then turn the direction away from it.
    mean_D = rows_SD.mean(0, dtype=np.float64).astype(rows_SD.dtype)
    variances = [rows_SD[labels_S == side].var(0, dtype=np.float64) for side in (False, True)]
    scale_D = np.sqrt(np.mean(variances, 0)).astype(rows_SD.dtype)
    scale_D[scale_D == 0] = 1
    fitted = LogisticRegression(C=INVERSE_RIDGE, class_weight="balanced", max_iter=ITERATIONS).fit(
        (rows_SD - mean_D) / scale_D, labels_S
    )
    weight_D = fitted.coef_[0].astype(np.float64) / scale_D
    return Plane.of(weight_D, float(fitted.intercept_[0]) - float(weight_D @ mean_D))


def discriminant(rows_SD: Floats, labels_S: NDArray[np.bool_]) -> Plane:
    """Linear discriminant analysis with Ledoit and Wolf's shrinkage of the covariance."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5]).fit(
        rows_SD, labels_S
    )
    return Plane.of(fitted.coef_[0], float(fitted.intercept_[0]))


def accuracy(scores_S: Floats, labels_S: NDArray[np.bool_]) -> float:
    """Share of rows on the right side."""
    return float(((scores_S > 0) == labels_S).mean())


def auroc(scores_S: Floats, labels_S: NDArray[np.bool_]) -> float:
    """Chance that a toxic row scores above a neutral one; ties count half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels_S, scores_S))


def accuracy_interval(value: float, n: int) -> Interval:
    """Wilson's (1927) 95 % interval of a fraction of ``n``."""
    return _score_interval(value, lambda p: p * (1 - p) / n)


def auroc_interval(value: float, neutral: int, toxic: int) -> Interval:
    """95 % interval of an AUROC from so many neutral and toxic examples.

    Hanley and McNeil's (1982) variance, taken at the bounds and not at the estimate: Newcombe's
    (2006) method 5, which unlike theirs has a width when the estimate is 1.
    """
    mean = (neutral + toxic) / 2 - 1

    def variance(area: float) -> float:
        spread = 1 + mean * (1 - area) / (2 - area) + mean * area / (1 + area)
        return area * (1 - area) * spread / (neutral * toxic)

    return _score_interval(value, variance)


def _score_interval(value: float, variance: Callable[[float], float]) -> Interval:
    """All parameters whose own standard error reaches as far as ``value``, within 0 and 1."""

    def excess(parameter: float) -> float:
        return abs(value - parameter) - Z * math.sqrt(variance(parameter))

    # At `value` the excess is negative, at 0 and 1 (no variance there) positive.
    low = 0.0 if value <= 0 else float(brentq(excess, 0.0, value - 1e-12))
    high = 1.0 if value >= 1 else float(brentq(excess, value + 1e-12, 1.0))
    return low, high
