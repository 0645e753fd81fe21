"""`--tradeoff search` on the tiny world: whole runs, the best look of all, kills, folder, pick."""

from __future__ import annotations

import json
import pkgutil
import signal

import pytest
from learned_world import (
    STEPS,
    chosen_of,
    copied,
    counted_looks,
    front_of,
    learned_args,
    learned_settings,
    record_of,
    same_deltas,
    without_times,
)
from stopping import KILLED, LOOP, STOPPED, run_until
from test_bad_input import DATA, RECIPE, check, tree

from expunge.errors import DivergedError, TrainingError
from expunge.evaluation.suite import Suite
from expunge.folder import FRONT_FILE
from expunge.learning import Learning
from expunge.metalearning.figure import LearnedRun
from expunge.picking import pick
from expunge.recipe import Recipe
from expunge.run import run
from expunge.training.log import curve, read_losses

TRIALS = 3
RULE = {"tradeoff": "search", "episodes": TRIALS}


@pytest.fixture(scope="module")
def searched(world, tmp_path_factory):
    """A finished search, each of whose looks was counted; not to be changed."""
    out = tmp_path_factory.mktemp("searched") / "out"
    with counted_looks() as seen:
        run(Recipe.build(learned_settings(world, **RULE, front_size=4)), out)
    assert record_of(out)["training"]["looks"] == len(seen) > TRIALS * STEPS // 3
    return out


def args(world, out, *more, **changes):
    return learned_args(world, out, "--set", "front_size=4", *more, **{**RULE, **changes})


def trials_of(out):
    _, *lines = map(json.loads, (out / "episodes.jsonl").read_text().splitlines())
    return lines


def losses(path):
    return [{k: v for k, v in vars(one).items() if k != "seconds"} for one in read_losses(path)]


def test_each_trial_is_a_whole_run_with_knobs_of_its_own(searched):
    trials = trials_of(searched)
    assert [one["number"] for one in trials] == list(range(TRIALS))
    assert {one["steps"] for one in trials} == {STEPS}
    for one in trials:
        assert len({json.dumps(knobs) for knobs in one["knobs"]}) == 1
    assert len({one["knobs"][0]["lr"] for one in trials}) == TRIALS
    assert trials[0]["knobs"][0]["lr"] == pytest.approx(0.01)
    facts = record_of(searched)["training"]["tradeoff"]
    assert facts["inner_steps"] == TRIALS * STEPS
    assert "policy" not in facts
    assert [one["knobs"] for one in facts["tried"]] == [one["knobs"][0] for one in trials]


def test_the_log_is_that_of_the_trial_that_was_chosen(searched):
    front = front_of(searched)
    (taken,) = [entry for entry in front if entry["chosen"]]
    assert taken["worth"] == max(entry["worth"] for entry in front)
    own = searched / "front" / f"episode{taken['episode']:03}.losses.jsonl"
    assert losses(searched / "losses.jsonl") == losses(own)
    log = read_losses(own)
    assert len(log) == STEPS
    assert {tuple(one.knobs.items()) for one in log} == {
        tuple(trials_of(searched)[taken["episode"]]["knobs"][0].items())
    }
    training = record_of(searched)["training"]
    assert training["curve"] == curve(log)
    assert (training["first_loss"], training["last_loss"]) == (log[0].loss, log[-1].loss)
    assert same_deltas(searched / "patch.safetensors", searched / "front" / taken["file"])


def test_its_own_steps_are_not_counted_twice(searched):
    timing = record_of(searched)["timing"]
    own = sum(one.seconds for one in read_losses(searched / "losses.jsonl"))
    assert timing["train"] == pytest.approx(own)
    spent = sum(one["seconds"] for one in trials_of(searched))
    assert timing["episodes"] + timing["train"] == pytest.approx(spent)


def test_the_front_holds_known_names_alone(searched):
    names = {path.name for path in (searched / "front").iterdir()}
    front = front_of(searched)
    logs = {f"episode{entry['episode']:03}.losses.jsonl" for entry in front}
    assert names == {entry["file"] for entry in front} | logs
    assert all(FRONT_FILE.fullmatch(name) for name in names)
    assert not FRONT_FILE.fullmatch("notes.txt")


def test_validation_is_read_at_each_look_and_test_once(searched):
    training = record_of(searched)["training"]
    assert training["split_reads"] == {"validation": training["looks"], "test": 1}


