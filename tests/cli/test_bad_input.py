"""Every mistake of a user: four parts, an exit code of its own, nothing half-written left."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_world import (
    CONTEXT,
    INNER,
    WORDS,
    Result,
    World,
    questions,
    save_model,
    save_tokenizer,
    sentences,
    write_lines,
    write_rows,
)

from expunge.model.segment import Segment
from expunge.objectives import OBJECTIVES
from expunge.objectives.base import Loss
from expunge.registry import Entry
from expunge.training.state import TrainingState

RECIPE, DATA, MODEL, PATCH, TRAINING, RESOURCE = 2, 3, 4, 5, 6, 7
PARTS = ("error: ", "\n  got: ", "\n  allowed: ", "\n  fix: ")
QUICK = ("--set", "evaluate=false")


def check(result: Result, code: int, *said: str) -> None:
    """The exit code, all four parts with something in each, what they say, and no traceback."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    at = 0
    for part, following in zip(PARTS, (*PARTS[1:], None), strict=True):
        at = result.err.index(part, at) + len(part)
        end = len(result.err) if following is None else result.err.index(following, at)
        assert result.err[at:end].strip(), f"{part!r} is empty"
    for words in said:
        assert words in result.err, f"{words!r} is not in:\n{result.err}"


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder with their contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- settings of a run

SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, Any], int, tuple[str, ...]]] = {
    "no steps": ((), {"steps": 0}, RECIPE, ("steps", "0", "greater than or equal to 1")),
    "steps are no number": ((), {"steps": "many"}, RECIPE, ("--steps", "integer")),
    "half a step": (("--set", "steps=1.5"), {}, RECIPE, ("steps", "1.5")),
    "yes steps": (("--set", "steps=yes"), {}, RECIPE, ("steps", "not true or false")),
    "negative rate": ((), {"lr": -1}, RECIPE, ("lr", "-1", "greater than 0")),
    "rate of zero": ((), {"lr": 0}, RECIPE, ("lr", "greater than 0")),
    "rate in words": ((), {"lr": "fast"}, RECIPE, ("lr", "'fast'", "'auto'")),
    "rate that is no number": ((), {"lr": "nan"}, RECIPE, ("lr", "nan", "finite")),
    "infinite rate": ((), {"lr": "inf"}, RECIPE, ("lr", "inf", "finite")),
    "layer above the model": ((), {"layer": 99}, RECIPE, ("layer 99", "0 to 3")),
    "layer just above": ((), {"layer": 4}, RECIPE, ("layer 4", "0 to 3")),
    "layer below the model": ((), {"layer": -1}, RECIPE, ("layer -1", "0 to 3")),
    "layer in words": ((), {"layer": "deep"}, RECIPE, ("layer", "'deep'")),
    "no trained layer": (
        ("--set", "trained_layers=[]"),
        {},
        RECIPE,
        ("trained_layers []", "0 to 2"),
    ),
    "trained above what is read": (
        ("--set", "trained_layers=[3]"),
        {"layer": 2},
        RECIPE,
        ("trained_layers [3]", "0 to 2"),
    ),
    "batch of nothing": ((), {"batch_size": 0}, RECIPE, ("batch_size", "1")),
    "micro-batch of nothing": (("--set", "micro_batch_size=0"), {}, RECIPE, ("micro_batch_size",)),
    "negative seed": ((), {"seed": -1}, RECIPE, ("seed", "-1")),
    "one token": (("--set", "max_tokens=1"), {}, RECIPE, ("max_tokens", "2")),
    "unknown dtype": (("--set", "dtype=float8"), {}, RECIPE, ("dtype", "float8", "bfloat16")),
    "dtype below the base's": (
        ("--set", "dtype=bfloat16"),
        {},
        RECIPE,
        ("bfloat16", "stored in float32"),
    ),
    "device without numbers": (("--set", "device=meta"), {}, RECIPE, ("'meta", "cpu")),
    "empty model name": ((), {"model": ""}, RECIPE, ("model", "at least 1 character")),
    "empty file name": ((), {"forget": ""}, RECIPE, ("forget", "at least 1 character")),
    "empty questions": ((), {"questions": ""}, RECIPE, ("questions", "at least 1 character")),
    "no such device": (("--set", "device=gpu"), {}, RECIPE, ("'gpu", "cpu")),
    "unknown objective": (
        (),
        {"objective": "cosin-rmu"},
        RECIPE,
        ("'cosin-rmu'", "did you mean 'cosine-rmu'?"),
    ),
    "unknown function": (
        (),
        {"function": "knowlege"},
        RECIPE,
        ("'knowlege'", "did you mean 'knowledge'?"),
    ),
    "unknown key": (("--set", "stepz=3"), {}, RECIPE, ("'stepz'", "did you mean 'steps'?")),
    "unknown objective setting": (
        ("--set", "objective_settings.betta=3"),
        {"objective": "adaptive-rmu"},
        RECIPE,
        ("'betta'", "did you mean 'beta'?"),
    ),
    "objective setting in words": (
        ("--set", "objective_settings.beta=much"),
        {"objective": "adaptive-rmu"},
        RECIPE,
        ("beta", "'much'", "float"),
    ),
    "objective setting of a list": (
        ("--set", "objective_settings.beta=[1]"),
        {"objective": "adaptive-rmu"},
        RECIPE,
        ("objective_settings", "[1]"),
    ),
    "unknown choice of an objective": (
        ("--set", "objective_settings.scale=some"),
        {"objective": "adaptive-rmu"},
        RECIPE,
        ("'some'", "per-sample, first-batch"),
    ),
    "inside a number": (("--set", "steps.x=1"), {}, RECIPE, ("steps", "{'x': 1}")),
    "set without a value": (("--set", "steps"), {}, RECIPE, ("'steps'", "key=value")),
    "set without a key": (("--set", "=3"), {}, RECIPE, ("'=3'", "key=value")),
    "set of bad YAML": (("--set", "lr=[1"), {}, RECIPE, ("value of lr", "'[1'")),
    "set of an impossible date": (("--set", "text=2020-13-45"), {}, RECIPE, ("text", "2020-13-45")),
    "trained below the model": (
        ("--set", "trained_layers=[-1]"),
        {},
        RECIPE,
        ("trained_layers [-1]", "0 to 2"),
    ),
    "no model": ((), {"model": None}, RECIPE, ("lacks model", "--model")),
    "no forget": ((), {"forget": None}, RECIPE, ("lacks forget", "--forget")),
    "no retain": ((), {"retain": None}, RECIPE, ("lacks retain", "--retain")),
    "unknown flag": (("--stepz", "3"), {}, RECIPE, ("--stepz", "did you mean '--steps'?")),
    "flag without a value": (("--seed",), {}, RECIPE, ("--seed",)),
    "oracle that is not there": (
        ("--set", "evaluate=true"),
        {"oracle": "/no/such/oracle"},
        MODEL,
        ("/no/such/oracle",),
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_setting(cli, world, tmp_path, case):
    more, changes, code, said = SETTINGS[case]
    result = cli(*world.args(tmp_path / "out", *QUICK, *more, **changes))
    check(result, code, *said)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu(cli, world, tmp_path):
    check(cli(*world.args(tmp_path / "out", "--set", "device=cuda")), RECIPE, "'cuda", "cpu")
    asked = ["--text", world.fluent, "--device", "cuda"]
    check(cli("eval", "--model", world.model, *asked), RECIPE, "'cuda", "cpu")
    assert tree(tmp_path) == {}


# ---- recipe files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ("is not a mapping", "an empty file")),
        (b"- a\n- b\n", ("is not a mapping", "list")),
        (b"steps: [1\n", ("cannot be read", "ParserError")),
        (b"when: 2020-13-45\n", ("cannot be read", "month")),
        (b"\xff\xfe\x00", ("cannot be read",)),
        (b"1: 2\nmodel: m\nforget: a\nretain: b\n", ("unknown key", "'1'")),
        (b"model: 5\nforget: [a]\nretain: [b]\n", ("model", "5", "string")),
        (b"model: m\nforget: [a]\nretain: []\n", ("retain", "at least 1")),
        (b"model: m\nforget: {a: b}\nretain: [b]\n", ("forget",)),
    ],
    ids=["empty", "list", "not YAML", "no date", "binary", "number", "model", "none", "mapping"],
)
def test_bad_recipe_file(cli, tmp_path, content, said):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    check(cli("run", recipe, "-o", tmp_path / "out"), RECIPE, *said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["missing.yaml", "."])
def test_no_recipe_file(cli, tmp_path, where):
    check(cli("run", tmp_path / where, "-o", tmp_path / "out"), RECIPE, "cannot be read", "Error")


