"""A run that is killed or stopped, anywhere, goes on to the same bits with the same command.

The child runs the console script's own `main` and sends the signal to itself at a chosen place, so
that every kill hits the same point whatever the machine is doing.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stopping import KILLED, LOOP, STOPPED, run_until

from expunge.training.state import TrainingState

STEPS, SAVE_EVERY = 8, 3

TRAINER = (LOOP, "Trainer")


def args(world, out):
    more = ["--set", f"save_every={SAVE_EVERY}", "--set", "objective_settings.scale=first-batch"]
    return world.args(out, *more, steps=STEPS, objective="adaptive-rmu", seed=7)


def stop(world, out, place, number, when, number_of_signal):
    """Run the command in a process of its own until it is stopped at ``place``."""
    return run_until(args(world, out), place, number, when, number_of_signal)


def names_in(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def steps_logged(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "losses.jsonl").read_text().splitlines()]


def steps_saved(out: Path) -> int:
    return TrainingState.load(out / "state.safetensors").step


def losses(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The folder of the same run, never stopped, in a process of its own."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = stop(world, out, (LOOP, "", "read_losses"), 0, "before", signal.SIGKILL)
    assert done.returncode == 0, done.stderr
    return out


def finish_and_compare(cli, world, out, undisturbed):
    """The same command once more: same deltas, same log, same scores, nothing left over."""
    result = cli(*args(world, out))
    assert result.code == 0, result.err
    assert names_in(out) == names_in(undisturbed)
    mine, theirs = (load_file(folder / "patch.safetensors") for folder in (out, undisturbed))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert steps_logged(out) == list(range(STEPS))
    assert losses(out) == losses(undisturbed)
    mine, theirs = (
        json.loads((folder / "record.json").read_text())["scores"] for folder in (out, undisturbed)
    )
    assert mine == theirs
    return result


def test_killed_in_the_prefix(cli, world, undisturbed, tmp_path):
    out = tmp_path / "out"
    place = ("expunge.model.segment", "Segment", "boundary")
    assert stop(world, out, place, 1, "after", signal.SIGKILL).returncode == KILLED
    assert names_in(out) == {"recipe.yaml"}
    finish_and_compare(cli, world, out, undisturbed)


def test_killed_after_the_first_step(cli, world, undisturbed, tmp_path):
    out = tmp_path / "out"
    assert (
        stop(world, out, (LOOP, "", "append_step"), 1, "after", signal.SIGKILL).returncode == KILLED
    )
    assert names_in(out) == {"recipe.yaml", "losses.jsonl"}
    assert steps_logged(out) == [0]
    finish_and_compare(cli, world, out, undisturbed)


def test_killed_between_saves_then_right_after_a_save(cli, world, undisturbed, tmp_path):
    out = tmp_path / "out"
    assert (
        stop(world, out, (LOOP, "", "append_step"), 5, "after", signal.SIGKILL).returncode == KILLED
    )
    assert (steps_logged(out), steps_saved(out)) == ([0, 1, 2, 3, 4], 3)
    # As if the kill had torn the last line.
    with (out / "losses.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    # Steps 3, 4, 5 once more, then the save.
    assert stop(world, out, (*TRAINER, "_save"), 1, "after", signal.SIGKILL).returncode == KILLED
    assert (steps_logged(out), steps_saved(out)) == ([0, 1, 2, 3, 4, 5], 6)
    finish_and_compare(cli, world, out, undisturbed)


def test_killed_while_a_state_is_written(cli, world, undisturbed, tmp_path):
    out = tmp_path / "out"
    place = ("expunge.model.shards", "", "save_file")
    done = stop(world, out, place, 2, "after", signal.SIGKILL)
    assert done.returncode == KILLED, done.stderr
    # The second state lies there under its temporary name; the first one counts.
    assert any(name.endswith(".tmp") for name in names_in(out))
    assert steps_saved(out) == 3
    finish_and_compare(cli, world, out, undisturbed)


def test_killed_in_the_evaluation(cli, world, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    place = ("expunge.evaluation.suite", "Suite", "measure")
    done = stop(world, out, place, 2, "before", signal.SIGKILL)
    assert done.returncode == KILLED, done.stderr
    assert {"patch.safetensors", "losses.jsonl"} <= names_in(out)
    assert "record.json" not in names_in(out)
    # What is trained is not trained again.
    monkeypatch.setattr("expunge.workbench.Workbench.train", None)
    finish_and_compare(cli, world, out, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_politely(cli, world, undisturbed, tmp_path, number):
    out = tmp_path / "out"
    # In the forward pass of the sixth step.
    place = (*TRAINER, "_accumulate")
    done = stop(world, out, place, 6, "after", number)
    assert done.returncode == STOPPED, done.stderr
    assert "interrupted; the same command goes on where it stopped" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    # Every step that was done is kept, not only those up to the last regular save.
    assert (steps_logged(out), steps_saved(out)) == ([0, 1, 2, 3, 4], 5)
    finish_and_compare(cli, world, out, undisturbed)


def test_an_interrupt_inside_an_update_never_saves_half_of_it(cli, world, undisturbed, tmp_path):
    out = tmp_path / "out"
    place = ("torch.optim", "AdamW", "step")
    done = stop(world, out, place, 5, "after", signal.SIGINT)
    assert done.returncode == STOPPED, done.stderr
    assert steps_saved(out) == 3
    finish_and_compare(cli, world, out, undisturbed)
