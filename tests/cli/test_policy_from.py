"""A run that uses the policy that another run learned."""

from __future__ import annotations

import json
import shutil

import pytest
from learned_world import learned_settings, record_of

from expunge.errors import RecipeError, TrainingError
from expunge.recipe import Recipe
from expunge.run import run

KNOBS = ("lr", "retain_weight")


@pytest.fixture(scope="module")
def teacher(world, tmp_path_factory):
    """A finished learned run; not to be changed."""
    out = tmp_path_factory.mktemp("teacher") / "out"
    run(Recipe.build(learned_settings(world)), out)
    return out


def test_the_same_seed_ends_as_its_teacher_did(world, teacher, tmp_path):
    """No episode is played; the last run is the teacher's, so are its knobs and points."""
    recipe = Recipe.build(learned_settings(world, policy_from=str(teacher)))
    record = run(recipe, tmp_path / "taught")
    own, of_teacher = (record_of(one)["training"] for one in (tmp_path / "taught", teacher))
    assert own["tradeoff"]["episodes"] == 0
    assert own["tradeoff"]["policy"] == of_teacher["tradeoff"]["policy"]
    assert own["tradeoff"]["inner_steps"] == recipe.steps
    assert own["curve"]["knobs"] == of_teacher["curve"]["knobs"]
    assert own["curve"]["points"] == of_teacher["curve"]["points"]
    assert len(own["tradeoff"]["tried"]) == 1
    assert record.training["split_reads"]["validation"] < of_teacher["split_reads"]["validation"]


def test_another_seed_trains_otherwise_with_the_same_policy(world, teacher, tmp_path):
    settings = learned_settings(world, policy_from=str(teacher), seed=8)
    training = run(Recipe.build(settings), tmp_path / "out").training
    of_teacher = record_of(teacher)["training"]
    assert training["tradeoff"]["policy"] == of_teacher["tradeoff"]["policy"]
    assert training["curve"]["loss"] != of_teacher["curve"]["loss"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tradeoff": "fixed"}, "learned trade-off alone"),
        ({"tradeoff": "search"}, "learned trade-off alone"),
        ({"policy_from": "nowhere"}, "no learned policy"),
        ({"objective": "rmu"}, "other knobs"),
        ({"reward": "likelihood"}, "other looks"),
    ],
)
def test_what_cannot_be_used_is_refused(world, teacher, tmp_path, change, word):
    settings = learned_settings(world, **{"policy_from": str(teacher), **change})
    with pytest.raises(RecipeError, match=word):
        run(Recipe.build(settings), tmp_path / "out")


def test_a_teacher_whose_knobs_had_other_ranges_is_refused(world, teacher, tmp_path):
    """A place of its policy means another value there."""
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    header, *lines = (moved / "episodes.jsonl").read_text().splitlines()
    facts = json.loads(header)
    facts["knobs"]["lr"][0] *= 2
    (moved / "episodes.jsonl").write_text("\n".join([json.dumps(facts), *lines]) + "\n")
    with pytest.raises(RecipeError, match="other knobs"):
        run(Recipe.build(learned_settings(world, policy_from=str(moved))), tmp_path / "out")


def test_a_teacher_that_changed_is_noticed_on_resume(world, teacher, tmp_path, monkeypatch):
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    settings = learned_settings(world, policy_from=str(moved), save_every=2)
    out = tmp_path / "out"

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("expunge.metalearning.exploring.best_of", stop)
        with pytest.raises(KeyboardInterrupt):
            run(Recipe.build(settings), out)
    lines = (moved / "episodes.jsonl").read_text().splitlines()
    (moved / "episodes.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(TrainingError, match="other data, another base"):
        run(Recipe.build(settings), out)
