"""Every command as a user calls it: what it prints, what it leaves on disk."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_world import CONTEXT, HIDDEN, INNER, LAYERS, SPECIAL, WORDS, sentences, write_lines
from transformers import AutoModelForCausalLM

import expunge
from expunge.defaults import fitting_tokens
from expunge.errors import RecipeError
from expunge.model.patch import Patch

NAMES = ["forget_accuracy", "retain_accuracy", "forget_nll", "retain_nll", "perplexity"]
SCORE_KEYS = {"name", "model", "split", "value", "ci_low", "ci_high", "n", "higher_is"}
RECORD_KEYS = {
    "function",
    "objective",
    "seed",
    "timing",
    "peak_memory_bytes",
    "provenance",
    "scores",
}
FILES = {"recipe.yaml", "patch.safetensors", "record.json", "losses.jsonl"}
TRAINED = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1, 2)]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def values(record: dict, role: str) -> dict[str, float]:
    return {s["name"]: s["value"] for s in record["scores"] if s["model"] == role}


def same_bits(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- run


def test_run_prints_one_json_object_of_the_promised_form(cli, world, tmp_path):
    out = tmp_path / "out"
    asked = ["--questions", world.questions, "--retain-questions", world.asked, "--json"]
    result = cli(*world.args(out, *asked, oracle=world.oracle, text=world.fluent))
    assert result.code == 0, result.err
    record = result.json
    assert record.keys() >= RECORD_KEYS
    assert names_in(out) == FILES
    assert json.loads((out / "record.json").read_text()) == {
        key: value for key, value in record.items() if key != "out"
    }
    assert (record["function"], record["objective"], record["seed"]) == (
        "knowledge",
        "cosine-rmu",
        0,
    )
    assert record["timing"].keys() == {"load", "prefix", "train", "evaluate"}
    assert all(seconds > 0 for seconds in record["timing"].values())
    assert record["peak_memory_bytes"] > 2**20
    assert set(record["provenance"]["data"]) == {
        str(path)
        for path in (world.forget, world.retain, world.questions, world.asked, world.fluent)
    }
    scores = record["scores"]
    assert [(s["model"], s["name"]) for s in scores] == [
        (role, name) for role in ("base", "patched", "oracle") for name in NAMES
    ]
    for score in scores:
        assert score.keys() >= SCORE_KEYS
        assert score["split"] == "test"
        assert score["ci_low"] <= score["value"] <= score["ci_high"]
        assert score["n"] == (5 if score["name"] == "perplexity" else 8)
    purpose = {s["name"]: s["higher_is"] for s in scores}
    assert purpose == dict(zip(NAMES, ["worse", "better", "better", "worse", "worse"], strict=True))
    assert values(record, "base") != values(record, "patched")
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "train" in result.err


def test_run_prints_a_table_for_people(cli, world, tmp_path):
    result = cli(*world.args(tmp_path / "out"))
    assert result.code == 0
    assert all(name in result.out for name in NAMES)
    assert "no forget questions" in result.out
    assert f"run directory: {tmp_path / 'out'}" in result.err


def test_patch_changes_the_trained_projections_alone(finished):
    patch = Patch.load(finished / "patch.safetensors")
    assert list(patch.names) == TRAINED
    assert all(float(delta.abs().max()) > 0 for delta in patch.deltas.values())
    training = patch.metadata["training"]
    assert (training["layer"], training["trained_layers"]) == (2, [0, 1, 2])


def test_recipe_round_trip(cli, world, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    more = ["--set", "evaluate=false", "--set", "target=centered"]
    assert cli(*world.args(first, *more, seed=3)).code == 0
    assert cli("run", first / "recipe.yaml", "-o", second).code == 0
    assert (first / "recipe.yaml").read_bytes() == (second / "recipe.yaml").read_bytes()
    assert same_bits(first / "patch.safetensors", second / "patch.safetensors")


def test_flags_win_over_the_recipe_and_set_wins_over_flags(cli, world, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "model": str(world.model),
        "forget": str(world.forget),  # one source needs no list
        "retain": [str(world.retain)],
        "objective": "adaptive-rmu",
        "objective_settings": {"scale": "first-batch", "beta": 9},
        "steps": 9,
        "seed": 9,
        "evaluate": False,
    }
    recipe.write_text(yaml.safe_dump(settings))
    overrides = ["--set", "seed=2", "--set", "objective_settings.beta=3", "--set", "lr=1e-3"]
    out = tmp_path / "out"
    result = cli("run", recipe, "--steps", 2, "--seed", 1, *overrides, "-o", out)
    assert result.code == 0, result.err
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (written["steps"], written["seed"], written["lr"]) == (2, 2, 0.001)
    # One setting within `objective_settings` was changed; the other stays.
    assert written["objective_settings"] == {"scale": "first-batch", "beta": 3}
    assert written["forget"] == [str(world.forget)]


def test_every_forget_file_is_a_topic_and_every_retain_file_is_rehearsed(cli, world, tmp_path):
    out = tmp_path / "out"
    more = ["--forget", world.second, "--retain", world.other, "--batch-size", "16"]
    record = cli(*world.args(out, *more, "--set", "evaluate=false", "--json")).json
    topics = [json.loads(line)["topic"] for line in (out / "losses.jsonl").read_text().splitlines()]
    assert topics == [0, 1, 0, 1]
    # 80 % of 20 and 12 forget texts (10, or 9 and 3), and of two files of 30.
    assert record["training"]["n_forget_texts"] == 16 + 10
    assert record["training"]["n_retain_texts"] == 24 + 24


def test_without_questions_forget_texts_are_held_back_and_measured(cli, world, tmp_path):
    record = cli(*world.args(tmp_path / "out", "--json")).json
    assert record["training"]["n_forget_texts"] == 16
    assert record["provenance"]["counts"]["test"]["forget_texts"] == 2
    by_name = {s["name"]: s for s in record["scores"] if s["model"] == "patched"}
    assert by_name["forget_accuracy"]["value"] is None
    assert by_name["forget_accuracy"]["reason"] == "no forget questions"
    assert by_name["forget_accuracy"]["n"] == 0
    assert by_name["forget_nll"]["n"] == 2
    assert by_name["forget_nll"]["value"] > 0


def test_with_questions_all_forget_texts_are_trained_on(cli, world, tmp_path):
    more = ["--questions", world.questions, "--batch-size", "8", "--set", "evaluate=false"]
    record = cli(*world.args(tmp_path / "out", *more, "--json")).json
    assert record["training"]["n_forget_texts"] == 20
    assert record["provenance"]["counts"]["test"]["forget_texts"] == 0


def test_no_more_texts_than_the_steps_read_go_through_the_prefix(cli, world, tmp_path):
    more = ["--questions", world.questions, "--batch-size", "2", "--set", "evaluate=false"]
    record = cli(*world.args(tmp_path / "out", *more, "--json")).json
    assert record["training"]["n_forget_texts"] == 4 * 2
    assert record["provenance"]["counts"]["validation"]["forget_questions"] == 2
    assert record["provenance"]["counts"]["test"]["forget_questions"] == 8


def test_evaluate_false_measures_nothing_and_true_measures_later_without_training(
    cli, world, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    record = cli(*world.args(out, "--set", "evaluate=false", "--json")).json
    assert record["scores"] == []
    assert record["timing"]["evaluate"] == 0
    before = (out / "patch.safetensors").read_bytes()
    monkeypatch.setattr("expunge.workbench.Workbench.train", None)
    later = cli(*world.args(out, "--json", oracle=world.oracle))
    assert later.code == 0, later.err
    assert {score["model"] for score in later.json["scores"]} == {"base", "patched", "oracle"}
    assert later.json["provenance"]["recipe"]["oracle"] == str(world.oracle)
    assert (out / "patch.safetensors").read_bytes() == before


def test_a_finished_run_is_not_run_again_unless_fresh(cli, world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = world.args(out, "--set", "evaluate=false", "--json")
    first = cli(*args)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = cli(*args)
    assert again.code == 0
    assert again.json == first.json
    assert "finished" in again.err
    assert "--fresh" in again.err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    fresh = cli(*args, "--fresh")
    assert fresh.code == 0
    assert (out / "patch.safetensors").stat().st_mtime_ns != stamps[out / "patch.safetensors"]
    other = cli(*world.args(out, "--fresh", "--json", "--set", "evaluate=false", steps=2))
    assert other.code == 0, other.err
    assert len((out / "losses.jsonl").read_text().splitlines()) == 2


def test_a_folder_with_a_recipe_alone_is_free(cli, world, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("model: killed before its first step\n")
    assert cli(*world.args(out, "--set", "evaluate=false")).code == 0
    assert names_in(out) == FILES


def test_batch_size_auto_takes_sixteen_at_a_step(cli, world, tmp_path):
    auto, plain = tmp_path / "auto", tmp_path / "plain"
    quick = ["--set", "evaluate=false"]
    assert cli(*world.args(auto, *quick, batch_size="auto", steps=2)).code == 0
    assert cli(*world.args(plain, *quick, batch_size=16, steps=2)).code == 0
    assert same_bits(auto / "patch.safetensors", plain / "patch.safetensors")
    assert yaml.safe_load((auto / "recipe.yaml").read_text())["batch_size"] == 16


def test_same_seed_same_bits_other_seed_other_bits(cli, world, tmp_path):
    quick = ["--set", "evaluate=false"]
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        assert cli(*world.args(tmp_path / name, *quick, seed=seed)).code == 0
    one, two, other = (tmp_path / name / "patch.safetensors" for name in ("one", "two", "other"))
    assert same_bits(one, two)
    assert not same_bits(one, other)


def test_boundaries_beyond_the_limit_go_to_a_file_that_is_gone_afterwards(cli, world, tmp_path):
    spilled, kept = tmp_path / "spilled", tmp_path / "kept"
    quick = ["--set", "evaluate=false"]
    result = cli(*world.args(spilled, *quick, "--set", "cache_gib=0"))
    assert result.code == 0
    assert "memory-mapped file" in result.err
    assert names_in(spilled) == FILES
    assert cli(*world.args(kept, *quick)).code == 0
    assert same_bits(spilled / "patch.safetensors", kept / "patch.safetensors")


def test_texts_beyond_the_models_context_are_cut_with_a_note(cli, world, tmp_path):
    long = write_lines(tmp_path / "long.txt", sentences(20, seed=8, longest=CONTEXT + 30))
    result = cli(*world.args(tmp_path / "out", "--json", forget=long, text=long))
    assert result.code == 0, result.err
    assert f"cut at {CONTEXT} tokens, the model's context" in result.err
    result = cli("eval", "--model", world.model, "--text", long, "--json")
    assert result.code == 0, result.err
    assert f"context is {CONTEXT} tokens" in result.err
    short = cli("eval", "--model", world.model, "--text", long, "--max-tokens", CONTEXT, "--json")
    assert short.json == result.json
    assert "context" not in short.err


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 100}, 100),
        ({"n_positions": 100}, 100),
        ({"text_config": {"max_position_embeddings": 100}}, 100),
        ({"max_position_embeddings": 4096}, 512),
        ({"max_position_embeddings": None}, 512),
        ({}, 512),
    ],
)
def test_context_of_a_config(config, tokens):
    assert fitting_tokens(512, config) == tokens


def test_overlap_can_be_dropped(cli, world, tmp_path):
    both = write_lines(tmp_path / "both.txt", sentences(30, seed=2) + sentences(20, seed=0)[:5])
    quick = ["--set", "evaluate=false", "--set", "on_overlap=drop", "--json", "--batch-size", "8"]
    result = cli(*world.args(tmp_path / "out", *quick, retain=both))
    assert result.code == 0, result.err
    assert "5 texts dropped that are forget texts too" in result.err
    assert result.json["training"]["n_retain_texts"] == 24


# ---- the library


def test_unlearn_gives_the_patch_that_run_writes(cli, world, tmp_path):
    out = tmp_path / "out"
    cli(*world.args(out, "--set", "evaluate=false", seed=4))
    patch = expunge.unlearn(
        world.model,
        forget=world.forget,
        retain=[world.retain],
        layer=2,
        steps=4,
        lr=0.01,
        batch_size=4,
        seed=4,
    )
    written = Patch.load(out / "patch.safetensors")
    assert patch.base == written.base
    assert all(torch.equal(patch.deltas[name], written.deltas[name]) for name in TRAINED)
    model = AutoModelForCausalLM.from_pretrained(world.model)
    before = model.model.layers[2].mlp.down_proj.weight.detach().clone()
    patch.apply_(model)
    moved = model.model.layers[2].mlp.down_proj.weight.detach() - before
    torch.testing.assert_close(moved, patch.deltas[TRAINED[2]], atol=1e-6, rtol=0)


def test_unlearn_refuses_before_weights_are_read(world, monkeypatch):
    monkeypatch.setattr("expunge.workbench.open_model", None)
    data = {"forget": world.forget, "retain": world.retain}
    with pytest.raises(RecipeError, match="did you mean 'cosine-rmu'"):
        expunge.unlearn(world.model, **data, objective="cosin-rmu")
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        expunge.unlearn(world.model, **data, stepz=3)


def test_importing_the_package_is_instant_and_silent():
    code = "import sys, expunge; print('torch' in sys.modules, expunge.__version__)"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"False {expunge.__version__}\n"
    assert done.stderr == ""


# ---- apply and eval


def test_apply_writes_a_model_with_the_patched_scores(cli, world, finished, tmp_path):
    out = tmp_path / "patched"
    patch = finished / "patch.safetensors"
    result = cli("apply", patch, "--model", world.model, "-o", out, "--json")
    assert result.code == 0, result.err
    assert result.json == {"out": str(out), "tensors": TRAINED, "scale": 1.0}
    base = load_file(world.model / "model.safetensors")
    changed = load_file(out / "model.safetensors")
    assert changed.keys() == base.keys()
    assert [name for name in base if not torch.equal(base[name], changed[name])] == TRAINED
    model = AutoModelForCausalLM.from_pretrained(out)
    loaded = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(loaded, base[TRAINED[1]] + Patch.load(patch).deltas[TRAINED[1]])

    data = ["--questions", world.questions, "--text", world.fluent, "--json"]
    on_disk = cli("eval", "--model", out, *data).json["scores"]
    in_memory = cli("eval", "--model", world.model, "--patch", finished, *data).json["scores"]
    untouched = cli("eval", "--model", world.model, *data).json["scores"]
    assert [score["model"] for score in in_memory] == ["patched"] * 4
    assert [s["value"] for s in on_disk] == [s["value"] for s in in_memory]
    assert [s["value"] for s in on_disk] != [s["value"] for s in untouched]


def test_scale_zero_is_the_base_byte_for_byte_and_half_is_half(cli, world, finished, tmp_path):
    none, half = tmp_path / "none", tmp_path / "half"
    assert cli("apply", finished, "--model", world.model, "-o", none, "--scale", 0).code == 0
    name = "model.safetensors"
    assert (none / name).read_bytes() == (world.model / name).read_bytes()
    assert cli("apply", finished, "--model", world.model, "-o", half, "--scale", 0.5).code == 0
    delta = Patch.load(finished / "patch.safetensors").deltas[TRAINED[0]]
    base = load_file(world.model / name)[TRAINED[0]]
    assert torch.equal(load_file(half / name)[TRAINED[0]], base + 0.5 * delta)


def test_eval_of_a_run_agrees_with_its_record(cli, world, finished, tmp_path):
    """The record's test questions, measured again by another command."""
    from expunge.functions.base import DataSettings
    from expunge.functions.knowledge import load_knowledge

    settings = DataSettings(
        (str(world.forget),), (str(world.retain),), questions=str(world.questions)
    )
    test = load_knowledge(settings).measured["test"].forget_questions
    prompts = "\n".join(question.prompt for question in test)
    lines = world.questions.read_text().splitlines()
    held_back = [line for line in lines if json.loads(line)["question"] in prompts]
    assert len(held_back) == 8
    file = write_lines(tmp_path / "test.jsonl", held_back)
    scores = cli(
        "eval", "--model", world.model, "--patch", finished, "--questions", file, "--json"
    ).json["scores"]
    record = json.loads((finished / "record.json").read_text())
    expected = values(record, "patched")
    assert scores[0]["value"] == pytest.approx(expected["forget_accuracy"], abs=1e-9)
    assert scores[1]["value"] == pytest.approx(expected["forget_nll"], abs=1e-5)