# ---- data files


def _data(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


BAD_TEXTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "missing": (lambda folder: folder / "nothing.txt", ("No such file", "nothing.txt")),
    "empty": (_data("a.txt", b""), ("a.txt is empty",)),
    "only blank lines": (_data("a.txt", b"\n \n\n"), ("a.txt is empty",)),
    "binary": (_data("a.txt", b"w1 w2\x00\x01\xff\xfe"), ("a.txt is not",)),
    "not UTF-8": (_data("a.txt", "w1 é\n".encode("latin-1")), ("UTF-8", "0xe9")),
    "jsonl that is not JSON": (_data("a.jsonl", b"w1 w2\nw3 w4\n"), ("a.jsonl", "not JSON")),
    "json of one object": (_data("a.json", b'{"text": "w1 w2"}'), ("a.json", "list")),
    "csv of other columns": (
        _data("a.csv", b"id,comment_text\n1,w1 w2 w3\n2,w4 w5\n"),
        ("no text column", "field='comment_text'"),
    ),
    "pickle": (_data("a.pkl", b"\x80\x04N."), ("is refused", "pickle")),
    "unknown format": (_data("a.docx", b"PK"), ("no known format", ".docx", ".jsonl")),
    "too short": (_data("a.txt", b"w1\nw2\nw3\n"), ("No text is left", "two or more tokens")),
}


@pytest.mark.parametrize("flag", ["forget", "retain"])
@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts(cli, world, tmp_path, case, flag):
    make, said = BAD_TEXTS[case]
    result = cli(*world.args(tmp_path / "out", *QUICK, **{flag: make(tmp_path)}))
    check(result, DATA, *said)
    assert not (tmp_path / "out").exists()


def test_mistyped_file_name(cli, world, tmp_path):
    wrong = world.root / "forgot.txt"
    result = cli(*world.args(tmp_path / "out", forget=wrong))
    check(result, DATA, "No such file", f"did you mean '{world.forget}'?")


def test_wrong_field(cli, world, tmp_path):
    result = cli(*world.args(tmp_path / "out", "--set", "field=body", forget=world.other))
    check(result, DATA, "body", "columns found: text")


def test_forget_texts_among_the_retain_texts(cli, world, tmp_path):
    both = write_lines(tmp_path / "both.txt", sentences(30, seed=2) + sentences(20, seed=0)[:5])
    result = cli(*world.args(tmp_path / "out", retain=both))
    check(result, DATA, "retain set holds forget content", "5 of 35", "on_overlap to drop")
    assert not (tmp_path / "out").exists()
    same = cli(*world.args(tmp_path / "out", retain=world.forget))
    check(same, DATA, "20 of 20")
    none = cli(*world.args(tmp_path / "out", "--set", "on_overlap=drop", retain=world.forget))
    check(none, DATA, "No text is left to train on in the retain texts")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "w1", "choices": ["w2"], "answer": 0}] * 3, ("no usable row",)),
        ([{"question": "w1", "choices": ["w2", "w3"], "answer": 7}], ("no usable row",)),
        ([{"text": "w1 w2 w3"}], ("no usable row", "columns found: text")),
    ],
    ids=["one choice", "answer out of range", "texts"],
)
def test_questions_without_a_valid_row(cli, world, tmp_path, rows, said):
    file = write_rows(tmp_path / "q.jsonl", rows)
    check(cli(*world.args(tmp_path / "out", questions=file)), DATA, *said)
    assert not (tmp_path / "out").exists()
    check(cli("eval", "--model", world.model, "--questions", file), DATA, *said)


# ---- models


def _broken(change: Callable[[Path], Any]) -> Callable[[World, Path], Path]:
    """A copy of the base with ``change`` done to its directory."""

    def make(world: World, folder: Path) -> Path:
        copy = folder / "model"
        shutil.copytree(world.model, copy)
        change(copy)
        return copy

    return make


