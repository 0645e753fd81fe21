"""`expunge pick`: another point of a learned run's front, its counts, kills, bad input."""

from __future__ import annotations

import shutil
import signal

import pytest
import yaml
from learned_world import (
    chosen_of,
    copied,
    front_of,
    learned_settings,
    record_of,
    same_deltas,
)
from small_world import sentences, write_lines
from stopping import KILLED, run_until
from test_bad_input import DATA, PATCH, RECIPE, check, tree

from expunge.model.patch import Patch
from expunge.recipe import Recipe
from expunge.run import run


@pytest.fixture(scope="module")
def learned(world, tmp_path_factory):
    """A finished learned run; not to be changed."""
    out = tmp_path_factory.mktemp("learned") / "out"
    run(Recipe.build(learned_settings(world)), out)
    assert len(front_of(out)) > 2
    return out


@pytest.fixture
def other(learned):
    """A point of the front that is not the chosen one."""
    return 1 if chosen_of(learned) != 1 else 2


def check_picked(out, learned, number, tests):
    """The folder is whole, and of this point."""
    entry = front_of(learned)[number - 1]
    assert chosen_of(out) == number
    own = Patch.load(out / "patch.safetensors")
    assert same_deltas(out / "patch.safetensors", learned / "front" / entry["file"])
    facts = {**entry, "chosen": True, "point": number}
    record = record_of(out)
    for training in (own.metadata["training"], record["training"]):
        assert training["tradeoff"]["chosen"] == facts
    looks = record_of(learned)["training"]["split_reads"]["validation"]
    assert record["training"]["split_reads"] == {"validation": looks, "test": tests}
    # What else is known of the run stays.
    before = Patch.load(learned / "patch.safetensors").metadata
    assert own.metadata["training"].keys() == before["training"].keys()
    assert {k: v for k, v in own.metadata.items() if k != "training"} == {
        k: v for k, v in before.items() if k != "training"
    }
    names = {name for name in tree(out) if not name.startswith("front/")}
    assert names == {name for name in tree(learned) if not name.startswith("front/")}


def test_another_point_and_back(cli, learned, other, tmp_path):
    out = copied(learned, tmp_path / "out")
    result = cli("pick", out, "--point", other, "--json")
    assert result.code == 0, result.err
    check_picked(out, learned, other, tests=2)
    record = record_of(out)
    assert result.json == {
        "out": str(out), "point": other, "changed": True, "front": front_of(out), **record
    }  # fmt: skip
    scores = {s["name"]: s["value"] for s in record["scores"] if s["model"] == "patched"}
    # The run measured on test; another command says the same of what is there now.
    first = record_of(learned)
    assert [(s["name"], s["model"], s["split"]) for s in record["scores"]] == [
        (s["name"], s["model"], s["split"]) for s in first["scores"]
    ]
    patched = [s for s in first["scores"] if s["model"] == "patched"]
    assert scores != {s["name"]: s["value"] for s in patched}
    assert [s for s in first["scores"] if s["model"] == "base"] == [
        s for s in record["scores"] if s["model"] == "base"
    ]
    back = cli("pick", out, "--point", chosen_of(learned))
    assert back.code == 0, back.err
    check_picked(out, learned, chosen_of(learned), tests=3)
    assert record_of(out)["scores"] == first["scores"]
    assert "test 3 times" in back.out
    assert "forget_nll" in back.out
    assert "chosen" in back.out


def test_a_picked_point_is_what_other_commands_take(cli, world, learned, other, tmp_path):
    out = copied(learned, tmp_path / "out")
    assert cli("pick", out, "--point", other).code == 0
    nll = {}
    for name, path in (("run", out), ("point", out / "front" / front_of(out)[other - 1]["file"])):
        data = ["--text", world.fluent, "--json"]
        nll[name] = cli("eval", "--model", world.model, "--patch", path, *data).json["scores"]
    assert nll["run"] == nll["point"]
    # The same run command finds it finished, and measured anew it stays.
    again = ["run", learned / "recipe.yaml", "-o", out, "--json"]
    assert cli(*again).json["training"]["tradeoff"]["chosen"]["point"] == other
    measured = cli(*again, "--oracle", world.oracle).json
    assert measured["training"]["tradeoff"]["chosen"]["point"] == other
    assert measured["training"]["split_reads"]["test"] == 3


def test_the_chosen_point_again_changes_nothing(cli, learned, tmp_path, monkeypatch):
    out = copied(learned, tmp_path / "out")
    before = tree(out)
    monkeypatch.setattr("expunge.workbench.open_model", None)
    result = cli("pick", out, "--point", chosen_of(learned), "--json")
    assert result.code == 0, result.err
    assert result.json["changed"] is False
    assert "is the one chosen already" in result.err
    assert tree(out) == before


