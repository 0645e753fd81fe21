"""The folder of a run: what is in it already, what is cleared away, what it says of the machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_bad_input import DATA, PATCH, QUICK, check, tree

from expunge.learning import as_published, published
from expunge.model.boundaries import SPILL_PREFIX
from expunge.model.patch import Patch
from expunge.recipe import Recipe
from expunge.run import run
from expunge.workbench import Workbench


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
@pytest.mark.parametrize("name", ["notes.txt", "boundaries-of-my-land/map.txt"])
def test_a_folder_of_other_files_is_refused(cli, world, tmp_path, name, fresh):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    for path in (file, tmp_path / ".x.tmp", tmp_path / "recipe.yaml", tmp_path / "a.tmp"):
        path.write_text("mine")
    before = tree(tmp_path)
    result = cli(*world.args(tmp_path, *QUICK, *fresh))
    check(result, DATA, "files that are no run's", name.split("/")[0])
    assert tree(tmp_path) == before


def test_only_leftovers_of_the_dead_are_cleared_away(cli, world, tmp_path, dead):
    ours = [f"{SPILL_PREFIX}{dead}-abc", f".state.safetensors.{dead}.tmp"]
    theirs = [f"{SPILL_PREFIX}{os.getppid()}-abc", f".losses.jsonl.{os.getppid()}.tmp"]
    theirs += [".mine.tmp", f".mine.{dead}.tmp", ".boundaries-x", f"{SPILL_PREFIX}x"]
    for name in (*ours, *theirs):
        if name.endswith(".tmp"):
            (tmp_path / name).write_text("x")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "0").write_text("x")
    # Hidden files alone: as good as empty.
    assert cli(*world.args(tmp_path, *QUICK)).code == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {*theirs} <= names
    assert not names & {*ours}


def test_notes_beside_a_run_stay(cli, world, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "notes.txt").write_text("mine")
    assert cli(*world.args(out, *QUICK, "--fresh")).code == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_a_patch_put_there_by_hand_is_refused(cli, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "record.json").unlink()
    patch = Patch.load(out / "patch.safetensors")
    (patch + patch).save(out / "patch.safetensors")
    check(
        cli("run", finished / "recipe.yaml", "-o", out),
        PATCH,
        "was not left there by a run",
        "--fresh",
    )


def test_a_patch_says_nothing_of_the_machine(world, finished):
    metadata = Patch.load(finished / "patch.safetensors").metadata
    assert str(world.root) not in json.dumps(metadata)
    assert metadata["recipe"]["model"] == metadata["base_model"] == "base"
    assert metadata["recipe"]["forget"] == ["forget.txt"]
    assert metadata["training"]["data"].keys() >= {"forget.txt", "retain.txt", "questions.jsonl"}
    # The run's own folder keeps what was typed.
    assert Recipe.load(finished / "recipe.yaml").model == str(world.model)


def test_published_names(tmp_path, monkeypatch):
    (tmp_path / "forget.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    names = ["forget.txt", "./forget.txt", "owner/data:config:train", "/nowhere/a.txt", "~no/one"]
    shown = ["forget.txt", "forget.txt", "owner/data:config:train", "a.txt", "~no/one"]
    assert [published(name) for name in names] == shown
    assert published(".") == tmp_path.name
    assert as_published({"/a/x": "1", "/b/x": "2", "y": "3"}) == {"x": "1", "x#2": "2", "y": "3"}


def test_what_runs_share_counts_once(world, tmp_path):
    settings = {"layer": 2, "steps": 2, "lr": 0.01, "batch_size": 4, "evaluate": False}
    data = {name: str(getattr(world, name)) for name in ("model", "forget", "retain")}
    recipe = Recipe.build({**data, **settings})
    bench = Workbench(recipe)
    one = run(recipe, tmp_path / "one", bench=bench)
    two = run(recipe.updated(seed=1), tmp_path / "two", bench=bench)
    assert one.timing["load"] > 0 and one.timing["prefix"] > 0
    assert (two.timing["load"], two.timing["prefix"]) == (0.0, 0.0)
    log = (tmp_path / "two" / "losses.jsonl").read_text().splitlines()
    assert two.timing["train"] == pytest.approx(sum(json.loads(line)["seconds"] for line in log))
