"""Fitting over the stream: hand sums, bounded rows, fair cuts, invariances, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from planted import PAD, WIDTH, Planted, texts

import tiny
from expunge.errors import DataError, ModelError, RecipeError
from expunge.model.boundaries import GROUP_TOKENS
from expunge.model.structure import find_structure
from expunge.probes import fit as room
from expunge.probes.fit import fit_probes
from expunge.probes.probe import Probe
from expunge.probes.rows import cut, tokens

KINDS = ["logistic", "mean-difference", "lda"]
POOLINGS = ["mean", "token"]


def fitted(
    n: int = 60, *, shift: float = 2.0, layers: tuple[int, ...] = (0,), **settings: Any
) -> tuple[Planted, tuple[Probe, ...]]:
    model = Planted(shift)
    both = texts(n, toxic=True), texts(n, toxic=False)
    return model, fit_probes(model, model.structure(), *both, layers=layers, **settings)


def means(model: Planted, ids: list[list[int]]) -> np.ndarray:
    """Mean vector of each text, without its first token."""
    return np.stack([model.embedding.weight[row[1:]].double().mean(0).numpy() for row in ids])


# ---- what is computed


def test_mean_difference_by_hand() -> None:
    toxic, neutral = texts(20, toxic=True), texts(30, toxic=False)
    model = Planted(1.0)
    (probe,) = fit_probes(
        model, model.structure(), toxic, neutral, layers=[0], kind="mean-difference"
    )
    sides = cut(neutral, toxic, paired=False, share=0.2, seed=0)
    train = [[neutral[i] for i in sides.train[0]], [toxic[i] for i in sides.train[1]]]
    held = [[neutral[i] for i in sides.held[0]][:4], [toxic[i] for i in sides.held[1]]]
    centres = [means(model, own).mean(0) for own in train]
    weight_D = (centres[1] - centres[0]) / np.linalg.norm(centres[1] - centres[0])
    np.testing.assert_allclose(probe.direction_D.numpy(), weight_D, atol=1e-5)
    assert probe.bias == pytest.approx(-weight_D @ (centres[0] + centres[1]) / 2, abs=1e-5)
    right = [
        (means(model, own) @ weight_D + probe.bias > 0) == side
        for side, own in enumerate(held)
        if own
    ]
    assert probe.accuracy == pytest.approx(np.concatenate(right).mean())
    assert probe.n == 8  # four held-out toxic texts, and as many neutral ones


@pytest.mark.parametrize("pooling", POOLINGS)
def test_levels_and_spread_are_those_of_tokens(pooling: Any) -> None:
    model, (probe,) = fitted(80, shift=3.0, pooling=pooling)
    sides = cut(texts(80, toxic=False), texts(80, toxic=True), paired=False, share=0.2, seed=0)
    found, centres = [], []
    for toxic, places in enumerate(sides.train):
        own = texts(80, toxic=bool(toxic))
        ids = [i for place in places for i in own[place][1:]]
        acts_ND = model.embedding.weight[ids].double().numpy()
        found.append(acts_ND @ probe.direction_D.numpy())
        centres.append(acts_ND.mean(0))
    # The difference of the classes is that of tokens too, whatever rows the probe was fitted on.
    np.testing.assert_allclose(probe.difference_D.numpy(), centres[1] - centres[0], atol=1e-5)
    rise = float(probe.direction_D @ probe.difference_D)
    assert rise == pytest.approx(probe.toxic - probe.neutral, abs=1e-4)
    assert probe.neutral == pytest.approx(found[0].mean(), abs=1e-4)
    assert probe.toxic == pytest.approx(found[1].mean(), abs=1e-4)
    # All tokens fit into the sample here, so the spread is exact.
    expected = np.sqrt((found[0].var() + found[1].var()) / 2)
    assert probe.spread == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_score_parts_the_classes(kind: Any, pooling: Any) -> None:
    model, (probe,) = fitted(shift=5.0, kind=kind, pooling=pooling)
    for toxic in (True, False):
        ids = [i for row in texts(40, toxic=toxic, seed=9) for i in row[1:]]
        assert ((probe.score(model.embedding.weight[ids]) > 0) == toxic).float().mean() > 0.95


def test_the_same_seed_gives_the_same_probes_and_another_another_cut() -> None:
    one, again, other = (fitted(seed=seed)[1] for seed in (0, 0, 1))
    assert one == again
    assert not torch.equal(one[0].direction_D, other[0].direction_D)


def test_layers_come_once_and_ascending() -> None:
    _, probes = fitted(layers=(1, 0, 1))
    assert [probe.layer for probe in probes] == [0, 1]


def test_progress_counts_the_texts_of_both_classes() -> None:
    done: list[int] = []
    fitted(30, on_progress=done.append)
    assert sum(done) == 60


# ---- invariances


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_groups_change_nothing(
    kind: Any, pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.tiny_model("qwen2")
    structure = find_structure(model)
    # Random texts have no classes: give each its own half of the vocabulary.
    neutral = [[i % 30 + 3 for i in ids] for ids in tiny.texts(40)]
    toxic = [[i % 30 + 33 for i in ids] for ids in tiny.texts(40, seed=1)]

    def probes() -> tuple[Probe, ...]:
        given = {"layers": [1, 3], "kind": kind, "pooling": pooling}
        return fit_probes(model, structure, toxic, neutral, **given)

    padded = probes()
    monkeypatch.setitem(GROUP_TOKENS, "cpu", 1)  # each text alone, without padding
    for one, other in zip(padded, probes(), strict=True):
        # A solver stops within its tolerance, wherever that is.
        torch.testing.assert_close(one.direction_D, other.direction_D, atol=2e-3, rtol=0)
        assert one.bias == pytest.approx(other.bias, abs=1e-2)
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.07)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_nan_in_padding_and_first_tokens_stays_there(pooling: Any) -> None:
    model, (probe,) = fitted(pooling=pooling)
    assert model.embedding.weight[[PAD, Planted.FIRST]].isnan().all()
    assert probe.direction_D.isfinite().all() and probe.accuracy > 0.5


def test_the_order_of_the_texts_does_not_matter() -> None:
    model = Planted(1.0)
    toxic, neutral = texts(50, toxic=True), texts(50, toxic=False)
    given = {"layers": [0], "kind": "mean-difference", "paired": True}
    (one,) = fit_probes(model, model.structure(), toxic, neutral, **given)
    (other,) = fit_probes(model, model.structure(), toxic[::-1], neutral[::-1], **given)
    torch.testing.assert_close(one.direction_D, other.direction_D)
    assert (one.accuracy, one.n) == (other.accuracy, other.n)


# ---- the cut


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_never_split(seed: int) -> None:
    toxic, neutral = texts(101, toxic=True), texts(101, toxic=False)
    sides = cut(neutral, toxic, paired=True, share=0.2, seed=seed)
    assert np.array_equal(sides.train[0], sides.train[1])
    assert np.array_equal(sides.held[0], sides.held[1])
    assert sorted([*sides.train[0], *sides.held[0]]) == list(range(101))
    assert len(sides.held[0]) == 20


def test_pairs_measured_on_are_whole_also_when_capped() -> None:
    toxic, neutral = texts(100, toxic=True), texts(100, toxic=False)
    sides = cut(neutral, toxic, paired=True, share=0.5, seed=0)
    plan = room._plan([*neutral, *toxic], 100, sides, "logistic", "mean", 20, 0)
    held = set(plan.held.texts_S.tolist())
    assert len(held) == 20 and {i + 100 for i in held if i < 100} == {i for i in held if i >= 100}


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_is_measured_on_was_never_fitted_on(pooling: Any, paired: bool) -> None:
    toxic, neutral = texts(90, toxic=True), texts(90, toxic=False)
    sides = cut(neutral, toxic, paired=paired, share=0.3, seed=0)
    plan = room._plan([*neutral, *toxic], 90, sides, "logistic", pooling, 100, 0)
    held = plan.held.distinct_texts
    assert len(held) > 20 and not plan.train[held].any()
    for draw in (plan.fitted, plan.single):
        assert draw is not None and plan.train[draw.texts_S].all()
    # Shuffled within each side: as many toxic labels as before, in other places.
    for part in (plan.train, ~plan.train):
        assert plan.shuffled[part].sum() == plan.toxic[part].sum()
        assert (plan.shuffled[part] != plan.toxic[part]).any()


def test_equal_texts_stay_together() -> None:
    once = texts(10, toxic=True)
    sides = cut(texts(40, toxic=False), once * 4, paired=True, share=0.3, seed=0)
    train, held = ({place % 10 for place in part[1].tolist()} for part in (sides.train, sides.held))
    assert not train & held and len(held) == 3


# ---- memory


@pytest.mark.parametrize("pooling", POOLINGS)
def test_kept_rows_are_bounded_and_balanced(pooling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[dict[str, int]] = []
    real = room._Reading

    class Counting(real):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            parts = {"fitted": self.fitted, "held": self.held, "single": self.single}
            sizes.append({name: part.rows[0].shape[0] for name, part in parts.items()})
            for part in parts.values():
                toxic = self.plan.toxic[part.draw.texts_S]
                assert toxic.sum() * 2 == len(toxic)

    monkeypatch.setattr(room, "_Reading", Counting)
    monkeypatch.setattr(room, "SPREAD_ROWS", 30)
    for n in (300, 900):
        fitted(n, pooling=pooling, max_rows=64)
    assert sizes == [{"fitted": 64, "held": 64, "single": 60}] * 2


def test_drawn_tokens_are_uniform_and_never_the_first() -> None:
    lengths = np.array([2, 5, 3])
    generator, counts = np.random.default_rng(0), np.zeros((3, 5))
    for _ in range(3000):
        draw = tokens([np.array([2, 0, 1])], lengths, 3, generator)
        assert draw.tokens_S is not None and len(draw.texts_S) == 3
        counts[draw.texts_S, draw.tokens_S] += 1
    possible = np.array([[0, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]], bool)
    assert (counts[~possible] == 0).all()
    # Three of seven, each as likely: 1286 ± 27.
    assert (abs(counts[possible] - 9000 / 7) < 110).all()


# ---- what is refused


@pytest.mark.parametrize("missing", ["toxic", "neutral"])
def test_a_missing_class(missing: str) -> None:
    model = Planted(1.0)
    both = ([] if missing == name else texts(9, toxic=True) for name in ("toxic", "neutral"))
    with pytest.raises(DataError, match=f"no {missing} text"):
        fit_probes(model, model.structure(), *both, layers=[0])


def test_too_few_texts() -> None:
    model, same = Planted(1.0), texts(1, toxic=True) * 50
    with pytest.raises(DataError, match="too few toxic texts"):
        fit_probes(model, model.structure(), same, texts(50, toxic=False), layers=[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_number_of_texts_is_enough(kind: Any) -> None:
    _, (probe,) = fitted(4, shift=8.0, kind=kind)
    assert probe.n == 2 and probe.at_chance  # two texts prove nothing


def test_pairs_that_do_not_match_up() -> None:
    model = Planted(1.0)
    both = texts(9, toxic=True), texts(8, toxic=False)
    with pytest.raises(DataError, match="do not match up"):
        fit_probes(model, model.structure(), *both, layers=[0], paired=True)


def test_classes_without_a_difference() -> None:
    model, same = Planted(1.0), texts(20, toxic=True)
    with pytest.raises(DataError, match="same activations at layer 0"):
        fit_probes(model, model.structure(), same, same, layers=[0], kind="mean-difference")


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("kind", "logistics", "did you mean 'logistic'"),
        ("pooling", "tokens", "did you mean 'token'"),
        ("held_out", 0.0, "above 0 and below 1"),
        ("held_out", float("nan"), "above 0 and below 1"),
        ("max_rows", 7, "from 8"),
    ],
)
def test_settings_out_of_range(setting: str, value: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        fitted(**{setting: value})


def test_activations_that_are_not_finite() -> None:
    model = Planted(1.0)
    model.embedding.weight.data[1:50] = torch.inf
    both = texts(60, toxic=True), texts(60, toxic=False)
    with pytest.raises(ModelError, match="layer 0 are not finite"):
        fit_probes(model, model.structure(), *both, layers=[0])


def test_a_width_of_the_model() -> None:
    assert fitted()[1][0].direction_D.shape == (WIDTH,)