def test_it_is_measured_where_the_run_was(cli, world, tmp_path):
    for evaluate in (True, False):
        out = tmp_path / f"out-{evaluate}"
        settings = learned_settings(world, measure_on="validation", evaluate=evaluate)
        run(Recipe.build(settings), out)
        number = 1 if chosen_of(out) != 1 else 2
        before = record_of(out)["training"]
        assert before["split_reads"] == {"validation": before["looks"] + evaluate, "test": 0}
        record = cli("pick", out, "--point", number, "--json").json
        assert {s["split"] for s in record["scores"]} == ({"validation"} if evaluate else set())
        reads = {"validation": before["looks"] + 2 * evaluate, "test": 0}
        assert record["training"]["split_reads"] == reads
        assert chosen_of(out) == number


PLACES = {
    "after the front": (("expunge.picking", "", "save_front"), "after"),
    "while the patch is written": (("expunge.model.shards", "", "save_file"), "after"),
    "after the patch": (("expunge.model.patch", "Patch", "save"), "after"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_kill_is_mended_by_the_same_command(cli, learned, other, tmp_path, name):
    out = copied(learned, tmp_path / "out")
    place, when = PLACES[name]
    done = run_until(["pick", str(out), "--point", str(other)], place, 1, when, signal.SIGKILL)
    assert done.returncode == KILLED, done.stderr
    assert record_of(out) == record_of(learned)
    shown = cli("show", out)
    assert shown.code == 0
    assert f"the record is of point {chosen_of(learned)}: a pick was interrupted" in shown.err
    assert "takes another point" not in shown.err
    assert cli("pick", out, "--point", other).code == 0
    check_picked(out, learned, other, tests=2)
    assert "takes another point" in cli("show", out).err


def test_nothing_is_written_before_all_is_measured(cli, learned, other, tmp_path):
    out = copied(learned, tmp_path / "out")
    before = tree(out)
    place = ("expunge.evaluation.suite", "Suite", "measure")
    command = ["pick", str(out), "--point", str(other)]
    assert run_until(command, place, 2, "after", signal.SIGKILL).returncode == KILLED
    assert tree(out) == before


# ---- bad input


@pytest.mark.parametrize("number", [0, -1, 99])
def test_no_such_point(cli, learned, number):
    before = tree(learned)
    allowed = f"1 to {len(front_of(learned))}"
    check(cli("pick", learned, "--point", number), RECIPE, "no point", str(number), allowed, "show")
    assert tree(learned) == before


def test_words_that_do_not_fit(cli, learned):
    check(cli("pick", learned), RECIPE, "--point")
    check(cli("pick", learned, "--point", "best"), RECIPE, "--point", "integer")


def test_a_run_without_a_front(cli, finished, tmp_path):
    before = tree(finished)
    for folder in (finished, tmp_path / "nowhere"):
        check(cli("pick", folder, "--point", 1), PATCH, "No front", "--tradeoff learned")
    assert tree(finished) == before


def test_a_front_that_cannot_be_read(cli, learned, tmp_path):
    out = copied(learned, tmp_path / "out")
    for text in ("{", "[]", '[{"episode": 1}]', "3", '["x"]'):
        (out / "front.json").write_text(text)
        for command in (["pick", out, "--point", 1], ["show", out]):
            check(cli(*command), PATCH, "No front")


def test_a_run_that_is_not_finished(cli, learned, tmp_path):
    out = copied(learned, tmp_path / "out")
    (out / "record.json").unlink()
    check(cli("pick", out, "--point", 1), DATA, "record")


def test_a_patch_of_another_run(cli, learned, finished, other, tmp_path):
    out = copied(learned, tmp_path / "out")
    shutil.copy(finished / "patch.safetensors", out)
    before = tree(out)
    check(cli("pick", out, "--point", other), PATCH, "is not of the run that left the front")
    assert tree(out) == before


def test_a_point_whose_patch_is_gone(cli, learned, other, tmp_path):
    out = copied(learned, tmp_path / "out")
    name = front_of(out)[other - 1]["file"]
    (out / "front" / name).unlink()
    before = tree(out)
    check(cli("pick", out, "--point", other), PATCH, name)
    assert tree(out) == before


def test_data_that_has_changed(cli, learned, other, tmp_path):
    out = copied(learned, tmp_path / "out")
    settings = yaml.safe_load((out / "recipe.yaml").read_text())
    changed = write_lines(tmp_path / "forget.txt", sentences(20, seed=99))
    (out / "recipe.yaml").write_text(yaml.safe_dump({**settings, "forget": [str(changed)]}))
    before = tree(out)
    check(cli("pick", out, "--point", other), DATA, "The data has changed", "forget.txt")
    assert tree(out) == before


def test_a_base_that_has_changed(cli, world, learned, other, tmp_path):
    out = copied(learned, tmp_path / "out")
    settings = yaml.safe_load((out / "recipe.yaml").read_text())
    (out / "recipe.yaml").write_text(yaml.safe_dump({**settings, "model": str(world.oracle)}))
    before = tree(out)
    check(cli("pick", out, "--point", other), PATCH, "does not belong to this model")
    assert tree(out) == before
