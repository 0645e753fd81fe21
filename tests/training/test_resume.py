"""A run that was interrupted anywhere ends with the same bits as one that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from expunge.errors import TrainingError
from expunge.training import loop
from expunge.training.log import StepLog, read_losses
from expunge.training.loop import Stage, TrainingResult
from expunge.training.state import TrainingState

STEPS, SAVE_EVERY = 8, 3

# name -> dtype and settings of the run
RUNS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "rmu": (torch.float32, {"objective": "rmu"}),
    "cosine": (torch.float32, {"objective": "cosine-rmu", "tradeoff": "schedule"}),
    "adaptive": (
        torch.float32,
        {"objective": "adaptive-rmu", "objective_settings": {"scale": "first-batch"}},
    ),
    "noise": (torch.float32, {"objective": "rmu", "rna_noise": 0.05, "micro_batch_size": 3}),
    "decay": (torch.float32, {"objective": "rerouting", "weight_decay": 0.1}),
    "bfloat16": (torch.bfloat16, {"objective": "cosine-rmu", "target": "per-token"}),
    "npo": (torch.float32, {"objective": "npo", "tradeoff": "schedule"}),
    "dpo": (torch.bfloat16, {"objective": "dpo", "micro_batch_size": 3}),
    "simnpo": (torch.float32, {"objective": "simnpo", "micro_batch_size": 3}),
    "probes": (torch.float32, {"objective": "multi-layer-probe", "rna_noise": 0.05}),
    "bfloat16 alone": (torch.bfloat16, {"objective": "rmu", "master_weights": False}),
}
every_run = pytest.mark.parametrize("name", RUNS)


def stage(folder: Path, context: str = "here") -> Stage:
    folder.mkdir(parents=True, exist_ok=True)
    return Stage(folder / "state.safetensors", folder / "losses.jsonl", context)


def run(
    name: str, bench: tiny.Bench, at: Stage, on_step: Any = lambda _log: None
) -> TrainingResult:
    settings = {"steps": STEPS, "save_every": SAVE_EVERY, **RUNS[name][1]}
    return bench.trainer(**settings).run(at, on_step)


def timeless(log: Any) -> list[dict[str, Any]]:
    return [{**vars(entry), "seconds": 0} for entry in log]


def assert_same(one: TrainingResult, other: TrainingResult) -> None:
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)
    assert timeless(one.log) == timeless(other.log)


@pytest.fixture(scope="module")
def benches() -> dict[str, tiny.Bench]:
    return {
        name: tiny.bench_for(
            settings["objective"],
            # Twins belong to a single topic.
            topics=1 if settings["objective"] in ("dpo", "multi-layer-probe") else 2,
            dtype=dtype,
        )
        for name, (dtype, settings) in RUNS.items()
    }


@pytest.fixture(scope="module")
def whole(benches: dict[str, tiny.Bench]) -> dict[str, TrainingResult]:
    """Each run without interruption and without any file."""
    return {name: run(name, bench, Stage()) for name, bench in benches.items()}


def interrupt_after(k: int) -> Any:
    def on_step(entry: StepLog) -> None:
        if entry.step + 1 == k:
            raise KeyboardInterrupt

    return on_step


@every_run
@pytest.mark.parametrize("k", [1, 2, 3, 5, STEPS])
def test_after_an_interruption(name: str, k: int, benches: Any, whole: Any, tmp_path: Path) -> None:
    at = stage(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(name, benches[name], at, interrupt_after(k))
    assert TrainingState.load(at.state).step == k  # type: ignore[arg-type]
    seen: list[int] = []
    resumed = run(name, benches[name], at, lambda entry: seen.append(entry.step))
    assert seen == list(range(k, STEPS))
    assert_same(resumed, whole[name])
    assert timeless(read_losses(at.losses)) == timeless(resumed.log)  # type: ignore[arg-type]


@every_run
@pytest.mark.parametrize("k", [2, 5, 6])
def test_after_a_kill_between_two_saves(
    name: str, k: int, benches: Any, whole: Any, tmp_path: Path
) -> None:
    at, copied = stage(tmp_path / "killed"), stage(tmp_path / "copied")

    def copy(entry: StepLog) -> None:
        if entry.step + 1 == k:
            for path in (tmp_path / "killed").iterdir():
                shutil.copy(path, tmp_path / "copied" / path.name)

    run(name, benches[name], at, copy)
    assert copied.losses is not None and copied.state is not None
    assert len(read_losses(copied.losses)) == k
    assert copied.state.exists() == (k >= SAVE_EVERY)
    seen: list[int] = []
    resumed = run(name, benches[name], copied, lambda entry: seen.append(entry.step))
    assert seen == list(range(k // SAVE_EVERY * SAVE_EVERY, STEPS))
    assert_same(resumed, whole[name])
    assert timeless(read_losses(copied.losses)) == timeless(resumed.log)


def test_in_a_new_process(whole: Any, tmp_path: Path) -> None:
    """Model, stores and trainer are made anew, boundaries in a file the second time."""
    at = stage(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run("cosine", tiny.bench(topics=2), at, interrupt_after(4))
    second = tiny.bench(topics=2, limit_bytes=0, folder=tmp_path / "spill")
    assert_same(run("cosine", second, at), whole["cosine"])


def test_twice_interrupted(benches: Any, whole: Any, tmp_path: Path) -> None:
    at = stage(tmp_path)
    for k in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            run("noise", benches["noise"], at, interrupt_after(k))
    assert_same(run("noise", benches["noise"], at), whole["noise"])


@pytest.mark.parametrize("call", [1, 4, 5])
def test_inside_an_update(
    call: int, benches: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that belong to no step are not saved: the last saved state stays."""
    calls: list[int] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any) -> Any:
        calls.append(1)
        result = real(self, *args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    at = stage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run("bfloat16", benches["bfloat16"], at)
    assert at.state is not None
    assert at.state.exists() == (call > SAVE_EVERY)
    assert_same(run("bfloat16", benches["bfloat16"], at), whole["bfloat16"])


def test_between_an_update_and_its_line_in_the_log(
    benches: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.append_step

    def append(path: Path | None, entry: StepLog) -> None:
        if entry.step == 4:
            raise KeyboardInterrupt
        real(path, entry)

    at = stage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "append_step", append)
        with pytest.raises(KeyboardInterrupt):
            run("rmu", benches["rmu"], at)
    assert_same(run("rmu", benches["rmu"], at), whole["rmu"])


def test_a_torn_last_line_is_left_out(benches: Any, whole: Any, tmp_path: Path) -> None:
    at = stage(tmp_path)
    assert at.losses is not None
    with pytest.raises(KeyboardInterrupt):
        run("rmu", benches["rmu"], at, interrupt_after(4))
    with at.losses.open("a") as handle:
        handle.write('{"step": 4, "topic": 0, "lo')
    assert len(read_losses(at.losses)) == 4
    assert_same(run("rmu", benches["rmu"], at), whole["rmu"])
    assert all(json.loads(line) for line in at.losses.read_text().splitlines())


def test_a_finished_run_is_not_trained_again(benches: Any, whole: Any, tmp_path: Path) -> None:
    at = stage(tmp_path)
    run("rmu", benches["rmu"], at)
    seen: list[int] = []
    again = run("rmu", benches["rmu"], at, lambda entry: seen.append(entry.step))
    assert seen == []
    assert_same(again, whole["rmu"])


def test_a_log_without_a_state_is_started_over(benches: Any, whole: Any, tmp_path: Path) -> None:
    at = stage(tmp_path)
    run("rmu", benches["rmu"], at)
    assert at.state is not None and at.losses is not None
    at.state.unlink()
    assert_same(run("rmu", benches["rmu"], at), whole["rmu"])
    assert len(read_losses(at.losses)) == STEPS


def test_a_state_of_another_context_is_refused(benches: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("rmu", benches["rmu"], stage(tmp_path, "one"), interrupt_after(2))
    before = stage(tmp_path).state.read_bytes()  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match="other data, another base") as caught:
        run("rmu", benches["rmu"], stage(tmp_path, "other"))
    assert "--fresh" in caught.value.fix
    assert stage(tmp_path).state.read_bytes() == before  # type: ignore[union-attr]


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x10\0\0\0\0\0\0\0{}"])
def test_a_broken_state_is_no_state(benches: Any, tmp_path: Path, content: bytes) -> None:
    at = stage(tmp_path)
    assert at.state is not None
    at.state.write_bytes(content)
    with pytest.raises(TrainingError, match="cannot be read"):
        run("rmu", benches["rmu"], at)


def test_a_shorter_log_than_the_state_is_refused(benches: Any, tmp_path: Path) -> None:
    at = stage(tmp_path)
    assert at.losses is not None
    with pytest.raises(KeyboardInterrupt):
        run("rmu", benches["rmu"], at, interrupt_after(4))
    at.losses.write_text(at.losses.read_text().splitlines()[0] + "\n")
    with pytest.raises(TrainingError, match="shorter than its saved state"):
        run("rmu", benches["rmu"], at)


def test_the_model_is_itself_again(benches: Any, tmp_path: Path) -> None:
    bench = benches["rmu"]
    before = {name: p.detach().clone() for name, p in bench.model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        run("rmu", bench, stage(tmp_path), interrupt_after(2))
    run("rmu", bench, Stage())
    assert all(torch.equal(before[name], p) for name, p in bench.model.named_parameters())
    assert all(p.grad is None for p in bench.model.parameters())


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    made = TrainingState(
        step=7,
        weights={"a.weight": torch.randn(3, 2).bfloat16(), "b.weight": torch.randn(2, 2)},
        optimiser={"a.weight/step": torch.tensor(7.0), "a.weight/master": torch.randn(3, 2)},
        first_norm={3: 0.1},
        micro_batch_size=2,
        context="abc",
    )
    made.save(tmp_path / "state")
    found = TrainingState.load(tmp_path / "state")
    assert (found.step, found.first_norm, found.micro_batch_size, found.context) == (
        7,
        {3: 0.1},
        2,
        "abc",
    )
    for mine, theirs in ((made.weights, found.weights), (made.optimiser, found.optimiser)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
        assert all(mine[k].dtype == theirs[k].dtype for k in mine)
