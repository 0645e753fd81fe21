"""What other programs leave or do: damaged files, foreign names, plugins and workers that fail."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MptConfig

import tiny
from expunge import benches, processes, registry
from expunge import jobs as module
from expunge.data.sources import read_texts
from expunge.errors import (
    DataError,
    ModelError,
    PatchError,
    RecipeError,
    ResourceError,
    TrainingError,
)
from expunge.jobs import Job, run_jobs
from expunge.model.checkpoint import Checkpoint
from expunge.model.patch import Patch
from expunge.plan import plan
from expunge.recipe import Recipe
from expunge.training.loop import Stage
from expunge.training.state import TrainingState


def _patch(path: Path, **metadata: Any) -> Path:
    before = {"model.layers.0.w.weight": torch.zeros(2, 2)}
    after = {"model.layers.0.w.weight": torch.ones(2, 2)}
    return Patch.between(before, after, metadata=metadata).save(path)


def test_patch_with_bytes_at_its_end(tmp_path: Path) -> None:
    path = _patch(tmp_path / "p.safetensors")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(PatchError, match="no readable patch"):
        Patch.load(path)


@pytest.mark.parametrize("metadata", ["[]", "1", "null"])
def test_patch_whose_metadata_is_no_object(tmp_path: Path, metadata: str) -> None:
    header = {"format": "expunge-patch", "version": "1", "base": "{}", "metadata": metadata}
    save_file({}, tmp_path / "p.safetensors", metadata=header)
    with pytest.raises(PatchError, match="damaged metadata"):
        Patch.load(tmp_path / "p.safetensors")


def _mpt(folder: Path, **changes: Any) -> Path:
    config = MptConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=64)
    raw = {**config.to_dict(), "architectures": ["MptForCausalLM"], **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {f"transformer.blocks.{n}.ffn.down_proj.weight": torch.zeros(32, 128) for n in (0, 1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_names_of_a_config_that_are_its_own(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(_mpt(tmp_path))
    assert "num_hidden_layers" not in checkpoint.config
    sizes = (checkpoint.n_layers, checkpoint.hidden_size, checkpoint.intermediate_size)
    assert sizes == (3, 32, 128)
    made = plan(str(tmp_path), layer="auto", steps=1, batch_size=1, tokens=8, dtype="float32")
    assert made.layers_total == 3


def test_config_that_does_not_say_how_large_the_model_is(tmp_path: Path) -> None:
    for changes in ({"n_layers": None}, {"n_layers": "many"}):
        with pytest.raises(ModelError):
            _ = Checkpoint.open(_mpt(tmp_path, **changes)).n_layers


def test_parquet_of_a_type_that_cannot_be_read(tmp_path, monkeypatch) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a b"]}), tmp_path / "t.parquet")

    def refuse(*_args: Any, **_more: Any) -> None:
        raise pyarrow.ArrowNotImplementedError("no such type")

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuse)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_texts(str(tmp_path / "t.parquet"))


def test_data_set_that_cannot_be_generated(monkeypatch) -> None:
    import datasets

    def fail(*_args: Any, **_more: Any) -> None:
        raise datasets.exceptions.DatasetGenerationError("bad rows")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="cannot be loaded from the Hugging Face hub"):
        read_texts("owner/name")


def test_state_that_lacks_a_fact(tmp_path: Path) -> None:
    for facts in ({"step": 1}, {"step": 1, "first_norm": []}, [], {"step": "one"}):
        save_file({}, tmp_path / "s.safetensors", metadata={"state": json.dumps(facts)})
        with pytest.raises(TrainingError, match="cannot be read"):
            TrainingState.load(tmp_path / "s.safetensors")


def test_plugin_that_fails_is_named_only_where_it_is_missed(monkeypatch) -> None:
    point = EntryPoint("theirs", "no_such_module_anywhere", "expunge.things")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    things: registry.Registry[int] = registry.Registry("thing")
    things.register("ours", source="here", deviations="none")(1)
    assert things.names() == ["ours"]
    assert things.get("ours").part == 1
    with pytest.raises(RecipeError, match="plugin theirs failed: ModuleNotFoundError"):
        things.get("theirs")


def _state_of_process() -> tuple[bool, int, int]:
    loaded = {"expunge.run", "expunge.compose", "expunge.interference.joint"} <= {*sys.modules}
    return loaded, gc.get_freeze_count(), torch.get_num_threads()


@pytest.mark.skipif(sys.platform != "linux", reason="processes share nothing elsewhere")
def test_processes_begin_with_all_that_a_run_imports() -> None:
    with processes.process_pool(1) as pool:
        loaded, frozen, threads = pool.submit(_state_of_process).result()
    assert loaded and frozen > 0 and threads == 1


class _Spilled:
    """A bench whose boundaries lie in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def drop_boundaries(self) -> None:
        self.path.unlink()


