"""A run with a learned trade-off: its front, its counts, kills in it, its folder, its figure."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import yaml
from learned_world import (
    EPISODES,
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
from stopping import KILLED, LOOP, run_until
from test_bad_input import DATA, RECIPE, check, tree

from expunge.demo import LEARNED, OBJECTIVES, TOXICITY, _jobs, _main_settings
from expunge.errors import DataError, PatchError
from expunge.metalearning.archive import CLEARLY
from expunge.metalearning.figure import LearnedRun, _numbered, _running_mean, tradeoff_figure
from expunge.model.patch import Patch
from expunge.recipe import Recipe
from expunge.run import run
from expunge.training.watch import Point


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """A finished learned run, each of whose looks was counted; not to be changed."""
    out = tmp_path_factory.mktemp("learned") / "out"
    with counted_looks() as seen:
        run(Recipe.build(learned_settings(world)), out)
    assert record_of(out)["training"]["looks"] == len(seen)
    # Beside those on the way: a point of the front each, and tries to better the best of them.
    on_the_way = sum(len(one["points"]) for one in episodes_of(out))
    assert len(seen) > on_the_way + len(front_of(out))
    return out


def episodes_of(out):
    _, *lines = map(json.loads, (out / "episodes.jsonl").read_text().splitlines())
    return lines


# ---- what it leaves and shows


def test_the_front_and_the_patch_that_is_chosen(undisturbed):
    front = front_of(undisturbed)
    assert len(front) > 2
    points = [(entry["forget"], entry["retain"]) for entry in front]
    assert points == sorted(set(points))
    number = chosen_of(undisturbed)
    taken = front[number - 1]
    # The usual run, which is the first episode, is taken only if it is clearly better.
    learned = [entry["worth"] for entry in front if entry["episode"]]
    most = max(entry["worth"] for entry in front)
    fallback = not learned or max(learned) <= max(0, most - CLEARLY)
    assert taken["worth"] == (most if fallback else max(learned))
    files = {path.name for path in (undisturbed / "front").iterdir()}
    assert files == {entry["file"] for entry in front}
    own = undisturbed / "patch.safetensors"
    same = [same_deltas(own, undisturbed / "front" / entry["file"]) for entry in front]
    assert same == [entry["chosen"] for entry in front]
    for training in (record_of(undisturbed)["training"], Patch.load(own).metadata["training"]):
        assert training["tradeoff"]["chosen"] == {"point": number, **taken}
    seen = episodes_of(undisturbed)
    assert [one["number"] for one in seen] == list(range(EPISODES + 1))
    assert [one["steps"] for one in seen] == [STEPS, *[6] * (EPISODES - 1), STEPS]
    for entry in front:
        assert entry["step"] in [step for step, _, _ in seen[entry["episode"]]["points"]]
        assert (entry["scale"] == 1 and entry["other"] is None) or entry["chosen"]


def test_every_reading_of_a_split_is_counted(world, undisturbed, tmp_path, cli):
    n = record_of(undisturbed)["training"]["looks"]
    assert record_of(undisturbed)["training"]["split_reads"] == {"validation": n, "test": 1}
    out = copied(undisturbed, tmp_path / "out")
    # Measured again beside an oracle, on the other split, then not at all.
    again = [undisturbed / "recipe.yaml", "-o", out]
    assert cli("run", *again, "--oracle", world.oracle).code == 0
    assert record_of(out)["training"]["split_reads"] == {"validation": n, "test": 2}
    result = cli("run", *again, "--oracle", world.oracle, "--set", "measure_on=validation")
    assert record_of(out)["training"]["split_reads"] == {"validation": n + 1, "test": 2}
    assert f"read for this run: validation {n + 1} times, test twice" in result.out
    assert same_deltas(out / "patch.safetensors", undisturbed / "patch.safetensors")


def test_looks_of_a_plain_run_and_of_calibration_count(world, tmp_path, cli):
    quick = ["--set", "reward=representation", "--set", "evaluate=false", "--set", "look_every=2"]
    record = cli(*world.args(tmp_path / "plain", *quick, "--json")).json
    assert record["training"]["split_reads"] == {"validation": 2, "test": 0}
    assert "front" not in record
    out = tmp_path / "calibrated"
    result = cli(*world.args(out, *quick, "--set", "action_every=2", layer=None))
    assert result.code == 0, result.err
    found = record_of(out)["training"]["calibration"]
    assert [one["layer"] for one in found["tried"]] == [1, 2, 3]
    assert record_of(out)["training"]["split_reads"] == {"validation": 3 * 2 + 2, "test": 0}
    lines = [line for line in cli("show", out).out.splitlines() if "chosen" in line]
    (best,) = [one for one in found["tried"] if one["layer"] == found["layer"]]
    assert len(lines) == 1
    assert all(word in lines[0] for word in (f" {best['layer']} ", f"{best['worth']:.3f}"))


def test_run_and_show_print_the_front(world, tmp_path, cli):
    out = tmp_path / "out"
    result = cli(*learned_args(world, out, "--set", "evaluate=false"))
    assert result.code == 0, result.err
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (written["tradeoff"], written["episodes"]) == ("learned", EPISODES)
    shown = cli("show", out)
    number, front = chosen_of(out), front_of(out)
    for text in (result.out, shown.out):
        rows = [
            line for line in text.splitlines() if " episode " in line or " the last run " in line
        ]
        assert len(rows) == len(front)
        for place, (row, entry) in enumerate(zip(rows, front, strict=True), 1):
            last = entry["episode"] == EPISODES
            said = "the last run" if last else f"episode {entry['episode']}"
            numbers = [f"{entry[name]:.3f}" for name in ("forget", "retain", "worth")]
            assert all(word in row for word in (f" {place} ", said, *numbers))
            assert ("chosen" in row) == (place == number)
    for text in (result.err, shown.err):
        assert f"`expunge pick {out} --point N` takes another point" in text
    assert cli("show", out, "--json").json["front"] == front
    assert cli("show", out / "record.json", "--json").json["front"] == front


def test_the_same_seed_gives_the_same_patch(world, undisturbed, tmp_path):
    for name, seed in (("one", 3), ("other", 4)):
        run(Recipe.build(learned_settings(world, seed=seed, evaluate=False)), tmp_path / name)
    own = undisturbed / "patch.safetensors"
    assert same_deltas(own, tmp_path / "one" / "patch.safetensors")
    assert not same_deltas(own, tmp_path / "other" / "patch.safetensors")


# ---- kills

# Steps of all episodes are done by the same loop as those of the last run.
BEFORE = STEPS + (EPISODES - 1) * 6
ROOM = "expunge.metalearning"
PLACES = {
    "between two episodes": ((f"{ROOM}.episodes", "EpisodeLog", "write"), 3, "after"),
    "in an episode, its points on the front": (
        ("expunge.metalearning.archive", "Archive", "add"),
        9,
        "after",
    ),
    "while a point's patch is written": (("expunge.model.shards", "", "save_file"), 3, "after"),
    # The state is of step 8, and an action began at step 6.
    "in the last run": ((LOOP, "", "append_step"), BEFORE + 10, "after"),
    "before the patch is written": ((f"{ROOM}.exploring", "", "save_front"), 1, "after"),
}


@pytest.mark.parametrize("name", PLACES)
def test_killed(cli, world, undisturbed, tmp_path, name):
    out = tmp_path / "out"
    place, number, when = PLACES[name]
    done = run_until(learned_args(world, out), place, number, when, signal.SIGKILL)
    assert done.returncode == KILLED, done.stderr
    assert not (out / "patch.safetensors").exists()
    if "written" in name and "point" in name:
        assert [path for path in (out / "front").iterdir() if path.suffix == ".tmp"]
    if name == "in the last run":
        assert len((out / "losses.jsonl").read_text().splitlines()) == 10
    result = cli(*learned_args(world, out))
    assert result.code == 0, result.err
    assert tree(out).keys() == tree(undisturbed).keys()
    assert front_of(out) == front_of(undisturbed)
    for path in ("patch.safetensors", *(f"front/{entry['file']}" for entry in front_of(out))):
        assert same_deltas(out / path, undisturbed / path), path
    mine, theirs = map(record_of, (out, undisturbed))
    assert without_times(mine["training"]) == without_times(theirs["training"])
    assert mine["scores"] == theirs["scores"]
    assert without_times(episodes_of(out)) == without_times(episodes_of(undisturbed))


@pytest.mark.parametrize("name", ["between two episodes", "in the last run"])
def test_killed_beside_processes_that_play(cli, world, undisturbed, tmp_path, name):
    """They end with it, and the same command goes on to the same bits."""
    out = tmp_path / "out"
    place, number, when = PLACES[name]
    if name == "in the last run":  # whose state alone is kept
        place, number = ("expunge.training.state", "TrainingState", "save"), 2
    done = run_until(learned_args(world, out, workers=2), place, number, when, signal.SIGKILL)
    assert done.returncode == KILLED, done.stderr
    assert len(episodes_of(out)) == (EPISODES if name == "in the last run" else 3)
    result = cli(*learned_args(world, out, workers=2))
    assert result.code == 0, result.err
    assert tree(out).keys() == tree(undisturbed).keys()
    assert front_of(out) == front_of(undisturbed)
    assert same_deltas(out / "patch.safetensors", undisturbed / "patch.safetensors")
    assert without_times(episodes_of(out)) == without_times(episodes_of(undisturbed))


def test_an_interrupted_exploration_keeps_its_episodes(cli, world, tmp_path):
    """A control: what was played is not played again."""
    out = tmp_path / "out"
    place, number, when = PLACES["between two episodes"]
    run_until(learned_args(world, out), place, number, when, signal.SIGKILL)
    before = episodes_of(out)
    assert len(before) == 3
    assert cli(*learned_args(world, out, "--set", "evaluate=false")).code == 0
    assert episodes_of(out)[:3] == before  # seconds included


# ---- refused


def test_an_edit_has_no_tradeoff(cli, world, tmp_path):
    for kind in ("learned", "schedule"):
        args = world.rude_args(tmp_path / "out", objective="profs", tradeoff=kind)
        check(cli(*args), RECIPE, "profs trains nothing", kind, "--tradeoff")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tradeoff": "lerned"}, ("tradeoff", "'lerned'", "'learned'")),
        ({"episodes": 0}, ("episodes", "0", "greater than or equal to 1")),
        ({"episodes": "many"}, ("--episodes", "integer")),
        ({"workers": 0}, ("--workers", "greater than or equal to 1")),
        ({"tradeoff": "fixed"}, ("--episodes", "--tradeoff fixed", "--tradeoff learned")),
    ],
)
def test_flags_that_do_not_fit(cli, world, tmp_path, changes, said):
    check(cli(*learned_args(world, tmp_path / "out", **changes)), RECIPE, *said)


def test_processes_for_episodes_that_are_not_played(cli, world, tmp_path):
    args = world.args(tmp_path / "out", workers=2)
    check(cli(*args), RECIPE, "no episodes", "--workers 2, --tradeoff fixed", "--tradeoff learned")
    assert not (tmp_path / "out").exists()


def test_the_demo_takes_two_tradeoffs(cli, tmp_path):
    out = tmp_path / "out"
    check(cli("demo", "-o", out, "--tradeoff", "schedule"), RECIPE, "'schedule'", "fixed, learned")
    check(cli("demo", "-o", out, "--episodes", 3), RECIPE, "--episodes 3", "--tradeoff learned")
    assert not out.exists()


def test_a_learned_demo_knows_nothing_of_settings_chosen_by_hand(tmp_path):
    def recipes(tradeoff, episodes=None):
        jobs = _jobs(tmp_path, 1, False, _main_settings(tradeoff, episodes))
        return {job.out.name: job.recipe for batch in jobs.values() for job in batch}

    fixed, learned = recipes("fixed"), recipes("learned", 7)
    first, *_ = OBJECTIVES
    main = {f"{first}-seed0", f"{TOXICITY['objective']}-seed0"}
    assert {name for name in fixed if fixed[name] != learned[name]} == main
    assert fixed[f"{first}-seed0"].lr == OBJECTIVES[first]["lr"]
    for name in main:
        recipe = learned[name]
        assert (recipe.tradeoff, recipe.episodes) == ("learned", 7)
        assert (recipe.lr, recipe.retain_weight, recipe.objective_settings) == ("auto", None, {})
        assert recipe == fixed[name].updated(**LEARNED, episodes=7)
    assert learned[f"{TOXICITY['objective']}-seed0"].probe_pooling == "mean"


# ---- the folder


def test_fresh_discards_episodes_and_front_but_nothing_of_a_users(
    cli, world, undisturbed, tmp_path
):
    out = copied(undisturbed, tmp_path / "out")
    (out / "front" / "notes.txt").write_text("mine")
    refused = cli(*world.args(out, "--set", "evaluate=false"))
    check(refused, DATA, "a run with other settings", "tradeoff")
    assert cli(*world.args(out, "--set", "evaluate=false", "--fresh")).code == 0
    assert {path for path in tree(out) if "/" in path} == {"front/notes.txt"}
    assert not (out / "episodes.jsonl").exists()
    (out / "front" / "notes.txt").unlink()
    assert cli(*learned_args(world, out, "--set", "evaluate=false", "--fresh")).code == 0
    assert tree(out).keys() == tree(undisturbed).keys()
    assert cli(*world.args(out, "--set", "evaluate=false", "--fresh")).code == 0
    assert not (out / "front").exists()


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
def test_a_users_folder_named_front_is_no_runs(cli, world, tmp_path, fresh):
    page = tmp_path / "front" / "index.html"
    page.parent.mkdir()
    page.write_text("mine")
    check(cli(*learned_args(world, tmp_path, *fresh)), DATA, "files that are no run's", "front")
    assert tree(tmp_path) == {"front/index.html": b"mine"}


def test_leftovers_in_the_front_are_cleared_away(cli, world, undisturbed, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    out = copied(undisturbed, tmp_path / "out")
    (out / "front" / f".episode000-step0003.safetensors.{child.pid}.tmp").write_text("half")
    (out / "front" / f".mine.{child.pid}.tmp").write_text("mine")
    (out / "patch.safetensors").unlink()
    (out / "record.json").unlink()
    assert cli(*learned_args(world, out)).code == 0
    assert {name for name in tree(out) if "/." in name} == {f"front/.mine.{child.pid}.tmp"}


def test_episodes_of_other_data_are_refused(cli, world, undisturbed, tmp_path):
    out = copied(undisturbed, tmp_path / "out")
    (out / "patch.safetensors").unlink()
    (out / "record.json").unlink()
    lines = (out / "episodes.jsonl").read_text().splitlines()
    (out / "episodes.jsonl").write_text("\n".join(['{"context": "elsewhere"}', *lines[1:]]) + "\n")
    check(cli(*learned_args(world, out)), 6, "started from other data", "--fresh")


# ---- the figure


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_figure_is_drawn_from_the_folder_alone(undisturbed, tmp_path, cli, suffix):
    pytest.importorskip("matplotlib")
    out = copied(undisturbed, tmp_path / "out")
    for name in ("recipe.yaml", "patch.safetensors", "losses.jsonl"):
        (out / name).unlink()
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    assert cli("show", out, "--figure", one).code == 0
    tradeoff_figure(undisturbed, other)
    assert one.read_bytes() == other.read_bytes()
    front = front_of(out)
    for place, entry in enumerate(front):
        entry["chosen"] = place == 0
    (out / "front.json").write_text(json.dumps(front))
    assert tradeoff_figure(out, one).read_bytes() != other.read_bytes()


def test_what_the_figure_draws(undisturbed):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from expunge.metalearning import figure as drawing

    learned = LearnedRun.load(undisturbed)
    assert [one.reward for one in (*learned.episodes, learned.last)] == [
        one["reward"] for one in episodes_of(undisturbed)
    ]
    left, middle, right = Figure().subplots(1, 3)
    drawing._rewards(left, learned)
    drawing._points(middle, learned)
    drawing._knobs(right, learned)
    of = {line.get_label(): line for axis in (left, middle) for line in axis.get_lines()}
    (taken,) = [entry for entry in front_of(undisturbed) if entry["chosen"]]
    assert of["chosen"].get_xydata().tolist() == [[taken["forget"], taken["retain"]]]
    assert of["base"].get_xydata().tolist() == [[0, 1]]
    knobs = learned.last.knobs
    (lr, *_) = right.get_lines()
    assert lr.get_ydata()[0] == pytest.approx(knobs[0]["lr"] / 0.01)
    assert len(knobs) == 4
    assert lr.get_xdata().tolist() == [0, 3, 6, 9, 12]


def test_actions_that_a_recipe_leaves_open_are_drawn(world, tmp_path, cli):
    out = tmp_path / "out"
    left_open = ["--set", "evaluate=false", "--set", "action_every=auto"]
    result = cli(*learned_args(world, out, *left_open, episodes=2))
    assert result.code == 0, result.err
    drawn = LearnedRun.load(out)
    assert (drawn.every, len(drawn.last.knobs)) == (1, STEPS)


def test_numbers_of_points_that_lie_together_share_a_place():
    points = [Point(0.1, 0.99), Point(0.5, 0.95), Point(0.51, 0.94), Point(0.52, 0.90)]
    found = _numbered(points, 0.04, 0.02)
    assert found == [(points[0], "1"), (points[1], "2, 3"), (points[3], "4")]


def test_the_running_mean_by_hand():
    assert _running_mean([1.0, 3.0, 5.0, 1.0], 2) == [1.0, 2.0, 4.0, 3.0]


def test_no_figure_of_a_run_without_learning(finished, undisturbed, tmp_path):
    with pytest.raises(PatchError, match="No front"):
        tradeoff_figure(finished, tmp_path / "a.svg")
    out = copied(undisturbed, tmp_path / "out")
    (out / "episodes.jsonl").unlink()
    with pytest.raises(DataError, match=r"episodes\.jsonl"):
        tradeoff_figure(out, tmp_path / "a.svg")
