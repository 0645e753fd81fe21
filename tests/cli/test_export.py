"""`expunge export`, and what `apply` and `eval` are told beside the files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import MODEL, PATCH, RECIPE, check

from expunge.model.patch import Patch


def test_export_tells_what_the_rank_loses(cli, world, finished, tmp_path):
    out = tmp_path / "adapter"
    result = cli("export", finished, "--model", world.model, "--rank", 2, "-o", out, "--json")
    assert result.code == 0, result.err
    patch = Patch.load(finished / "patch.safetensors")
    told = result.json
    assert told["out"] == str(out)
    assert told["errors"].keys() == {*patch.names}
    tensors = load_file(out / "adapter_model.safetensors")
    for name, delta in patch.deltas.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        kept = tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
        error = float(torch.linalg.norm(delta - kept) / torch.linalg.norm(delta))
        assert told["errors"][name] == pytest.approx(error, rel=1e-3)
        assert 0.01 < error < 1
    assert min(told["errors"].values()) <= told["total_error"] <= max(told["errors"].values())
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2


def test_export_of_full_rank_is_exact(cli, world, finished, tmp_path):
    asked = ("export", finished / "patch.safetensors", "--model", world.model, "--rank", 99)
    result = cli(*asked, "-o", tmp_path / "adapter")
    assert result.code == 0, result.err
    assert "total" in result.out
    assert result.out.count("0.0000") == 4


def test_export_refuses(cli, world, finished, tmp_path):
    asked = ("export", finished, "--rank", 2)
    other = cli(*asked, "--model", world.oracle, "-o", tmp_path / "adapter")
    check(other, PATCH, "does not belong to this model")
    (tmp_path / "file").write_text("x")
    full = cli(*asked, "--model", world.model, "-o", tmp_path)
    check(full, MODEL, "The adapter needs a directory of its own")
    assert not (tmp_path / "adapter").exists()


def test_apply_moves_its_bar_by_bytes(cli, world, finished, tmp_path, monkeypatch):
    moves = []

    class Watching:
        def phase(self, title, total):
            from contextlib import nullcontext

            return nullcontext(lambda amount, note="", total=None: moves.append((amount, total)))

    monkeypatch.setattr("expunge.console.progress", Watching)
    assert cli("apply", finished, "--model", world.model, "-o", tmp_path / "new").code == 0
    (total,) = {total for _, total in moves}
    assert sum(amount for amount, _ in moves) == total
    assert total == sum(path.stat().st_size for path in world.model.iterdir())


def test_eval_in_another_dtype(cli, world, finished):
    asked = ("eval", "--model", world.model, "--text", world.fluent, "--json")
    wide, narrow = cli(*asked), cli(*asked, "--dtype", "bfloat16", "--trust-remote-code")
    values = [result.json["scores"][0]["value"] for result in (wide, narrow)]
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=0.05)
    check(cli(*asked, "--dtype", "int8"), RECIPE, "Unknown dtype", "bfloat16")
    rounded = cli(*asked, "--dtype", "bfloat16", "--patch", finished)
    check(rounded, PATCH, "cannot hold what is on disk")


def test_tilde_in_a_model_path(cli, world, monkeypatch):
    monkeypatch.setenv("HOME", str(world.root))
    assert cli("eval", "--model", "~/base", "--text", world.fluent).code == 0
    check(cli("plan", "--model", "~nobody-at-all/base"), MODEL, "There is no model")


def test_ls_names_a_record_that_cannot_be_read(cli, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_text("{")
    result = cli("ls", tmp_path, "--json")
    assert result.code == 0
    assert [run["run"] for run in result.json["runs"]] == [str(tmp_path / "good")]
    assert str(tmp_path / "bad" / "record.json") in result.err
