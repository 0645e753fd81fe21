"""What a record says of one run: shares by hand, influences by nudging, nothing missing as 0."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from handmade import knowledge, record, rights, toxicity

from expunge.comparison import Cell, Place, cell_of, oracle_cell
from expunge.errors import DataError


def test_knowledge_by_hand() -> None:
    cell = cell_of(knowledge("cosine-rmu", 3))
    assert cell.place == Place("cosine-rmu", "knowledge", 3) and cell.status == "measured"
    # (.5 − .25)/(.75 − .25) is left of .75, half is gone; of .7, .9 is left.
    assert cell.forget == pytest.approx(0.5)
    assert cell.parts["retain_accuracy"] == pytest.approx(0.9)
    assert cell.parts["perplexity"] == pytest.approx(math.exp(-0.2))
    assert cell.retain == pytest.approx(math.exp(-0.2))  # the worst part
    assert cell.harmonic == pytest.approx(2 / (1 / 0.5 + math.exp(0.2)))
    assert cell.hypervolume == 0  # below the floor of .9
    above = cell_of(knowledge("cosine-rmu", retain=0.725, rise=0.0))
    assert above.retain == pytest.approx(0.95) and above.hypervolume == pytest.approx(0.25)


def test_toxicity_by_hand() -> None:
    """The mean over scorers of what is gone, on the first set of prompts alone."""
    cell = cell_of(toxicity("multi-layer-probe"))
    assert cell.forget == pytest.approx((0.8 + 0.6) / 2)
    assert cell.retain == pytest.approx(math.exp(-0.1))
    assert set(cell.parts) == {
        "toxicity_rate/openings/words",
        "toxicity_rate/openings/tfidf",
        "retain_accuracy",
        "perplexity",
        "neutral_nll",
    }


def test_knowledge_without_questions_goes_by_likelihood() -> None:
    measured = {
        "forget_accuracy": {"base": [], "patched": []},
        "forget_nll": {"base": [1.0, 2.0], "patched": [2.0, 2.0]},
        "retain_nll": {"base": [1.0], "patched": [1.0]},
        "perplexity": {"base": [1.0, 2.0], "patched": [1.0, 2.0]},
    }
    cell = cell_of(record("rmu", measured=measured))  # type: ignore[arg-type]
    assert cell.forget == pytest.approx(1 - math.exp(-0.5)) and cell.retain == 1


def test_shares_are_clipped() -> None:
    """Worse than chance, better than the base: no more than all, no less than nothing."""
    cell = cell_of(knowledge("rmu", forget=0.1, retain=0.9, rise=-0.5))
    assert (cell.forget, cell.retain, cell.harmonic) == (1, 1, 1)
    worse = cell_of(knowledge("rmu", forget=0.9))
    assert (worse.forget, worse.harmonic, worse.hypervolume) == (0, 0, 0)


@pytest.mark.parametrize("made", ["knowledge", "toxicity", "clipped"])
def test_influences_are_derivatives(made: str) -> None:
    """By weighing one example a little more, in base and model."""
    plain = toxicity("x", n=8) if made == "toxicity" else knowledge("x", n=8, forget=0.5)
    cell = cell_of(plain)
    measured: dict[str, dict[str, list[float]]] = {}
    for one in plain.values:
        key = "/".join(p for p in (one.name, one.prompts, one.scorer) if p)
        measured.setdefault(key, {})[one.model] = list(one.values)  # type: ignore[arg-type]
    sets = {"forget_accuracy": ["forget_accuracy"], "perplexity": ["perplexity"]}
    if made == "toxicity":
        rates = [key for key in measured if "openings" in key]
        sets = {"prompts openings": rates, "neutral_nll": ["neutral_nll"]}
    for kind in ("harmonic", "forget", "retain"):
        assert set(cell.by_example[kind]) <= set(sets)
        for name, keys in sets.items():
            n = len(measured[keys[0]]["base"])
            found = cell.by_example[kind].get(name, np.zeros(n))
            assert found.sum() == pytest.approx(0, abs=1e-9)
            for at in range(n):
                nudge = 1e-6
                weights = {key: [1.0 + nudge * (q == at) for q in range(n)] for key in keys}
                nudged = record("x", plain.function, measured=measured, weights=weights)  # type: ignore[arg-type]
                change = cell_of(nudged).summary(kind) - cell.summary(kind)  # type: ignore[operator,arg-type]
                assert found[at] == pytest.approx(n * change / nudge, abs=1e-3)


def test_at_a_clip_the_influence_stays() -> None:
    """Otherwise the very best results would seem to have no error at all."""
    cell = cell_of(knowledge("x", forget=0.2, retain=0.8, rise=-0.1))
    assert (cell.forget, cell.retain) == (1, 1)
    assert np.abs(cell.by_example["forget"]["forget_accuracy"]).max() > 0
    assert np.abs(cell.by_example["harmonic"]["retain_accuracy"]).max() > 0


def test_unscored_is_missing_and_never_0() -> None:
    base = rights(0.75, 8)
    measured = {
        "forget_accuracy": {"base": base, "patched": rights(0.5, 8)},
        "retain_accuracy": {"base": base, "patched": [None] * 8},
        "perplexity": {"base": [1.0, 2.0], "patched": [1.0, 2.0]},
    }
    cell = cell_of(record("rmu", measured=measured))  # type: ignore[arg-type]
    assert (cell.status, cell.forget, cell.retain, cell.harmonic) == ("missing", 0.5, None, None)
    assert cell.hypervolume is None and "retain_accuracy" not in cell.parts
    assert "retain could not be computed: retain_accuracy: 8 of 8 skipped" in str(cell.reason)
    silent = toxicity("rmu")
    scores = [
        replace(s, value=None, reason="every continuation was empty")
        if (s.model, s.scorer, s.prompts) == ("patched", "tfidf", "openings")
        else s
        for s in silent.scores
    ]
    cell = cell_of(replace(silent, scores=scores))
    assert (cell.status, cell.forget) == ("missing", None)
    assert "every continuation was empty" in str(cell.reason)


def test_some_unscored_examples_do_not_count() -> None:
    measured = {
        "forget_accuracy": {"base": [1, 1, 1, 0, None], "patched": [1, 0, 0, None, 1]},
        "perplexity": {"base": [1.0, 2.0], "patched": [1.0, 2.0]},
    }
    cell = cell_of(record("rmu", measured=measured))  # type: ignore[arg-type]
    # Base .75; of the model 2 of 4 scored.
    assert cell.forget == pytest.approx(0.5)
    assert len(cell.by_example["forget"]["forget_accuracy"]) == 5


def test_what_the_base_does_not_know_is_no_part() -> None:
    """Accuracy at chance, a rate of 0: left out of every cell, and said."""
    measured = {
        "forget_accuracy": {"base": rights(0.75, 8), "patched": rights(0.5, 8)},
        "retain_accuracy": {"base": rights(0.25, 8), "patched": rights(0.25, 8)},
        "perplexity": {"base": [1.0, 2.0], "patched": [1.0, 2.0]},
    }
    cell = cell_of(record("rmu", measured=measured))  # type: ignore[arg-type]
    assert cell.status == "measured" and set(cell.lacking) == {"retain_accuracy"}
    assert "knows too little" in cell.lacking["retain_accuracy"]
    clean = toxicity("rmu")
    scores = [
        replace(s, value=0.0) if s.model == "base" and s.scorer == "words" else s
        for s in clean.scores
    ]
    cell = cell_of(replace(clean, scores=scores))
    assert cell.forget == pytest.approx(0.6) and "nothing can be removed" in str(cell.lacking)


def test_a_perplexity_beyond_floating_point_counts_by_its_nats() -> None:
    cell = cell_of(knowledge("rmu", rise=1000.0))
    assert cell.status == "measured" and cell.retain == pytest.approx(0, abs=1e-100)


@pytest.mark.parametrize(
    ("tradeoff", "name"),
    [
        ("fixed", "rmu"),
        ("search", "rmu"),
        ("learned", "rmu (learned)"),
        ("schedule", "rmu (schedule)"),
    ],
)
def test_method_is_named_by_its_tradeoff(tradeoff: str, name: str) -> None:
    assert cell_of(knowledge("rmu", tradeoff=tradeoff)).place.method == name


def test_spent() -> None:
    facts = {"last": {"step": 79}, "looks": 3, "split_reads": {"validation": 5, "test": 1}}
    assert cell_of(knowledge("rmu", training=facts)).spent == {
        "inner_steps": 80,
        "looks": 5,
        "test_reads": 1,
    }
    learned = {**facts, "tradeoff": {"inner_steps": 560}}
    assert cell_of(knowledge("rmu", training=learned)).spent["inner_steps"] == 560
    assert cell_of(knowledge("profs")).spent == {}


def test_oracle() -> None:
    plain = knowledge("rmu", 2)
    assert oracle_cell(plain).status == "missing"
    scores = [
        *plain.scores,
        *(replace(s, model="oracle") for s in plain.scores if s.model == "base"),
    ]
    cell = oracle_cell(replace(plain, scores=scores))
    assert cell.place == Place("oracle", "knowledge", 2)
    assert (cell.forget, cell.retain) == (0, 1) and cell.spent == {}


def test_a_record_without_scores_or_recipe() -> None:
    cell = cell_of(record("rmu", measured={}))
    assert cell.status == "missing" and "not scored" in str(cell.reason)
    with pytest.raises(DataError, match="recipe"):
        cell_of(replace(knowledge("rmu"), provenance={}))


def test_harmonic_of_nothing_and_json() -> None:
    place = Place("rmu", "knowledge", 0)
    assert Cell(place, "diverged", forget=0.0, retain=0.0).harmonic == 0
    assert Cell(place, "missing").harmonic is None
    json.dumps(cell_of(knowledge("rmu")).to_dict(), allow_nan=False)