def _hold(path: Path) -> None:
    benches._kept["one"] = _Spilled(path)  # type: ignore[assignment]


def test_processes_leave_no_files_behind(tmp_path: Path) -> None:
    path = tmp_path / "boundaries"
    path.touch()
    with processes.process_pool(1) as pool:
        pool.submit(_hold, path).result()
        assert path.exists()
    assert not path.exists()


def _wait(begun: Path) -> None:
    begun.touch()
    signal.pause()


def test_a_pool_that_is_stopped_ends_by_itself(tmp_path: Path) -> None:
    """One that is stopped while it waits holds the queue's lock: the other must not wait for it."""
    others = {*multiprocessing.active_children()}
    pool = processes.process_pool(2)
    for nap in [pool.submit(time.sleep, 0.5) for _ in range(2)]:
        nap.result()
    begun = tmp_path / "begun"
    pool.submit(processes.attempt, _wait, begun)
    for _ in range(3000):
        if begun.exists():
            break
        time.sleep(0.01)
    assert begun.exists()
    workers = {*multiprocessing.active_children()} - others
    processes.stop_processes(pool, others)
    # Whoever asks second is told 255; one that had to be killed has the signal's number.
    assert len(workers) == 2 and all((worker.exitcode or 0) >= 0 for worker in workers)


def _die(_job: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_worker_that_was_killed(tmp_path: Path, monkeypatch) -> None:
    bystander = multiprocessing.get_context("spawn").Process(target=signal.pause)
    bystander.start()
    recipe = Recipe.build({"model": "m", "forget": "f", "retain": "r"})
    monkeypatch.setattr(module, "try_job", _die)
    try:
        with pytest.raises(ResourceError, match="was killed"):
            run_jobs([Job(recipe, tmp_path / "a"), Job(recipe, tmp_path / "b")], workers=2)
        assert bystander.is_alive()
    finally:
        bystander.kill()
        bystander.join()


def test_weights_that_are_not_finite_never_replace_a_state(tmp_path: Path, monkeypatch) -> None:
    from expunge.training.state import Optimiser

    original = Optimiser.step

    def breaking(self: Optimiser, lr: float) -> None:
        original(self, lr)
        if self.steps == 4:
            with torch.no_grad():
                next(iter(self.weights.values())).fill_(float("nan"))

    monkeypatch.setattr(Optimiser, "step", breaking)
    stage = Stage(tmp_path / "state.safetensors", tmp_path / "losses.jsonl", "here")
    with pytest.raises(TrainingError, match="not finite at step 4"):
        tiny.bench().trainer(steps=6, save_every=2).run(stage)
    state = TrainingState.load(tmp_path / "state.safetensors")
    assert state.step == 2
    assert all(bool(weight.isfinite().all()) for weight in state.weights.values())


def test_a_worker_that_was_told_to_stop_begins_nothing_more(tmp_path: Path, monkeypatch) -> None:
    """What was queued for it never starts, and a second signal does not break into its saving."""
    before = signal.getsignal(signal.SIGTERM)
    done: list[Any] = []
    job = Job(Recipe.build({"model": "m", "forget": "f", "retain": "r"}), tmp_path / "a")
    monkeypatch.setattr(processes, "_stopping", [])
    monkeypatch.setattr(processes, "_busy", [True])
    monkeypatch.setattr(module, "_do", done.append)
    try:
        with pytest.raises(KeyboardInterrupt):
            processes._interrupt(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt):
            module.try_job(job)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not done