def test_eval_json(cli, world):
    result = cli("eval", "--model", world.model, "--text", world.fluent, "--json")
    assert result.code == 0, result.err
    nll, perplexity = result.json["scores"]
    assert (nll["name"], perplexity["name"]) == ("text_nll", "perplexity")
    assert nll.keys() >= SCORE_KEYS
    assert (nll["model"], nll["split"], nll["n"]) == ("base", "all", 10)
    assert perplexity["value"] == pytest.approx(math.exp(nll["value"]), rel=1e-6)
    table = cli("eval", "--model", world.model, "--text", world.fluent)
    assert "perplexity" in table.out
    assert "text_nll" in table.out


# ---- plan


def test_plan_counts_without_loading(cli, world, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were opened")

    monkeypatch.setattr("expunge.model.checkpoint.open_model", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("expunge.model.shards.TensorInfo.read", refuse)
    asked = ["--layer", 2, "--steps", 3, "--batch-size", 4, "--tokens", 10]
    result = cli("plan", "--model", world.model, *asked, "--json")
    assert result.code == 0, result.err
    plan = result.json

    words = len(SPECIAL) + len(WORDS)
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2  # q, o; k, v with half the heads
    projection = HIDDEN * INNER
    layer = attention + 3 * projection + 2 * HIDDEN
    embedding = words * HIDDEN
    whole = LAYERS * layer + 2 * embedding + HIDDEN
    assert (plan["layer"], plan["trained_layers"]) == (2, [0, 1, 2])
    assert (plan["layers_read"], plan["layers_total"]) == (3, LAYERS)
    assert plan["bytes_total"] == 4 * whole
    assert plan["bytes_read"] == 4 * (3 * layer + embedding)
    # Once for 3 x 4 forget and as many retain texts of 10 tokens, two operations a weight: what
    # lies before the first product for all, layers 0 to 2 for retain texts.
    assert plan["flops_prefix"] == 2 * (layer - projection + 3 * layer) * 120
    # The segment forward and back, and the trained matrices' own gradient.
    segment = 2 * layer + projection
    assert plan["flops_train"] == (4 * segment + 2 * 3 * projection) * 240
    # Weights in float32, and of each trained one the gradient and two moments.
    assert plan["memory_weights"] == 4 * (3 * layer + embedding) + 12 * 3 * projection
    # The projection's input and the residual of each token, the reference of retain texts'.
    assert plan["memory_boundaries"] == (240 * (INNER + HIDDEN) + 120 * HIDDEN) * 4
    assert plan["seconds"] > 0
    assert (plan["measured"], plan["efficiency"], plan["dtype"]) == (True, 0.5, "float32")
    # An action is a step here, and an episode two; a look comes after each action.
    learned, looks = plan["learned"], 29 * 2 + 2 * 3
    assert (learned["episodes"], learned["episode_steps"], learned["looks"]) == (30, 2, looks)
    assert learned["flops_train"] == pytest.approx(plan["flops_train"] / 3 * (29 * 2 + 2 * 3))
    run = LAYERS * layer + embedding
    # The base's look and the others, at 32 questions of either side and 8 texts of 10 tokens.
    assert learned["flops_looks"] == 2 * run * (looks + 1) * (2 * 32 * 128 + 8 * 10)
    assert learned["flops_closer"] == 2 * run * (18 + 1) * (2 * 256 * 128 + 64 * 10)
    assert learned["memory_weights"] == 4 * whole + 12 * 3 * projection
    rate = plan["matmul_flops"] * 0.5
    work = plan["flops_prefix"] + learned["flops_train"] + learned["flops_looks"]
    work += learned["flops_closer"]
    assert learned["seconds"] == pytest.approx(work / rate)


def test_plan_of_a_learned_tradeoff_with_other_numbers(cli, world):
    asked = [
        "--steps",
        40,
        "--episodes",
        5,
        "--episode-steps",
        25,
        "--look-items",
        7,
        "--tokens",
        8,
    ]
    plan = cli("plan", "--model", world.model, *asked, "--json").json
    learned = plan["learned"]
    # 25 steps take nine actions of 3, which are 27; 14 in the run and in the first, as long.
    assert (learned["looks"], learned["look_items"]) == (4 * 9 + 2 * 14, 7)
    assert learned["flops_train"] == plan["flops_train"] / 40 * (4 * 27 + 2 * 40)
    assert cli("plan", "--model", world.model, "--episodes", 0, "--json").json["learned"] is None


def test_plan_of_a_preset_without_its_files(cli):
    """The preset brings the run's settings; flags win."""
    plan = cli("plan", "--model", "llama-3.1-8b", "--device", "h100", "--json").json
    assert (plan["layer"], plan["trained_layers"], plan["dtype"]) == (7, [5, 6, 7], "bfloat16")
    assert (plan["device"], plan["measured"], plan["matmul_flops"]) == ("h100", False, 989e12)
    assert plan["bytes_total"] == 2 * 8_030_261_248
    attention, projection = 2 * 4096 * (4096 + 1024), 4096 * 14336
    layer = attention + 3 * projection + 2 * 4096
    head = 128256 * 4096
    assert plan["bytes_read"] == 2 * (8 * layer + head)
    assert plan["flops_prefix"] == 2 * (6 * layer - projection + 8 * layer) * 150 * 4 * 512
    optimiser = 3 * projection * (2 + 8 + 4)
    assert plan["memory_weights"] == 2 * (8 * layer + head) + optimiser
    assert plan["learned"]["memory_weights"] == 2 * 8_030_261_248 + optimiser
    # Each look from layer 5 on, the first from the bottom.
    looks = (27 * layer + head) * (1 + 29 * 2 + 2 * 15) + 5 * layer
    assert plan["learned"]["flops_looks"] == 2 * looks * (2 * 32 * 128 + 8 * 512)
    closer = (27 * layer + head) * (1 + 18) + 5 * layer
    assert plan["learned"]["flops_closer"] == 2 * closer * (2 * 256 * 128 + 64 * 512)
    # By angles: no layer above the one read, texts of either side, as many at the end as 128.
    angles = cli(
        *("plan", "--model", "llama-3.1-8b", "--device", "h100", "--json"),
        *("--reward", "representation"),
    ).json["learned"]
    segment, below = projection + 2 * layer, 6 * layer - projection
    assert angles["flops_looks"] == 2 * (below + segment * (1 + 29 * 2 + 2 * 15)) * 2 * 32 * 512
    assert angles["flops_closer"] == 2 * (below + segment * (1 + 18)) * 2 * 128 * 512
    assert angles["memory_weights"] == plan["memory_weights"]
    deeper = cli(
        *("plan", "--model", "llama-3.1-8b", "--device", "h100", "--json"),
        *("--layer", 11, "--steps", 10, "--dtype", "float32"),
    ).json
    assert (deeper["layer"], deeper["trained_layers"]) == (11, [9, 10, 11])
    assert (deeper["matmul_flops"], deeper["learned"]["episode_steps"]) == (67e12, 2)


def test_a_plan_as_a_table_adds_the_memory_up(cli):
    asked = ("plan", "--model", "Qwen/Qwen2.5-7B", "--device", "h100")
    plan, table = cli(*asked, "--json").json, cli(*asked).out
    step, learned = plan["memory_step"], plan["learned"]["memory_weights"]
    one, both = (f"{(it + step) / 2**30:.2f} GiB" for it in (plan["memory_weights"], learned))
    row = next(line for line in table.splitlines() if line.strip("│┃ ").startswith("both"))
    assert one in row and both in row


def test_a_reward_that_there_is_not_cannot_be_planned(cli, world):
    result = cli("plan", "--model", world.model, "--reward", "bleu")
    assert result.code == 2 and "likelihood, representation" in " ".join(result.err.split())


def test_plan_table_and_depth(cli, world):
    result = cli("plan", "--model", world.model, "--layer", 3, "--tokens", 8)
    assert result.code == 0
    assert "4 of 4" in result.out
    assert "1, 2, 3" in result.out
    assert "learned trade-off" in result.out and "measured here on cpu" in result.out
    assert "88 x 2 x 32 questions" in result.out and "18 closer looks" in result.out
    deep = ("plan", "--model", "qwen2.5-7b", "--device", "rtx4090")
    assert "28 of 28" in cli(*deep).out
    angles = cli(*deep, "--reward", "representation")
    assert "x 2 x 32 texts" in angles.out and "28 of 28" not in angles.out
    alone = cli("plan", "--model", "qwen2.5-7b", "--device", "rtx4090", "--episodes", 0)
    assert "7 of 28" in alone.out and "learned" not in alone.out
    assert "published for rtx4090: a rough guess" in " ".join(alone.out.split())
    narrow = cli("plan", "--model", world.model, "--dtype", "bfloat16", "--json").json
    wide = cli("plan", "--model", world.model, "--json").json
    assert narrow["memory_boundaries"] * 2 == wide["memory_boundaries"]


# ---- ls and show


def test_ls_lists_parts(cli):
    parts = cli("ls", "--json").json
    assert {"cosine-rmu", "rmu", "adaptive-rmu"} <= {part["name"] for part in parts["objectives"]}
    assert {"profs", "project-out", "banned-words"} <= {part["name"] for part in parts["edits"]}
    assert [part["name"] for part in parts["functions"]] == ["knowledge", "toxicity"]
    assert all(part["source"] for kind in parts.values() for part in kind)
    assert "cosine-rmu" in cli("ls").out


def test_ls_lists_runs(cli, finished, tmp_path):
    for name in ("a", "deeper/b"):
        shutil.copytree(finished, tmp_path / name)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("model: x\n")
    runs = cli("ls", tmp_path, "--json").json["runs"]
    assert [run["run"] for run in runs] == [str(tmp_path / "a"), str(tmp_path / "deeper/b")]
    assert runs[0]["scores"][0]["name"] == "forget_accuracy"
    table = cli("ls", tmp_path).out
    assert "2 runs" in table
    assert "cosine-rmu" in table
    assert cli("ls", tmp_path / "unfinished", "--json").json == {"runs": []}


def test_show_a_run_and_a_patch(cli, finished):
    record = json.loads((finished / "record.json").read_text())
    assert cli("show", finished, "--json").json == record
    assert cli("show", finished / "record.json", "--json").json == record
    shown = cli("show", finished).out
    assert "forget_accuracy" in shown
    assert "peak memory" in shown
    patch = cli("show", finished / "patch.safetensors", "--json").json
    assert patch["tensors"] == TRAINED
    assert patch["recipe"]["layer"] == 2
    assert patch["norm"] == pytest.approx(Patch.load(finished / "patch.safetensors").norm())
    assert TRAINED[1] in cli("show", finished / "patch.safetensors").out


# ---- demo


@pytest.fixture
def small_demo(world, monkeypatch):
    """The demo's own code over the tiny world, a few steps a run."""
    from expunge import demo as module

    common = {
        "model": str(world.model),
        "oracle": str(world.oracle),
        "retain": [str(world.retain)],
        "retain_questions": str(world.asked),
        "text": str(world.fluent),
        "lr": 0.01,
    }
    knowledge = {
        "forget": [str(world.forget)],
        "questions": str(world.questions),
        "calibrate": False,  # as in the demo, the layer is known
        "steps": 4,
        "batch_size": 4,
    }
    toxicity = {
        "function": "toxicity",
        "pairs": str(world.pairs),
        "prompts": str(world.prompts),
        "scorers": [f"words:{world.words}", "tfidf"],
        "samples": 2,
        "new_tokens": 5,
        "steps": 8,
        "batch_size": 12,
        **module.TOXICITY,
    }
    for name, own in (("demo_recipe", knowledge), ("toxicity_recipe", toxicity)):

        def recipe(_data, own=own, **changes):
            return module.Recipe.build({**common, **own, **changes})

        monkeypatch.setattr(module, name, recipe)
    monkeypatch.setattr("expunge.jobs.default_workers", lambda _jobs: 1)


@pytest.mark.usefixtures("small_demo")
def test_demo_leaves_a_run_directory_for_each_run(cli, tmp_path):
    out = tmp_path / "demo"
    result = cli("demo", "-o", out, "--seeds", 2, "--json")
    assert result.code == 0, result.err
    learned = ("cosine-rmu", "rmu", "adaptive-rmu", "multi-layer-probe")
    measured = ("sum-toxicity", "sum-knowledge", "multi-layer-probe-knowledge")
    made = {name: {f"{name}-seed{seed}" for seed in (0, 1)} for name in (*learned, *measured)}
    assert names_in(out) == {"data"}.union(*made.values())
    for name, folders in made.items():
        files = FILES if name in learned else FILES - {"losses.jsonl"}
        files = files | {"probes.safetensors"} if name == "multi-layer-probe" else files
        assert all(names_in(out / folder) == files for folder in folders)
    summary = result.json
    assert summary.keys() == {"seconds", "knowledge", "toxicity"}
    both = "knowledge + toxicity"
    knowledge, toxicity = summary["knowledge"], summary["toxicity"]
    assert [score["name"] for score in knowledge["base"]] == NAMES
    assert [score["model"] for score in knowledge["oracle"]] == ["oracle"] * 5
    assert list(knowledge["runs"]) == [*learned[:3], both, "multi-layer-probe"]
    assert list(toxicity["runs"]) == ["multi-layer-probe", both]
    for part, name, key in (
        (knowledge, "forget_nll", ("forget_nll", None, None)),
        (toxicity, "neutral_nll", ("neutral_nll", None, None)),
        (toxicity, "toxicity_rate/openings/tfidf", ("toxicity_rate", "openings", "tfidf")),
    ):
        assert part["objectives"].keys() == part["runs"].keys()
        for column, runs in part["runs"].items():
            assert [run["seed"] for run in runs] == [0, 1]
            patched = [
                score["value"]
                for run in runs
                for score in run["scores"]
                if (score["name"], score["prompts"], score["scorer"]) == key
                and score["model"] == "patched"
            ]
            assert len(patched) == 2
            assert part["objectives"][column][name]["mean"] == pytest.approx(sum(patched) / 2)
    # A sum is that of the two runs of its seed.
    parts = [f"{name}-seed1" for name in ("cosine-rmu", "multi-layer-probe")]
    one, other, total = (
        Patch.load(out / name / "patch.safetensors") for name in (*parts, "sum-knowledge-seed1")
    )
    assert total == one + other
    assert list(toxicity["runs"][both][1]["training"]["parts"]) == parts
    alone = yaml.safe_load((out / "rmu-seed1" / "recipe.yaml").read_text())
    assert (alone["objective"], alone["seed"]) == ("rmu", 1)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = cli("demo", "-o", out, "--seeds", 2)
    assert again.code == 0
    assert "retrained oracle" in again.out
    lines = [line.strip().split("  ")[0] for line in again.out.splitlines()]
    for part in (knowledge, toxicity):
        assert all(f"{name} (2)" in lines for name in part["runs"])
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


# ---- help


@pytest.mark.parametrize(
    "command", ["run", "demo", "apply", "export", "eval", "plan", "ls", "show"]
)
def test_help_describes_every_option(cli, command):
    result = cli(command, "--help")
    assert result.code == 0
    assert result.err == ""
    assert f"expunge {command}" in result.out or f"Usage: {command}" in result.out
    from typer.main import get_command

    from expunge.cli import app

    parameters = get_command(app).commands[command].params
    assert parameters
    assert all(parameter.help for parameter in parameters if parameter.name != "help")


def test_no_arguments_give_the_help(cli):
    result = cli()
    assert result.code == 0
    assert "demo" in result.out
    assert "Usage" in result.out


def test_version_is_the_packages_own(cli):
    result = cli("--version")
    assert (result.code, result.out, result.err) == (0, f"expunge {version('expunge')}\n", "")


@pytest.mark.parametrize("module", ["expunge", "expunge.cli"])
def test_runs_as_a_module(module):
    command = [sys.executable, "-m", module]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0 and f"Usage: python -m {module} " in helped.stdout
    wrong = subprocess.run([*command, "rum"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
