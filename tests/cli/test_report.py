"""`expunge report` and `expunge card` on the command line, and the card of an export."""

from __future__ import annotations

import shutil

from huggingface_hub import ModelCard
from test_bad_input import DATA, check


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


def test_an_exported_adapter_has_a_card(cli, world, finished, tmp_path):
    asked = ("--model", world.model, "--rank", 2, "-o")
    assert cli("export", finished, *asked, tmp_path / "adapter").code == 0
    found = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert found.data.library_name == "peft" and "not of this adapter" in found.content
    shutil.copy(finished / "patch.safetensors", tmp_path)
    bare = cli("export", tmp_path / "patch.safetensors", *asked, tmp_path / "bare")
    assert bare.code == 0 and "no model card" in bare.err
    assert not (tmp_path / "bare" / "README.md").exists()
