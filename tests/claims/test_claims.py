"""The claim on the miniature: the knowledge goes, the rest stays, and not by just any edit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from expunge.demo import OBJECTIVES, demo_recipe
from expunge.miniature import check_data
from expunge.model.patch import Patch
from expunge.run import Workbench

ROOT = Path(__file__).parents[2]
COSINE = {"objective": "cosine-rmu", **OBJECTIVES["cosine-rmu"]}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    data = tmp_path_factory.mktemp("world")
    check_data().write(data)
    return Workbench(demo_recipe(data))


@pytest.fixture(scope="module")
def learned(bench):
    patch, _ = bench.train(bench.recipe.updated(**COSINE))
    return patch


@pytest.fixture(scope="module")
def scores(bench, learned):
    found = bench.evaluate(learned, oracle=bench.recipe.oracle)
    return {(score.model, score.name): score for score in found}


def test_positive_control_the_base_knows_both_domains(scores):
    assert scores["base", "forget_accuracy"].value >= 0.99
    assert scores["base", "retain_accuracy"].value >= 0.99


def test_the_oracle_never_knew(scores):
    assert (
        scores["oracle", "forget_accuracy"].ci_low
        < 0.25
        < scores["oracle", "forget_accuracy"].ci_high
    )
    assert scores["oracle", "retain_accuracy"].value >= 0.99


def test_the_knowledge_is_gone(scores):
    # One seed; the mean over five is in results/demo.json.
    assert scores["patched", "forget_accuracy"].value <= 0.40
    assert scores["patched", "forget_nll"].value >= 4.0


def test_the_rest_stays(scores):
    base, patched = (
        {name: scores[role, name].value for name in ("retain_accuracy", "perplexity")}
        for role in ("base", "patched")
    )
    assert patched["retain_accuracy"] >= base["retain_accuracy"] - 0.02
    assert patched["perplexity"] <= 1.02 * base["perplexity"]


def test_control_a_random_edit_of_equal_norm_removes_nothing(bench, learned):
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for name, delta in learned.deltas.items():
        noise = torch.randn(delta.shape, generator=generator)
        deltas[name] = noise * (delta.norm() / noise.norm())
    random = Patch(deltas, learned.base, {})
    assert random.norm() == pytest.approx(learned.norm(), rel=1e-4)
    found = {s.name: s for s in bench.evaluate(random) if s.model == "patched"}
    assert found["forget_accuracy"].value >= 0.95
    assert found["forget_nll"].value < 0.5


def test_half_a_patch_is_half_way_and_its_negative_undoes_it(bench, learned):
    half = {s.name: s.value for s in bench.evaluate(learned * 0.5) if s.model == "patched"}
    whole = {s.name: s.value for s in bench.evaluate(learned) if s.model == "patched"}
    none = {s.name: s.value for s in bench.evaluate(learned + -learned) if s.model == "patched"}
    assert 0.01 < half["forget_nll"] < whole["forget_nll"]
    assert none["forget_accuracy"] >= 0.99


def recorded():
    """The knowledge part of the recorded demo."""
    return json.loads((ROOT / "results" / "demo.json").read_text(encoding="utf-8"))["knowledge"]


def test_the_recorded_means_over_five_seeds_reach_the_targets():
    record = recorded()
    base = {score["name"]: score["value"] for score in record["base"]}
    means = {k: v["mean"] for k, v in record["objectives"]["cosine-rmu"].items()}
    assert {run["seed"] for run in record["runs"]["cosine-rmu"]} == {0, 1, 2, 3, 4}
    assert means["forget_accuracy"] <= 0.30
    assert means["retain_accuracy"] >= base["retain_accuracy"] - 0.01
    assert means["perplexity"] <= 1.02 * base["perplexity"]


def test_the_record_is_of_these_settings_and_this_world():
    record = recorded()
    for name, changes in OBJECTIVES.items():
        for run in record["runs"][name]:
            recipe = run["provenance"]["recipe"]
            assert all(recipe[key] == value for key, value in changes.items())
            assert recipe["steps"] == demo_recipe(ROOT).steps