def _pickle_only(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def _truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _remove_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _remove_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def _no_causal_lm(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "vit", "architectures": ["ViTModel"]}
    (model / "config.json").write_text(json.dumps(config))


BAD_MODELS: dict[str, tuple[Callable[[World, Path], Path], tuple[str, ...]]] = {
    "missing": (lambda _world, folder: folder / "none", ("There is no model at",)),
    "a file": (lambda world, _folder: world.forget, ("There is no model at",)),
    "without config": (_broken(lambda m: (m / "config.json").unlink()), ("config.json",)),
    "config not JSON": (
        _broken(lambda m: (m / "config.json").write_text("{")),
        ("config.json cannot be read",),
    ),
    "no causal LM": (_broken(_no_causal_lm), ("no causal language model", "vit")),
    "pickle only": (_broken(_pickle_only), ("no safetensors", "pytorch_model.bin", "run code")),
    "truncated weights": (_broken(_truncate), ("no whole safetensors file", "truncated")),
    "weights of noise": (
        _broken(lambda m: (m / "model.safetensors").write_bytes(bytes(range(256)) * 4)),
        ("no whole safetensors file",),
    ),
    "a tensor missing": (_broken(_remove_tensor), ("no weights", "down_proj")),
    "no tokenizer": (_broken(_remove_tokenizer), ("tokenizer", "cannot be loaded")),
    "larger vocabulary": (
        _broken(lambda m: save_tokenizer(m, len(WORDS) + 5)),
        ("tokenizer does not belong", "'w64'", "model of 64 ids"),
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model(cli, world, tmp_path, case):
    make, said = BAD_MODELS[case]
    model = make(world, tmp_path)
    check(cli(*world.args(tmp_path / "out", model=model)), MODEL, *said)
    assert not (tmp_path / "out").exists()
    check(cli("eval", "--model", model, "--text", world.fluent), MODEL, *said)


@pytest.mark.parametrize("case", ["missing", "pickle only", "truncated weights", "no causal LM"])
def test_bad_model_of_a_plan(cli, world, tmp_path, case):
    make, said = BAD_MODELS[case]
    check(cli("plan", "--model", make(world, tmp_path)), MODEL, *said)


def test_a_plan_names_the_presets(cli):
    check(cli("plan", "--model", "lama-3.1-8b"), MODEL, "lama-3.1-8b", "or a preset", "mistral-7b")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--layer", "4"), ("layer 4", "0 to 3")),
        (("--layer", "-1"), ("layer -1", "0 to 3")),
        (("--layer", "deep"), ("layer deep", "auto")),
        (("--layer", "1.5"), ("layer 1.5",)),
        (("--dtype", "int4"), ("'int4'", "bfloat16")),
        (("--steps", "0"), ("--steps",)),
        (("--device", "h1000"), ("'h1000'", "cpu", "h100")),
        (("--episodes", "-1"), ("--episodes",)),
    ],
)
def test_bad_plan(cli, world, flags, said):
    check(cli("plan", "--model", world.model, *flags), RECIPE, *said)


def test_oracle_with_another_vocabulary(cli, world, tmp_path):
    """Found when it is measured: the trained patch stays, and the mended command goes on."""
    other = tmp_path / "oracle"
    save_model(other, seed=1, words=len(WORDS) - 1)
    out = tmp_path / "out"
    result = cli(*world.args(out, oracle=other))
    check(result, DATA, "another vocabulary", str(other), "--oracle")
    assert (out / "patch.safetensors").exists()
    assert not (out / "record.json").exists()
    assert cli(*world.args(out, oracle=world.oracle)).code == 0


# ---- rails of training


@contextmanager
def objective(monkeypatch: pytest.MonkeyPatch, part: Callable[..., Loss]) -> Iterator[str]:
    """A registered objective for one test."""
    like = OBJECTIVES.get("rmu")
    entry = Entry("test", part, "a test", "none", like.extras, "objective")
    monkeypatch.setitem(OBJECTIVES._entries, "test", entry)
    yield "test"


def test_no_weight_changed(cli, world, tmp_path):
    result = cli(*world.args(tmp_path / "out", lr=1e-30))
    check(result, TRAINING, "No trained weight has changed", "lr 1e-30", "raise lr")
    assert not (tmp_path / "out" / "patch.safetensors").exists()


def test_constant_loss(cli, world, tmp_path, monkeypatch):
    def flat(forget: Any, retain: Any) -> Loss:
        # A gradient, so that weights move, under a value that does not.
        zero = sum((acts - acts.detach()).sum() for acts in forget.acts.values())
        return Loss(zero + 1.0, 0 * sum(a.sum() for a in retain.acts.values()))

    with objective(monkeypatch, flat) as name:
        result = cli(*world.args(tmp_path / "out", objective=name))
    check(result, TRAINING, "loss was the same at every step", "loss 1.0 for 4 steps")
    assert not (tmp_path / "out" / "patch.safetensors").exists()


def test_loss_that_is_not_finite_keeps_the_last_good_state(cli, world, tmp_path, monkeypatch):
    calls = []

    def breaking(forget: Any, retain: Any) -> Loss:
        calls.append(1)
        scale = float("nan") if len(calls) == 4 else 1.0
        return Loss(
            scale * sum(a.square().mean() for a in forget.acts.values()),
            sum(a.square().mean() for a in retain.acts.values()),
        )

    out = tmp_path / "out"
    with objective(monkeypatch, breaking) as name:
        result = cli(*world.args(out, objective=name, steps=6))
    check(result, TRAINING, "not finite at step 3", "nan", "lower lr")
    assert not (out / "patch.safetensors").exists()
    state = TrainingState.load(out / "state.safetensors")
    assert state.step == 3
    assert all(bool(weight.isfinite().all()) for weight in state.weights.values())
    assert len((out / "losses.jsonl").read_text().splitlines()) == 3


def test_rate_so_high_that_the_loss_overflows(cli, world, tmp_path):
    result = cli(*world.args(tmp_path / "out", objective="rmu", lr=1e30))
    check(result, TRAINING, "not finite at step 1", "lower lr")


def test_base_that_is_not_finite(cli, world, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = cli(*world.args(tmp_path / "out", model=model))
    assert result.code in (MODEL, TRAINING), result.err
    check(result, result.code)
    assert not (tmp_path / "out" / "patch.safetensors").exists()


def test_capture_that_never_fires(cli, world, tmp_path, monkeypatch):
    monkeypatch.setattr(Segment, "_model_forward", lambda *_args: {})
    result = cli(*world.args(tmp_path / "out"))
    check(result, TRAINING, "The boundary before the first trained layer was never reached")
    result = cli(*world.args(tmp_path / "out", "--objective", "adaptive-rmu"))
    check(result, TRAINING, "A capture never fired", "no activations after layer 2")
    assert not (tmp_path / "out").exists()


# ---- the disk


def test_disk_full_while_the_patch_is_saved(cli, world, tmp_path, monkeypatch):
    def full(tensors: Any, path: Path, **kwargs: Any) -> None:
        if "patch" not in Path(path).name:
            return save_file(tensors, path, **kwargs)
        Path(path).write_bytes(b"half of it")
        raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")

    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    with monkeypatch.context() as disk:
        disk.setattr("expunge.model.shards.save_file", full)
        result = cli(*world.args(out, *QUICK))
    check(result, RESOURCE, "disk is full while writing patch.safetensors", "free some space")
    assert set(tree(out)) == {"recipe.yaml", "losses.jsonl", "state.safetensors"}
    # With room again the same command goes on and gives what it would have given.
    assert cli(*world.args(out, *QUICK)).code == 0
    assert cli(*world.args(undisturbed, *QUICK)).code == 0
    one, other = (load_file(folder / "patch.safetensors") for folder in (out, undisturbed))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_disk_full_while_the_log_grows(cli, world, tmp_path, monkeypatch):
    real, opened = Path.open, []

    def limited(self: Path, mode: str = "r", **kwargs: Any) -> Any:
        if self.name == "losses.jsonl" and mode == "a":
            opened.append(self)
            if len(opened) == 3:
                return real(Path("/dev/full"), mode, **kwargs)
        return real(self, mode, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as disk:
        disk.setattr(Path, "open", limited)
        result = cli(*world.args(out, *QUICK, "--set", "save_every=1"))
    check(result, RESOURCE, "disk is full while writing losses.jsonl", "free some space")
    assert TrainingState.load(out / "state.safetensors").step == 2
    assert cli(*world.args(out, *QUICK, "--set", "save_every=1")).code == 0
    assert len((out / "losses.jsonl").read_text().splitlines()) == 4


def test_disk_full_while_the_state_is_saved(cli, world, tmp_path, monkeypatch):
    def full(_tensors: Any, path: str, **_kwargs: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")

    out = tmp_path / "out"
    with monkeypatch.context() as disk:
        disk.setattr("expunge.model.shards.save_file", full)
        result = cli(*world.args(out, *QUICK, "--set", "save_every=2"))
    check(result, RESOURCE, "disk is full", "free some space")
    assert set(tree(out)) == {"recipe.yaml", "losses.jsonl"}


def test_no_room_for_the_patched_model(cli, world, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(9, 9, 0))
    out = tmp_path / "out"
    check(cli("apply", finished, "--model", world.model, "-o", out), RESOURCE, "no room", "0.00 GB")
    assert tree(tmp_path) == {}


def test_out_below_a_file(cli, world, finished, tmp_path):
    file = write_lines(tmp_path / "file", ["x"])
    out = file / "below"
    check(cli(*world.args(out, *QUICK)), RESOURCE, "cannot be written", "-o")
    check(cli("apply", finished, "--model", world.model, "-o", out), RESOURCE, "cannot be written")
    check(cli("demo", "-o", out), RESOURCE, "cannot be written")
    assert tree(tmp_path) == {"file": b"x\n"}


def test_path_that_the_system_refuses(cli, world, tmp_path):
    check(cli(*world.args(tmp_path / ("x" * 300), *QUICK)), RESOURCE, "too long")


# ---- run directories


def test_out_is_a_file(cli, world, tmp_path):
    file = write_lines(tmp_path / "file", ["x"])
    check(cli(*world.args(file)), DATA, "output folder is a file", str(file))
    assert file.read_text() == "x\n"


def test_run_directory_of_other_settings(cli, world, finished):
    before = tree(finished)
    result = cli(*world.args(finished, seed=8))
    check(result, DATA, "other settings", "differs in", "seed", "--fresh")
    assert tree(finished) == before


def test_a_typo_with_fresh_costs_no_finished_run(cli, world, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = tree(out)
    check(cli(*world.args(out, "--fresh", forget=tmp_path / "typo.txt")), DATA, "No such file")
    check(cli(*world.args(out, "--fresh", objective="typo")), RECIPE, "Unknown objective")
    check(cli(*world.args(out, "--fresh", layer=9)), RECIPE, "layer 9")
    assert tree(out) == before


def test_run_directory_without_its_recipe(cli, world, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "recipe.yaml").unlink()
    before = tree(out)
    result = cli(*world.args(out))
    check(result, DATA, "without its recipe", "patch.safetensors", "--fresh")
    assert tree(out) == before


def test_run_directory_with_a_broken_recipe(cli, world, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "recipe.yaml").write_text("steps: [")
    check(cli(*world.args(out)), RECIPE, "recipe.yaml cannot be read")


def test_data_changed_since_the_run_was_interrupted(cli, world, tmp_path, monkeypatch):
    forget = tmp_path / "forget.txt"
    shutil.copy(world.forget, forget)
    out = tmp_path / "out"

    def interrupt(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as evaluating:
        evaluating.setattr("expunge.workbench.Workbench.measure", interrupt)
        assert cli(*world.args(out, forget=forget)).code == 130
    write_lines(forget, sentences(20, seed=9))
    result = cli(*world.args(out, forget=forget))
    check(result, DATA, "data has changed", str(forget), "--fresh")
    assert not (out / "record.json").exists()
    with monkeypatch.context() as training:
        training.setattr("expunge.training.loop.check_varies", interrupt)
        assert cli(*world.args(out, "--fresh", forget=forget)).code == 130
    shutil.copy(world.forget, forget)
    result = cli(*world.args(out, forget=forget))
    check(result, TRAINING, "other data, another base", "--fresh")


def test_damaged_state(cli, world, tmp_path, monkeypatch):
    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as training:
        training.setattr("expunge.training.loop.check_varies", interrupt)
        assert cli(*world.args(out)).code == 130
    (out / "state.safetensors").write_bytes(b"torn")
    check(cli(*world.args(out)), TRAINING, "state.safetensors", "cannot be read", "--fresh")
    assert cli(*world.args(out, "--fresh")).code == 0


# ---- patches

TARGET = "model.layers.1.mlp.down_proj.weight"


def _other_shape(folder: Path) -> Path:
    model = folder / "wider"
    save_model(model, seed=0, intermediate_size=INNER + 8)
    return model


def test_patch_of_another_base(cli, world, finished, tmp_path):
    out = tmp_path / "out"
    result = cli("apply", finished, "--model", world.oracle, "-o", out)
    check(result, PATCH, "does not belong to this model", "fingerprint", "base model")
    text = ["--text", world.fluent]
    result = cli("eval", "--model", world.oracle, "--patch", finished, *text)
    check(result, PATCH, "does not belong to this model", "fingerprint")
    wider = _other_shape(tmp_path)
    result = cli("apply", finished, "--model", wider, "-o", out)
    check(result, PATCH, "another shape", f"[32, {INNER + 8}]")
    assert not out.exists()


def test_patch_on_top_of_itself(cli, world, finished, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert cli("apply", finished, "--model", world.model, "-o", once).code == 0
    check(cli("apply", finished, "--model", once, "-o", twice), PATCH, "before any patch")
    assert not twice.exists()


def _no_patch(_finished: Path, folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "p.safetensors")
    return folder / "p.safetensors"


def _truncated(finished: Path, folder: Path) -> Path:
    content = (finished / "patch.safetensors").read_bytes()
    (folder / "p.safetensors").write_bytes(content[:-40])
    return folder / "p.safetensors"


def _nan(finished: Path, folder: Path) -> Path:
    """The patch with one value made NaN in the file's bytes."""
    content = bytearray((finished / "patch.safetensors").read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    (folder / "p.safetensors").write_bytes(content)
    return folder / "p.safetensors"


def _text(_finished: Path, folder: Path) -> Path:
    return write_lines(folder / "p.safetensors", ["this is no safetensors file, but text"])


BAD_PATCHES: dict[str, tuple[Callable[[Path, Path], Path], tuple[str, ...]]] = {
    "missing": (lambda _f, folder: folder / "p.safetensors", ("no readable patch", "No such file")),
    "text": (_text, ("no readable patch", "truncated or no safetensors")),
    "other safetensors": (_no_patch, ("no readable patch", "not written by expunge")),
    "truncated": (_truncated, ("no readable patch", "truncated")),
    "not finite": (_nan, ("not finite", "1 values are NaN")),
}


@pytest.mark.parametrize("case", BAD_PATCHES)
def test_bad_patch(cli, world, finished, tmp_path, case):
    make, said = BAD_PATCHES[case]
    patch = make(finished, tmp_path)
    out = tmp_path / "out"
    check(cli("apply", patch, "--model", world.model, "-o", out), PATCH, *said)
    assert not out.exists()
    text = ["--text", world.fluent]
    check(cli("eval", "--model", world.model, "--patch", patch, *text), PATCH, *said)
    check(cli("show", patch), PATCH, *said)


def test_run_directory_without_a_patch(cli, world, tmp_path):
    result = cli("apply", tmp_path, "--model", world.model, "-o", tmp_path / "out")
    check(result, PATCH, "no readable patch", "patch.safetensors")


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_scale_that_is_no_number(cli, world, finished, tmp_path, scale):
    flags = ["--model", world.model, "-o", tmp_path / "out", "--scale", scale]
    check(cli("apply", finished, *flags), PATCH, "finite number", scale)
    assert tree(tmp_path) == {}


def test_scale_in_words(cli, world, finished, tmp_path):
    flags = ["--model", world.model, "-o", tmp_path / "out", "--scale", "much"]
    check(cli("apply", finished, *flags), RECIPE, "--scale")


def test_patched_model_needs_a_place_of_its_own(cli, world, finished, tmp_path):
    model = tmp_path / "base"
    shutil.copytree(world.model, model)
    taken = tmp_path / "taken"
    taken.mkdir()
    file = write_lines(taken / "file", ["x"])
    before = tree(tmp_path)
    for out, said in (
        (taken, "which is not empty"),
        (file, "which is not empty"),
        (model, "which is the base model"),
        (model / "patched", "lies inside it"),
    ):
        result = cli("apply", finished, "--model", model, "-o", out)
        check(result, MODEL, "directory of its own", said, "-o")
    assert tree(tmp_path) == before


def test_apply_that_fails_half_way_leaves_nothing(cli, world, finished, tmp_path, monkeypatch):
    real = Path.open

    def full(self: Path, mode: str = "r", **kwargs: Any) -> Any:
        if mode == "r+b":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, mode, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    out = tmp_path / "out"
    check(cli("apply", finished, "--model", world.model, "-o", out), RESOURCE, "disk is full")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


# ---- eval, ls, show


def test_eval_with_nothing_to_measure(cli, world):
    result = cli("eval", "--model", world.model)
    check(result, DATA, "nothing to measure on", "--questions", "--text")


def test_eval_of_one_token_at_most(cli, world):
    flags = ["--text", world.fluent, "--max-tokens", 1]
    check(cli("eval", "--model", world.model, *flags), RECIPE, "--max-tokens", "2")


def test_eval_of_texts_without_a_second_token_is_unscored_and_not_zero(cli, world, tmp_path):
    short = write_lines(tmp_path / "short.txt", ["w1", "w2", "w3"])
    result = cli("eval", "--model", world.model, "--text", short, "--json")
    assert result.code == 0, result.err
    for score in result.json["scores"]:
        assert (score["value"], score["ci_low"], score["n"]) == (None, None, 0)
        assert score["reason"]


def test_questions_longer_than_the_context_are_unscored(cli, world, tmp_path):
    rows = questions(2, seed=1)
    rows[0]["question"] = " ".join(WORDS[: CONTEXT + 5])
    file = write_rows(tmp_path / "q.jsonl", rows)
    result = cli("eval", "--model", world.model, "--questions", file, "--json")
    assert result.code == 0, result.err
    assert [score["n"] for score in result.json["scores"]] == [1, 1]


def _edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], bytes]:
    def edit(record: str) -> bytes:
        value = json.loads(record)
        change(value)
        return json.dumps(value).encode()

    return edit


BAD_RECORDS: dict[str, Callable[[str], bytes]] = {
    "truncated": lambda record: record[:-200].encode(),
    "empty": lambda _record: b"",
    "binary": lambda _record: b"\xff\xfe\x00\x01",
    "list": lambda _record: b"[]",
    "null": lambda _record: b"null",
    "another object": lambda _record: b"{}",
    "no seed": _edited(lambda record: record.pop("seed")),
    "unknown key": _edited(lambda record: record.update(extra=1)),
    "timing of nothing": _edited(lambda record: record.update(timing=None)),
    "scores of numbers": _edited(lambda record: record.update(scores=[1])),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_broken_record(cli, world, finished, tmp_path, case):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    content = BAD_RECORDS[case]((out / "record.json").read_text())
    (out / "record.json").write_bytes(content)
    said = ("No readable run record", str(out / "record.json"))
    check(cli("show", out), DATA, *said)
    check(cli("show", out, "--json"), DATA, *said)
    listed = cli("ls", tmp_path)
    assert listed.code == 0
    assert all(words in listed.err for words in said)


def test_record_of_another_version(cli, finished, tmp_path):
    record = json.loads((finished / "record.json").read_text())
    (tmp_path / "record.json").write_text(json.dumps({**record, "schema_version": 99}))
    check(cli("show", tmp_path), DATA, "another version", "schema_version 99", "schema_version 1")


def test_show_of_what_is_no_run(cli, world, tmp_path):
    check(cli("show", tmp_path), DATA, "No readable run record", "expunge ls")
    check(cli("show", tmp_path / "nothing"), DATA, "No readable run record")
    check(cli("show", world.forget), DATA, "No readable run record")


def test_ls_of_a_folder_that_is_not_there(cli, world, tmp_path):
    check(cli("ls", tmp_path / "nothing"), DATA, "no such folder")
    check(cli("ls", world.forget), DATA, "no such folder")


# ---- the words of the command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rum",), ("No such command 'rum'", "did you mean 'run'?")),
        (("apply",), ("Missing argument", "PATCH")),
        (("apply", "p", "-o", "x"), ("Missing option '--model'",)),
        (("eval", "--text", "x"), ("Missing option '--model'",)),
        (("plan",), ("Missing option '--model'",)),
        (("show",), ("Missing argument", "PATH")),
        (("demo", "--seeds", "0"), ("--seeds", "1")),
        (("demo", "--seeds", "some"), ("--seeds", "integer")),
        (("ls", "a", "b"), ("b",)),
        (("show", "--jason", "x"), ("--jason", "did you mean '--json'?")),
    ],
)
def test_bad_command_line(cli, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    check(cli(*words), RECIPE, *said)
    assert tree(tmp_path) == {}