def test_the_same_seed_gives_the_same_patch(world, searched, tmp_path):
    for seed in (3, 4):
        settings = learned_settings(world, **RULE, front_size=4, seed=seed, evaluate=False)
        run(Recipe.build(settings), tmp_path / str(seed))
    assert front_of(tmp_path / "3") == front_of(searched)
    assert same_deltas(tmp_path / "3" / "patch.safetensors", searched / "patch.safetensors")
    assert front_of(tmp_path / "4") != front_of(searched)


def test_one_whole_run_keeps_to_the_usual_values_and_takes_its_best_look(world, tmp_path):
    """The control is a plain run: the same losses to the last digit but those of the knobs."""
    common = {"evaluate": False, "retain_weight": 2.0}
    one = learned_settings(world, tradeoff="search", episodes=1, **common)
    plain = learned_settings(world, tradeoff="fixed", **common)
    for name, settings in (("one", one), ("plain", plain)):
        run(Recipe.build(settings), tmp_path / name)
    searched, alone = (read_losses(tmp_path / name / "losses.jsonl") for name in ("one", "plain"))
    assert [e.loss for e in searched] == pytest.approx([e.loss for e in alone], rel=1e-5)
    front = front_of(tmp_path / "one")
    assert {entry["episode"] for entry in front} == {0}
    assert front[chosen_of(tmp_path / "one") - 1]["worth"] == max(e["worth"] for e in front)


# ---- kills

ROOM = "expunge.metalearning"
SECOND = STEPS + 5  # a step in the middle of the second trial


def check_finished(cli, world, out, searched, before):
    """The same command goes on to the same bits; what was played is not played again."""
    assert not (out / "patch.safetensors").exists()
    result = cli(*args(world, out))
    assert result.code == 0, result.err
    assert tree(out).keys() == tree(searched).keys()
    assert front_of(out) == front_of(searched)
    for path in ("patch.safetensors", *(f"front/{entry['file']}" for entry in front_of(out))):
        assert same_deltas(out / path, searched / path), path
    assert losses(out / "losses.jsonl") == losses(searched / "losses.jsonl")
    mine, theirs = map(record_of, (out, searched))
    for key in ("training", "scores", "values"):
        assert without_times(mine[key]) == without_times(theirs[key])
    assert trials_of(out)[: len(before)] == before  # seconds included


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, KILLED), (signal.SIGTERM, STOPPED)])
def test_killed_in_a_trial(cli, world, searched, tmp_path, number, code):
    out = tmp_path / "out"
    done = run_until(args(world, out), (LOOP, "Trainer", "_step"), SECOND, "after", number)
    assert done.returncode == code, done.stderr
    before = trials_of(out)
    assert len(before) == 1
    check_finished(cli, world, out, searched, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, KILLED), (signal.SIGTERM, STOPPED)])
def test_killed_beside_processes_that_play(cli, world, searched, tmp_path, number, code):
    """The trials that it has written down are kept; its processes end with it."""
    out = tmp_path / "out"
    place = (f"{ROOM}.episodes", "EpisodeLog", "write")
    done = run_until(args(world, out, workers=2), place, 1, "after", number)
    assert done.returncode == code, done.stderr
    before = trials_of(out)
    assert len(before) == 1
    check_finished(cli, world, out, searched, before)


class Gone(BaseException):
    """Nobody catches it: what is on disk is all that is left."""


def gone(number):
    """A function that is never finished when it is called for the n-th time."""
    calls = []

    def call(original, *args, **more):
        calls.append(1)
        if len(calls) == number:
            raise Gone
        return original(*args, **more)

    return call


@pytest.mark.parametrize(
    ("place", "number", "played"),
    [
        ((f"{ROOM}.episodes.EpisodeLog.write"), 2, 1),
        ((f"{ROOM}.exploring.write_losses"), 2, 1),
        ((f"{ROOM}.archive.Archive.add"), 7, 1),
        ((f"{ROOM}.exploring.save_front"), 1, TRIALS),
    ],
)
def test_gone_between(cli, world, searched, tmp_path, monkeypatch, place, number, played):
    out = tmp_path / "out"
    owner, _, name = place.rpartition(".")
    with monkeypatch.context() as patched:
        stop, original = gone(number), pkgutil.resolve_name(place)
        patched.setattr(pkgutil.resolve_name(owner), name, lambda *a, **m: stop(original, *a, **m))
        with pytest.raises(Gone):
            run(Recipe.build(learned_settings(world, **RULE, front_size=4)), out)
    before = trials_of(out)
    assert len(before) == played
    check_finished(cli, world, out, searched, before)


