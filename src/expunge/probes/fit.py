"""Fit a probe at every layer asked for, in one pass over the texts.

Running sums give all means. Logistic regression, discriminant analysis, the spread and the held-out
numbers need rows: a bounded number of them is kept (`rows.py`), so the activations held in memory
do not grow with the texts; token ids and their bookkeeping do.

Shapes: B texts of a group, T tokens, D hidden size, S kept rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from expunge.errors import DataError, ModelError, RecipeError
from expunge.model.structure import Structure
from expunge.probes import linear
from expunge.probes.linear import Plane
from expunge.probes.probe import Pooling, Probe, ProbeKind
from expunge.probes.rows import Cut, Draw, Kept, Sums, cut, distinct, tokens, whole
from expunge.probes.stream import Pass, stream
from expunge.registry import nearest

# Tokens of each class that the spread is estimated from: its standard error is then about 2 %.
SPREAD_ROWS = 1024
FEWEST_TEXTS, FEWEST_ROWS = 4, 8

Labels = NDArray[np.bool_]


def fit_probes(
    model: nn.Module,
    structure: Structure,
    toxic: Sequence[Sequence[int]],
    neutral: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    kind: ProbeKind = "logistic",
    pooling: Pooling = "mean",
    paired: bool = False,
    held_out: float = 0.2,
    seed: int = 0,
    max_rows: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Probe, ...]:
    """Probes that tell toxic from neutral texts, one for each layer, ascending.

    Sources: linear probes on mean-pooled hidden states, Lee et al. 2024 (arXiv:2401.01967); the
    control with shuffled labels after Hewitt and Liang 2019 (arXiv:1909.03368).

    Both classes weigh the same, whatever their sizes. Padding and first tokens never count. All
    tokens of a text share its side of the cut and, in the control, its shuffled label; held-out
    texts are shuffled too. Accuracy has Wilson's interval and AUROC Hanley and McNeil's in
    Newcombe's form, with texts as the units.

    Args:
        model, structure: the model, opened at least up to the deepest layer, and its parts.
        toxic, neutral: token ids of each text, unpadded, at least two tokens each.
        layers: 0-based decoder layers.
        kind: ``logistic``: ridge logistic regression; ``mean-difference``: between the class means,
            cut midway; ``lda``: linear discriminant with Ledoit-Wolf shrinkage.
        pooling: ``mean``: a row is the mean over a text's tokens; ``token``: each token is a row.
        paired: texts of the same index are two wordings of one content and stay together.
        held_out: share of the texts, or pairs, that accuracy and AUROC are measured on.
        seed: of the cut, the drawn rows and the shuffled labels.
        max_rows: most rows, of both classes together, that are kept to fit on, and again to
            measure on; takes up to 2 × layers × max_rows × D × 4 bytes. Mean-difference keeps none
            to fit on, for it needs sums only.
        on_progress: called with the number of texts just done, both classes.

    Raises:
        DataError: a class is missing or has fewer than 4 distinct texts, pairs do not match up, a
            text is too short, or the classes have the same activations.
        RecipeError: a setting is unknown or out of range.
        ModelError: activations are not finite, or a layer never ran.
    """
    _check_settings(kind, pooling, held_out, max_rows)
    _check_texts(toxic, neutral, paired)
    wanted = sorted(set(layers))
    texts = [*neutral, *toxic]
    sides = cut(neutral, toxic, paired=paired, share=held_out, seed=seed)
    plan = _plan(texts, len(neutral), sides, kind, pooling, max_rows, seed)
    reading = _Reading(plan, kind, pooling, wanted, structure.hidden_size)
    for passed in stream(model, structure, texts, wanted, on_progress=on_progress):
        reading.read(passed)
        del passed  # or this group would still be held while the next is computed
    return tuple(_fit_layer(reading, layer) for layer in wanted)


@dataclass(frozen=True)
class _Plan:
    """What is read from the pass, decided before it; texts are numbered neutral first.

    Attributes:
        lengths: tokens of each text, the first included.
        toxic: labels of all texts.
        shuffled: the same, shuffled within the training texts and within those measured on.
        train: whether a text is fitted on.
        fitted: rows to fit on; None where sums are enough.
        single: training tokens for the spread.
        held: rows to measure on.
    """

    lengths: NDArray[np.int64]
    toxic: Labels
    shuffled: Labels
    train: Labels
    fitted: Draw | None
    single: Draw
    held: Draw


def _plan(
    texts: Sequence[Sequence[int]],
    n_neutral: int,
    sides: Cut,
    kind: ProbeKind,
    pooling: Pooling,
    max_rows: int,
    seed: int,
) -> _Plan:
    generator = np.random.default_rng(seed)
    lengths = np.array([len(ids) for ids in texts], np.int64)
    toxic = np.arange(len(texts)) >= n_neutral
    train = (sides.train[0], sides.train[1] + n_neutral)
    # Measured on as many texts of each class, so that chance is 0.5. The order of a cut is that of
    # a hash, so the first ones are a uniform draw, and in pairs the same pairs.
    half = max_rows // 2
    size = min(half, len(sides.held[0]), len(sides.held[1]))
    held = (sides.held[0][:size], sides.held[1][:size] + n_neutral)
    shuffled = toxic.copy()
    for part in (np.concatenate(train), np.concatenate(held)):
        shuffled[part] = generator.permutation(toxic[part])
    single = tokens(train, lengths, SPREAD_ROWS, generator)
    fitted = None
    if pooling == "token":
        counted = [int((lengths[own] - 1).sum()) for own in held]
        measured = tokens(held, lengths, min(half, *counted), generator)
        if kind != "mean-difference":
            fitted = tokens(train, lengths, half, generator)
    else:
        measured = whole(np.concatenate(held))
        if kind != "mean-difference":
            fitted = whole(np.concatenate([own[:half] for own in train]))
    is_train = np.zeros(len(texts), bool)
    is_train[np.concatenate(train)] = True
    return _Plan(lengths, toxic, shuffled, is_train, fitted, single, measured)


class _Reading:
    """Sums and kept rows of all layers."""

    def __init__(
        self, plan: _Plan, kind: ProbeKind, pooling: Pooling, layers: Sequence[int], width: int
    ) -> None:
        self.plan, self.kind, self.pooling = plan, kind, pooling
        self.single = Kept(plan.single, layers, width)
        self.held = Kept(plan.held, layers, width)
        self.fitted = None if plan.fitted is None else Kept(plan.fitted, layers, width)
        self.sums = Sums(self._weights(), layers, width)

    def read(self, passed: Pass) -> None:
        """Take what is wanted from one group of texts."""
        kept = [part for part in (self.single, self.held, self.fitted) if part is not None]
        for part in kept:
            part.turn_to(passed.indices)
        mask_BT1, count_B1 = passed.mask_BT[..., None], passed.mask_BT.sum(1, keepdim=True)
        for layer, acts_BTD in passed.acts.items():
            # Replaced, not multiplied: 0·NaN of a padded place would be NaN.
            sums_BD = torch.where(mask_BT1, acts_BTD, 0).sum(1, dtype=torch.float32)
            self.sums.add(layer, passed.indices, sums_BD)
            means_BD = sums_BD / count_B1
            for part in kept:
                part.take(layer, acts_BTD, means_BD)

    def _weights(self) -> dict[str, NDArray[np.float64]]:
        """Weights of the texts' token sums that give the means wanted.

        ``tokens`` means of a class's tokens, ``rows`` of its rows, ``control`` the same under the
        shuffled labels.
        """
        plan = self.plan
        counted = (plan.lengths - 1).astype(np.float64)
        # What one row weighs: a text's mean is its sum over its length.
        row = np.ones_like(counted) if self.pooling == "token" else 1 / counted
        weights = {}
        for name, each, labels in (
            ("tokens", np.ones_like(counted), plan.toxic),
            ("rows", row, plan.toxic),
            ("control", row, plan.shuffled),
        ):
            for side in (False, True):
                own = np.where(plan.train & (labels == side), each, 0.0)
                weights[f"{name} {side}"] = own / (own * counted).sum()
        return weights

    def means(self, layer: int, name: str) -> tuple[linear.Floats, linear.Floats]:
        """Neutral and toxic mean D of a layer."""
        return self.sums.of(layer, f"{name} {False}"), self.sums.of(layer, f"{name} {True}")

    def plane(self, layer: int, *, control: bool) -> Plane:
        """The fitted hyperplane, with ``control`` on shuffled labels."""
        if self.fitted is None:
            return linear.mean_difference(*self.means(layer, "control" if control else "rows"))
        labels = (self.plan.shuffled if control else self.plan.toxic)[self.fitted.draw.texts_S]
        fit = linear.logistic if self.kind == "logistic" else linear.discriminant
        return fit(self.fitted.rows[layer].numpy(), labels)


def _fit_layer(reading: _Reading, layer: int) -> Probe:
    plan, held_SD = reading.plan, reading.held.rows[layer].numpy()
    _check_finite(reading, layer)
    plane = reading.plane(layer, control=False)
    if not plane.weight_D.any():
        raise DataError(
            what=f"Toxic and neutral texts have the same activations at layer {layer}",
            got="no difference between the classes",
            allowed="two classes of different texts",
            fix="check that the toxic and the neutral texts are not the same",
        )
    control = reading.plane(layer, control=True)
    texts = plan.held.texts_S
    scores_S, labels_S = plane.scores(held_SD), plan.toxic[texts]
    accuracy, auroc = linear.accuracy(scores_S, labels_S), linear.auroc(scores_S, labels_S)
    units = plan.toxic[plan.held.distinct_texts]
    low, high = linear.accuracy_interval(accuracy, len(units))
    auroc_low, auroc_high = linear.auroc_interval(auroc, int((~units).sum()), int(units.sum()))
    neutral_D, toxic_D = reading.means(layer, "tokens")
    return Probe(
        layer=layer,
        kind=reading.kind,
        pooling=reading.pooling,
        direction_D=torch.from_numpy(plane.weight_D),
        difference_D=torch.from_numpy(toxic_D - neutral_D),
        bias=plane.bias,
        neutral=float(neutral_D @ plane.weight_D),
        toxic=float(toxic_D @ plane.weight_D),
        spread=_spread(reading, layer, plane),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        auroc=auroc,
        auroc_low=auroc_low,
        auroc_high=auroc_high,
        n=len(units),
        control=linear.accuracy(control.scores(held_SD), plan.shuffled[texts]),
    )


def _spread(reading: _Reading, layer: int, plane: Plane) -> float:
    """Standard deviation of tokens' projections around their own class's mean."""
    projected_S = reading.single.rows[layer].numpy().astype(np.float64) @ plane.weight_D
    labels_S = reading.plan.toxic[reading.plan.single.texts_S]
    variances = [projected_S[labels_S == side].var() for side in (False, True)]
    return float(np.sqrt(np.mean(variances)))


def _check_finite(reading: _Reading, layer: int) -> None:
    finite = bool(reading.held.rows[layer].isfinite().all()) and all(
        np.isfinite(mean_D).all() for mean_D in reading.means(layer, "tokens")
    )
    if not finite:
        raise ModelError(
            what=f"Activations after layer {layer} are not finite",
            got="infinity or NaN",
            allowed="finite activations",
            fix="use dtype bfloat16 or float32; float16 overflows in some models",
        )


def _check_settings(kind: str, pooling: str, held_out: float, max_rows: int) -> None:
    for name, got, known in (
        ("kind", kind, get_args(ProbeKind)),
        ("pooling", pooling, get_args(Pooling)),
    ):
        if got not in known:
            raise RecipeError(
                what=f"Unknown {name} of probe",
                got=repr(got),
                allowed=", ".join(known),
                fix=nearest(got, known),
            )
    if not 0 < held_out < 1:
        raise RecipeError(
            what="The held-out share of the texts is out of range",
            got=f"{held_out:g}",
            allowed="above 0 and below 1",
            fix="use 0.2",
        )
    if max_rows < FEWEST_ROWS:
        raise RecipeError(
            what="max_rows is out of range",
            got=str(max_rows),
            allowed=f"a whole number from {FEWEST_ROWS}",
            fix="use 4096",
        )


def _check_texts(
    toxic: Sequence[Sequence[int]], neutral: Sequence[Sequence[int]], paired: bool
) -> None:
    for name, texts in (("toxic", toxic), ("neutral", neutral)):
        if not texts:
            raise DataError(
                what=f"There is no {name} text: a probe needs both classes",
                got=f"{len(toxic)} toxic and {len(neutral)} neutral texts",
                allowed="texts of both classes",
                fix="give pairs, or labelled texts of both classes",
            )
        if distinct(texts) < FEWEST_TEXTS:
            raise DataError(
                what=f"There are too few {name} texts to fit a probe and to hold some out",
                got=f"{distinct(texts)} distinct ones",
                allowed=f"at least {FEWEST_TEXTS} of each class; some hundreds to be of use",
                fix="give more texts",
            )
    if paired and len(toxic) != len(neutral):
        raise DataError(
            what="Toxic and neutral texts are said to be pairs but do not match up",
            got=f"{len(toxic)} toxic and {len(neutral)} neutral texts",
            allowed="as many of each, in the same order",
            fix="give complete pairs, or set paired to false",
        )
