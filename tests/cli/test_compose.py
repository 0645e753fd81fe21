"""Sums of runs' patches, and random controls of them, measured as a run is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_world import save_model
from test_bad_input import tree

from expunge.compose import compose, control
from expunge.errors import DataError, PatchError
from expunge.jobs import Job, run_jobs
from expunge.model.control import randomised
from expunge.model.patch import Patch
from expunge.recipe import Recipe
from expunge.records import RunRecord
from expunge.run import run
from expunge.workbench import Workbench


def knowledge(world, **changes):
    settings = {
        "model": str(world.model),
        "forget": str(world.forget),
        "retain": str(world.retain),
        "questions": str(world.questions),
        "layer": 2,
        "steps": 4,
        "lr": 0.01,
        "batch_size": 4,
    }
    return Recipe.build({**settings, **changes})


def toxicity(world, **changes):
    settings = {
        "model": str(world.model),
        "function": "toxicity",
        "pairs": str(world.pairs),
        "prompts": str(world.prompts),
        "retain": str(world.retain),
        "scorers": [f"words:{world.words}", "tfidf"],
        "samples": 2,
        "new_tokens": 5,
        "steps": 8,
        "lr": 0.01,
        "batch_size": 12,
    }
    return Recipe.build({**settings, **changes})


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """The folders of a knowledge run and of a toxicity run of one base."""
    root = tmp_path_factory.mktemp("runs")
    for name, recipe in (("facts", knowledge(world)), ("manners", toxicity(world))):
        run(recipe.updated(evaluate=False), root / name)
    return root / "facts", root / "manners"


@pytest.mark.parametrize("make", [knowledge, toxicity])
def test_a_sum_is_measured_as_the_patch_a_plus_b(world, runs, tmp_path, make):
    recipe = make(world, oracle=str(world.oracle), seed=3)
    record = compose(recipe, runs, tmp_path / "out", bench=Workbench(recipe))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "recipe.yaml",
        "patch.safetensors",
        "record.json",
    }
    assert RunRecord.load(tmp_path / "out").to_dict() == record.to_dict()
    one, other = (Patch.load(folder / "patch.safetensors") for folder in runs)
    total = one + other
    assert Patch.load(tmp_path / "out" / "patch.safetensors") == total
    # Layers that both train hold both changes.
    shared = set(one.names) & set(other.names)
    assert shared and set(total.names) == {*one.names, *other.names}

    fresh = Workbench(recipe)
    assert record.scores == fresh.evaluate(total, oracle=recipe.oracle)
    # Controls: neither part alone is measured so.
    for part in (one, other):
        assert fresh.evaluate(part, oracle=recipe.oracle) != record.scores

    assert record.function == "knowledge + toxicity"
    assert record.objective == "cosine-rmu + multi-layer-probe"
    assert record.seed == 3
    assert list(record.training["parts"]) == ["facts", "manners"]
    assert record.timing.keys() == {"evaluate"}
    assert set(record.provenance["base"]) == set(total.names)


def test_one_run_alone_is_its_own_patch(world, runs, tmp_path):
    """A patch of one function measured by the suite of another."""
    recipe = toxicity(world)
    bench = Workbench(recipe)
    record = compose(recipe, runs[:1], tmp_path / "out", bench=bench)
    patch = Patch.load(runs[0] / "patch.safetensors")
    assert Patch.load(tmp_path / "out" / "patch.safetensors") == patch
    assert record.scores == bench.evaluate(patch)
    assert (record.function, record.objective) == ("knowledge", "cosine-rmu")


def test_parts_in_folders_of_one_name_are_both_recorded(world, runs, tmp_path):
    alike = [tmp_path / name / "seed0" for name in ("facts", "manners")]
    for path, found in zip(alike, runs, strict=True):
        shutil.copytree(found, path)
    recipe = knowledge(world)
    parts = compose(recipe, alike, tmp_path / "out", bench=Workbench(recipe)).training["parts"]
    assert [name.split("/")[-2:] for name in parts] == [["facts", "seed0"], ["manners", "seed0"]]
    assert len({*parts.values()}) == 2


def test_a_finished_sum_is_not_measured_again(world, runs, tmp_path, monkeypatch):
    recipe, out = knowledge(world), tmp_path / "out"
    first = compose(recipe, runs, out, bench=Workbench(recipe))
    before = tree(out)
    with monkeypatch.context() as patched:
        patched.setattr(Workbench, "evaluate", None)
        again = compose(recipe, runs, out, bench=Workbench(recipe))
    assert again.to_dict() == first.to_dict()
    assert tree(out) == before
    stamp = (out / "record.json").stat().st_mtime_ns
    fresh = compose(recipe, runs, out, bench=Workbench(recipe), fresh=True)
    assert fresh.scores == first.scores
    assert (out / "record.json").stat().st_mtime_ns != stamp


def test_another_sum_or_a_run_is_not_taken_for_this_one(world, runs, tmp_path):
    recipe, out = knowledge(world), tmp_path / "out"
    compose(recipe, runs, out, bench=Workbench(recipe))
    before = tree(out)
    with pytest.raises(DataError, match="something else than this sum"):
        compose(recipe, runs[:1], out, bench=Workbench(recipe))
    assert tree(out) == before
    # Nor is the work of an interrupted run thrown away.
    (out / "record.json").unlink()
    (out / "losses.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="something else than this sum"):
        compose(recipe, runs, out, bench=Workbench(recipe))
    assert (out / "losses.jsonl").exists()


def test_an_interrupted_sum_is_made_again(world, runs, tmp_path):
    recipe, out = knowledge(world), tmp_path / "out"
    whole = compose(recipe, runs, out, bench=Workbench(recipe))
    (out / "record.json").unlink()
    assert compose(recipe, runs, out, bench=Workbench(recipe)).scores == whole.scores


def test_patches_of_two_bases_have_no_sum(world, runs, tmp_path):
    save_model(tmp_path / "other", seed=9)
    other = knowledge(world, model=str(tmp_path / "other"), evaluate=False)
    run(other, tmp_path / "elsewhere")
    recipe = knowledge(world)
    with pytest.raises(PatchError, match="different bases"):
        compose(
            recipe, [runs[0], tmp_path / "elsewhere"], tmp_path / "out", bench=Workbench(recipe)
        )
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_patch_has_no_sum(world, runs, tmp_path):
    recipe = knowledge(world)
    with pytest.raises(PatchError, match=r"patch\.safetensors"):
        compose(recipe, [runs[0], tmp_path / "none"], tmp_path / "out", bench=Workbench(recipe))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(world, runs, tmp_path):
    recipe = knowledge(world)
    bench = Workbench(recipe)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work\n")
    with pytest.raises(DataError, match="no run's"):
        compose(recipe, runs, tmp_path / "mine", bench=bench)
    # Another run's folder is not overwritten either.
    before = tree(runs[0])
    with pytest.raises(DataError, match="other settings"):
        compose(recipe.updated(seed=1), runs, runs[0], bench=bench)
    assert tree(runs[0]) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_sums_wait_for_their_parts(world, tmp_path, workers):
    """With processes the sum is started when both parts are there, whatever they take."""
    facts, manners = tmp_path / "facts", tmp_path / "manners"
    jobs = [
        Job(knowledge(world, evaluate=False), facts),
        Job(toxicity(world, evaluate=False), manners),
        Job(knowledge(world), tmp_path / "sum", sum_of=(facts, manners)),
        Job(toxicity(world), tmp_path / "alone", sum_of=(facts,)),
    ]
    # Processes may be told in any order.
    order = [0, 1, 2, 3] if workers == 1 else [2, 3, 0, 1]
    records = run_jobs([jobs[i] for i in order], workers=workers)
    found = {order[i]: record for i, record in enumerate(records)}
    assert found[2].objective == "cosine-rmu + multi-layer-probe"
    assert found[3].objective == "cosine-rmu"
    one, other, total = (
        Patch.load(tmp_path / name / "patch.safetensors") for name in ("facts", "manners", "sum")
    )
    assert total == one + other
    assert json.loads(Path(tmp_path / "sum" / "record.json").read_text()) == found[2].to_dict()


# ---- a random change of equal size


def test_a_control_is_measured_as_the_random_patch(world, runs, tmp_path):
    recipe, out = knowledge(world, seed=3), tmp_path / "out"
    record = control(recipe, runs[0], out, bench=Workbench(recipe))
    assert {path.name for path in out.iterdir()} == {
        "recipe.yaml",
        "patch.safetensors",
        "record.json",
    }
    assert RunRecord.load(out).to_dict() == record.to_dict()
    learned = Patch.load(runs[0] / "patch.safetensors")
    patch = Patch.load(out / "patch.safetensors")
    assert patch == randomised(learned, 3)
    assert record.scores == Workbench(recipe).evaluate(patch)
    assert record.scores != Workbench(recipe).evaluate(learned)
    assert (record.function, record.objective, record.seed) == ("knowledge", "random-control", 3)
    assert list(record.training["control_of"]) == [runs[0].name]
    assert record.training["split_reads"] == {"test": 1}


def test_the_control_of_a_knowledge_run_by_another_functions_scores(world, runs, tmp_path):
    recipe = toxicity(world)
    record = control(recipe, runs[0], tmp_path / "out", bench=Workbench(recipe))
    assert record.function == "toxicity"
    assert record.score("toxicity_rate", "patched") is not None


def test_a_finished_control_is_not_measured_again(world, runs, tmp_path, monkeypatch):
    recipe, out = knowledge(world), tmp_path / "out"
    first = control(recipe, runs[0], out, bench=Workbench(recipe))
    before = tree(out)
    with monkeypatch.context() as patched:
        patched.setattr(Workbench, "evaluate", None)
        again = control(recipe, runs[0], out, bench=Workbench(recipe))
    assert again.to_dict() == first.to_dict()
    assert tree(out) == before
    # Neither that of another run, nor of another seed, nor a sum is taken for it.
    for make, given in ((control, runs[1]), (compose, runs[:1])):
        with pytest.raises(DataError, match="something else than this"):
            make(recipe, given, out, bench=Workbench(recipe))
    with pytest.raises(DataError, match="other settings"):
        control(knowledge(world, seed=1), runs[0], out, bench=Workbench(recipe))
    assert tree(out) == before
    # An interrupted one is made again.
    (out / "record.json").unlink()
    assert control(recipe, runs[0], out, bench=Workbench(recipe)).scores == first.scores


def test_a_run_without_a_patch_has_no_control(world, tmp_path):
    recipe = knowledge(world)
    with pytest.raises(PatchError, match=r"patch\.safetensors"):
        control(recipe, tmp_path / "none", tmp_path / "out", bench=Workbench(recipe))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_control_waits_for_its_run(world, tmp_path, workers):
    facts = tmp_path / "facts"
    jobs = [
        Job(knowledge(world), tmp_path / "control", control_of=facts),
        Job(knowledge(world, evaluate=False), facts),
    ]
    records = run_jobs(jobs, workers=workers)
    assert [record.objective for record in records] == ["random-control", "cosine-rmu"]
    learned, noise = (Patch.load(job.out / "patch.safetensors") for job in reversed(jobs))
    assert noise.norm() == pytest.approx(learned.norm(), rel=1e-6)


def test_no_job_is_a_sum_and_a_control(world, tmp_path):
    with pytest.raises(ValueError, match="a sum and a control"):
        Job(knowledge(world), tmp_path, sum_of=(tmp_path,), control_of=tmp_path)
