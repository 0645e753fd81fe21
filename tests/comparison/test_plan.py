"""A comparison's plan: which recipes it makes, and that budgets add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expunge.compare import ComparisonPlan
from expunge.compare.plan import METHODS, QUICK, miniature_plan, miniature_settings, settled
from expunge.edits import EDITS
from expunge.errors import RecipeError
from expunge.objectives import OBJECTIVES
from expunge.recipe import merge_overrides
from expunge.training.policy import PolicySettings

PLAIN: dict[str, Any] = {
    "functions": {
        "knowledge": {"model": "m", "forget": "f", "retain": "r", "steps": 60, "batch_size": 4},
        "toxicity": {"model": "m", "pairs": "p", "retain": "r", "steps": 40},
    },
    "settings": {"npo": {"knowledge": {"lr": 0.5, "objective_settings": {"beta": 0.3}}}},
    "seeds": 5,
    "trials": 8,
}
PLAN = ComparisonPlan.build(PLAIN)
CHOICE = Path("out/choice")


def test_the_search_of_a_cell() -> None:
    found = PLAN.choice("knowledge", "npo")
    assert found is not None
    assert (found.function, found.objective, found.tradeoff) == ("knowledge", "npo", "search")
    assert (found.episodes, found.steps, found.batch_size) == (8, 60, 4)
    # A seed of its own, and no look at the test split.
    assert found.seed not in range(PLAN.seeds) and not found.evaluate
    assert (found.lr, found.objective_settings) == (0.5, {"beta": 0.3})
    other = PLAN.choice("toxicity", "npo")
    assert other is not None and (other.lr, other.objective_settings) == ("auto", {})


def test_edits_are_searched_where_they_have_choices_and_controls_never() -> None:
    found = PLAN.choice("toxicity", "profs")
    assert found is not None and found.tradeoff == "search"
    assert PLAN.choice("toxicity", "project-out") is None
    assert PLAN.choice("toxicity", "random-control") is None


def test_what_a_search_found_is_what_a_seed_trains_with() -> None:
    recipe = PLAN.recipe("knowledge", "npo")
    knobs = [
        {"lr": 0.1, "retain_weight": 1.0, "beta": 0.2},
        {"lr": 0.7, "retain_weight": 3.0, "beta": 0.9},
    ]
    training = {
        "tradeoff": {
            "kind": "search",
            "chosen": {"episode": 1},
            "tried": [{"knobs": one} for one in knobs],
        }
    }
    found = settled(recipe, CHOICE, training)
    assert (found.lr, found.retain_weight, found.objective_settings) == (0.7, 3.0, {"beta": 0.9})
    assert (found.tradeoff, found.episodes, found.layer) == ("search", 1, "auto")
    # The knobs belong to the layer on which they were tried.
    calibrated = settled(recipe, CHOICE, {**training, "calibration": {"layer": 3}})
    assert calibrated == found.updated(layer=3)
    # A search that had no knob of its own to move leaves the objective's settings.
    del knobs[1]["beta"]
    assert settled(recipe, CHOICE, training).objective_settings == {"beta": 0.3}


def test_what_a_search_of_an_edit_found() -> None:
    recipe = PLAN.recipe("toxicity", "profs").updated(objective_settings={"pairs": 50, "rank": 2})
    chosen = {"settings": {"rank": 8, "first_layer": 0}, "worth": 0.5}
    found = settled(
        recipe, CHOICE, {"tradeoff": {"kind": "search", "chosen": chosen, "tried": [chosen]}}
    )
    assert found == recipe.updated(objective_settings={"pairs": 50, "rank": 8, "first_layer": 0})
    assert found.tradeoff == "fixed"


def test_a_search_and_its_runs_take_equal_steps_for_every_method() -> None:
    """8 trials of 60 steps, whatever the objective; looks follow from the steps."""
    searches = [PLAN.choice("knowledge", name) for name in METHODS if name in OBJECTIVES]
    assert len(searches) > 5
    budgets = {(s.episodes, s.steps, s.action_every, s.look_items) for s in searches if s}
    assert budgets == {(8, 60, "auto", 32)}


def test_a_policy_is_taught_once_by_as_many_steps_as_a_search() -> None:
    """A run of 60 steps, 45 episodes of 8 and the run that follows them: 45·8 + 2·60 = 8·60."""
    found = PLAN.choice("knowledge", "npo (learned)")
    assert found is not None
    assert (found.tradeoff, found.objective, found.evaluate) == ("learned", "npo", False)
    assert found.episodes == 46
    assert (found.episodes - 1) * 8 + 2 * found.steps == 8 * 60
    recipe = PLAN.recipe("knowledge", "npo (learned)")
    told = {"tradeoff": {"kind": "learned", "chosen": {}, "tried": []}}
    seed = settled(recipe, CHOICE, told)
    assert (seed.tradeoff, seed.policy_from) == ("learned", str(CHOICE))
    assert settled(recipe, CHOICE, {**told, "calibration": {"layer": 3}}).layer == 3


# ---- the built-in plan


def test_the_built_in_plan_holds_all_methods_and_writes_its_world(tmp_path: Path) -> None:
    plan = miniature_plan(tmp_path / "data")
    assert plan.methods == METHODS
    assert set(OBJECTIVES.names()) - {"representation"} <= {*METHODS} | {*QUICK}
    assert "profs" in EDITS and (tmp_path / "data" / "forget.txt").is_file()
    recipe = plan.recipe("knowledge", "rmu")
    assert recipe.objective_settings == {"coefficient": 100.0}
    # Nothing of what the demo has from a hand's choice is left.
    assert plan.recipe("toxicity", "multi-layer-probe").objective_settings == {}
    assert plan.recipe("toxicity", "multi-layer-probe").lr == "auto"


@pytest.mark.parametrize("function", ["knowledge", "toxicity"])
def test_the_built_in_plan_teaches_a_policy(tmp_path: Path, function: str) -> None:
    """By episodes enough for it to be updated, and as many steps as a search has."""
    plan = miniature_plan(tmp_path)
    taught = plan.choice(function, "cosine-rmu (learned)")
    search = plan.choice(function, "cosine-rmu")
    assert taught is not None and search is not None
    assert (taught.tradeoff, taught.episodes, taught.steps) == ("learned", 16, 60)
    assert taught.episodes > 1 + PolicySettings().drawn + PolicySettings().warm_up
    assert search.episodes * search.steps == 2 * 60 + 15 * 12
    # The second action can answer to what the first one did.
    assert (taught.episode_steps, taught.action_every) == (12, 6)


def test_settings_reach_into_the_built_in_plan(tmp_path: Path) -> None:
    """And what is beside them stays."""
    overrides = ["functions.knowledge.steps=7", "settings.npo.knowledge.lr=0.5", "trials=6"]
    plan = miniature_plan(tmp_path, quick=True, overrides=overrides)
    assert (plan.methods, plan.seeds, plan.trials) == (QUICK, 3, 6)
    knowledge = plan.recipe("knowledge", "rmu")
    assert (knowledge.steps, knowledge.objective_settings) == (7, {"coefficient": 100.0})
    assert knowledge.max_tokens == plan.recipe("toxicity", "rmu").max_tokens == 128
    assert plan.recipe("toxicity", "rmu").steps == 48
    assert plan.recipe("knowledge", "npo").lr == 0.5


def test_a_plan_that_is_refused_writes_no_world(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        miniature_plan(tmp_path / "data", overrides=["seeds=0"])
    assert not (tmp_path / "data").exists()


def test_overrides_at_any_depth_leave_the_base_as_it_was() -> None:
    base = {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    found = merge_overrides(base, ["a.b.c=5", "a.x.y=6", "e.z=7"])
    assert found == {"a": {"b": {"c": 5, "d": 2}, "x": {"y": 6}}, "e": {"z": 7}}
    assert base == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}


def test_settings_of_the_built_in_plan_are_those_of_a_file(tmp_path: Path) -> None:
    settings = miniature_settings(tmp_path)
    assert ComparisonPlan.build(settings).functions == settings["functions"]