# ---- pick, show, fresh


def test_pick_takes_the_log_of_its_trial_too(cli, searched, tmp_path):
    out = copied(searched, tmp_path / "out")
    front = front_of(out)
    before = front[chosen_of(out) - 1]["episode"]
    others = [at for at, e in enumerate(front, 1) if e["episode"] != before]
    assert others, "one trial dominates all others: the world has changed"
    result = cli("pick", out, "--point", others[0])
    assert result.code == 0, result.err
    entry = front[others[0] - 1]
    log = read_losses(out / "front" / f"episode{entry['episode']:03}.losses.jsonl")
    assert losses(out / "losses.jsonl") != losses(searched / "losses.jsonl")
    assert read_losses(out / "losses.jsonl") == log
    training = record_of(out)["training"]
    assert training["curve"] == curve(log)
    assert training["last"]["loss"] == training["last_loss"] == log[-1].loss
    assert same_deltas(out / "patch.safetensors", out / "front" / entry["file"])


def test_a_pick_writes_nothing_before_all_is_measured(searched, tmp_path, monkeypatch):
    out = copied(searched, tmp_path / "out")
    number = 1 if chosen_of(out) != 1 else 2
    before = tree(out)
    stop, measure = gone(2), Suite.measure
    monkeypatch.setattr(Suite, "measure", lambda *a, **m: stop(measure, *a, **m))
    with pytest.raises(Gone):
        pick(out, number)
    assert tree(out) == before


def test_show_and_its_figure(cli, searched, tmp_path):
    shown = cli("show", searched)
    assert shown.code == 0, shown.err
    assert f"{TRIALS} whole runs: {TRIALS * STEPS} steps" in shown.out
    assert "the last run" not in shown.out
    assert len([line for line in shown.out.splitlines() if "chosen" in line]) == 1
    assert cli("show", searched, "--json").json["front"] == front_of(searched)
    pytest.importorskip("matplotlib")
    drawn = cli("show", searched, "--figure", tmp_path / "a.svg")
    assert drawn.code == 0, drawn.err
    drawn = LearnedRun.load(searched)
    trials = trials_of(searched)
    assert [one.reward for one in drawn.episodes] == [one["reward"] for one in trials]
    (taken,) = [entry["episode"] for entry in front_of(searched) if entry["chosen"]]
    assert drawn.last == drawn.episodes[taken]


def test_fresh_discards_the_search(cli, world, searched, tmp_path):
    out = copied(searched, tmp_path / "out")
    check(cli(*args(world, out, "--set", "episodes=2")), DATA, "other settings", "episodes")
    (out / "front" / "notes.txt").write_text("mine")
    assert cli(*world.args(out, "--set", "evaluate=false", "--fresh")).code == 0
    assert {path for path in tree(out) if "/" in path} == {"front/notes.txt"}
    assert not (out / "episodes.jsonl").exists()


# ---- refused, diverged


def test_a_search_wants_something_to_try(cli, world, tmp_path):
    """Edits without choices have none; those with some are looked at by what the model says."""
    out = tmp_path / "out"
    for edit in ("project-out", "banned-words"):
        args = world.rude_args(out, objective=edit, tradeoff="search")
        check(cli(*args), RECIPE, f"{edit} trains nothing", "search", "choices to try")
    args = world.rude_args(out, "--set", "reward=representation", objective="profs")
    check(cli(*args, "--tradeoff", "search"), RECIPE, "profs reads no layer", "likelihood")
    assert not out.exists()


def test_where_every_trial_diverges(world, tmp_path, monkeypatch):
    """Before its first look each: the search is one that diverged, as a run would be."""
    settings = learned_settings(world, **RULE, objective_settings={}, lr=0.01)
    trainer = Learning.trainer

    def breaking(self, *args, **more):
        found = trainer(self, *args, **more)

        def fail(*_args):
            raise DivergedError(what="not finite", got="nan", allowed="finite", fix="lower lr")

        found._step = fail
        return found

    monkeypatch.setattr(Learning, "trainer", breaking)
    with pytest.raises(DivergedError, match="No episode") as caught:
        run(Recipe.build(settings), tmp_path / "out")
    assert isinstance(caught.value, TrainingError)
    assert caught.value.exit_code == 6
