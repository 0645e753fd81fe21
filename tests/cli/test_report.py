"""`expunge report` and `expunge card` on the command line, and the card of an export."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import ModelCard
from learned_world import learned_settings, record_of
from test_bad_input import DATA, RECIPE, check

from expunge.recipe import Recipe
from expunge.run import run


def test_report_of_a_run_and_of_a_folder(cli, finished, tmp_path):
    out = tmp_path / "page.html"
    result = cli("report", finished, "-o", out, "--figures", tmp_path / "figures", "--json")
    assert result.code == 0, result.err
    told = result.json
    assert told["out"] == str(out) and told["runs"] == 1 and told["left_out"] == 0
    assert {str(path) for path in (tmp_path / "figures").iterdir()} == {*told["figures"]}
    assert len(told["figures"]) > 3
    page = out.read_text(encoding="utf-8")
    assert "<!doctype html>" in page and 'id="scores"' in page
    assert str(tmp_path) not in page and str(finished) not in page
    shutil.copytree(finished, tmp_path / "runs" / "one")
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "record.json").write_text("{")
    result = cli("report", tmp_path / "runs", "-o", out)
    assert result.code == 0, result.err
    assert "left out: " in result.err and "1 left out" in out.read_text(encoding="utf-8")


def test_report_refuses(cli, finished, tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    check(cli("report", finished, "-o", mine), DATA, "something else of that name")
    check(cli("report", tmp_path), DATA, "no run to report on")
    check(cli("report", tmp_path / "nowhere"), DATA, "no such folder")
    assert mine.read_text() == "mine"


def test_card_is_printed_or_written(cli, finished, tmp_path):
    printed = cli("card", finished)
    assert printed.code == 0, printed.err
    assert ModelCard(printed.out).data.eval_results
    written = cli("card", finished, "-o", tmp_path)
    assert written.code == 0 and (tmp_path / "README.md").read_text() == printed.out
    (tmp_path / "README.md").write_text("mine")
    check(cli("card", finished, "-o", tmp_path), DATA, "did not write", "--replace")
    assert cli("card", finished, "-o", tmp_path, "--replace").code == 0
    named = cli("card", finished, "--base-model", "owner/name")
    assert ModelCard(named.out).data.base_model == "owner/name"
    check(cli("card", finished, "--base-model", "lab7m"), RECIPE, "no name", "owner/name")


@pytest.fixture(scope="module")
def learned(world, tmp_path_factory):
    """A learned run, and one whose policy it taught."""
    first, second = (tmp_path_factory.mktemp("learned") / name for name in ("first", "second"))
    run(Recipe.build(learned_settings(world, episodes=2)), first)
    run(Recipe.build(learned_settings(world, policy_from=str(first))), second)
    return first, second


def test_the_reward_of_each_episode_is_drawn(cli, learned, tmp_path):
    first, _ = learned
    told = cli("report", first, "-o", tmp_path / "page.html", "--figures", tmp_path, "--json").json
    (drawn,) = [name for name in told["figures"] if name.endswith("-rewards.svg")]
    tried = record_of(first)["training"]["tradeoff"]["tried"]
    ends = f"from {tried[0]['reward']:.3g} to {tried[-1]['reward']:.3g}"
    assert len(tried) == 3 and ends in (tmp_path / drawn).read_text(encoding="utf-8")


def test_a_run_without_episodes_of_its_own_is_drawn(cli, learned, tmp_path):
    pytest.importorskip("matplotlib")
    _, second = learned
    drawn = cli("show", second, "--figure", tmp_path / "a.svg")
    assert drawn.code == 0, drawn.err
    assert "last run" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_an_exported_adapter_has_a_card(cli, world, finished, tmp_path):
    asked = ("--model", world.model, "--rank", 2, "-o")
    assert cli("export", finished, *asked, tmp_path / "adapter").code == 0
    found = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert found.data.library_name == "peft" and "not of this adapter" in found.content
    shutil.copy(finished / "patch.safetensors", tmp_path)
    bare = cli("export", tmp_path / "patch.safetensors", *asked, tmp_path / "bare")
    assert bare.code == 0 and "no model card" in bare.err
    assert not (tmp_path / "bare" / "README.md").exists()
