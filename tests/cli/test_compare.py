"""`expunge compare` on the tiny world: its cells and plan, kills, divergence, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
import yaml
from compare_world import (
    CONTROL,
    EDIT,
    OWN,
    SEEDS,
    STEPS,
    TRIALS,
    json_of,
    tiny_settings,
    write_plan,
)
from learned_world import same_deltas, without_times
from stopping import KILLED, run_until
from test_bad_input import DATA, RECIPE, check, tree

from expunge.compare import COMPARISON_NAME, Comparing, ComparisonPlan
from expunge.errors import DivergedError
from expunge.learning import Learning
from expunge.records import RunRecord
from expunge.report.gather import gather

FUNCTIONS = tuple(OWN)
TRAINED = tuple(OWN.values())


@pytest.fixture(scope="module")
def plan(world, tmp_path_factory):
    return write_plan(tmp_path_factory.mktemp("plan") / "plan.yaml", tiny_settings(world))


@pytest.fixture(scope="module")
def compared(plan, tmp_path_factory):
    """A finished comparison; not to be changed."""
    out = tmp_path_factory.mktemp("compared") / "out"
    Comparing(ComparisonPlan.load(plan), out, workers=1).run()
    return out


def record(out, *parts):
    return RunRecord.load(out.joinpath(*parts))


def recipe(out, *parts):
    return yaml.safe_load(out.joinpath(*parts, "recipe.yaml").read_text())


def rows(out, key="cells"):
    return {(row["method"], row["function"]): row for row in json_of(out / COMPARISON_NAME)[key]}


def found(out):
    """What a comparison found, without what hangs on the clock."""
    return without_times(json_of(out / COMPARISON_NAME))


# ---- what it leaves


def test_every_cell_is_measured(compared):
    cells = rows(compared)
    methods = (*TRAINED, EDIT, CONTROL)
    assert list(cells) == [(method, function) for function in FUNCTIONS for method in methods]
    for (method, function), row in cells.items():
        assert row["seeds"] == list(range(SEEDS))
        assert (row["diverged"], row["missing"]) == (0, 0), (method, function)
        assert all(0 <= cell[name] <= 1 for cell in row["by_seed"] for name in ("forget", "retain"))


def test_a_report_of_its_folder_says_the_same(compared):
    told = json.loads(json.dumps(gather([compared]).compared().to_dict()))
    written = json_of(compared / COMPARISON_NAME)
    assert written["settings"]["own"] == OWN  # not the usual ones
    for key in ("settings", "verdict", "verdict_reason", "tests", "cells"):
        assert told[key] == written[key], key
    for key in ("notes", "interference"):  # in the order of the folders
        assert sorted(map(json.dumps, told[key])) == sorted(map(json.dumps, written[key])), key


def test_own_objectives_are_tested_against_all_others(compared):
    tests = json_of(compared / COMPARISON_NAME)["tests"]
    pairs = {(one["function"], one["own"], one["other"]) for one in tests}
    assert pairs == {
        (function, own, other)
        for function, own in OWN.items()
        for other in (*TRAINED, EDIT, CONTROL)
        if other != own
    }


def test_functions_at_once_are_measured_in_all_four_ways_on_each(compared):
    knowledge, toxicity = TRAINED
    ways = {
        f"{knowledge} + {toxicity}",
        f"joint({knowledge}, {toxicity})",
        f"{knowledge} then {toxicity}",
        f"{toxicity} then {knowledge}",
    }
    together = rows(compared, "interference")
    assert set(together) == {(way, function) for way in ways for function in FUNCTIONS}
    for row in together.values():
        assert row["removed"] == "knowledge + toxicity"
        assert (row["seeds"], row["diverged"], row["missing"]) == ([0], 0, 0)


def test_the_sum_is_of_the_seeds_own_patches(compared):
    parts = {key: compared / key / OWN[key] / "seed0" for key in FUNCTIONS}
    wanted = {
        f"{key}/{OWN[key]}/seed0": sha256((path / "patch.safetensors").read_bytes()).hexdigest()
        for key, path in parts.items()
    }
    for key in FUNCTIONS:
        told = record(compared, "together", f"sum-{key}", "seed0").training["parts"]
        assert told == wanted
    one, other = (RunRecord.load(path).training["tradeoff"] for path in parts.values())
    assert one["chosen"] != other["chosen"]


# ---- what is chosen, and that it is used


def chosen_knobs(out, function, method):
    facts = record(out, function, method, "choice").training["tradeoff"]
    return facts["tried"][facts["chosen"]["episode"]]["knobs"]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("method", TRAINED)
def test_seeds_train_with_the_knobs_of_the_choice(compared, function, method):
    knobs = chosen_knobs(compared, function, method)
    for seed in range(SEEDS):
        written = recipe(compared, function, method, f"seed{seed}")
        own = written["objective_settings"]
        told = {"lr": written["lr"], "retain_weight": written["retain_weight"], **own}
        assert told == knobs  # to the last digit
        (tried,) = record(compared, function, method, f"seed{seed}").training["tradeoff"]["tried"]
        assert tried["knobs"] == pytest.approx(knobs, rel=1e-9)
        assert (written["seed"], written["episodes"]) == (seed, 1)


def test_a_choice_that_is_not_the_usual_one_was_made_somewhere(compared):
    """A control of the test above: the first trial keeps to the usual values."""
    taken = {
        record(compared, f, m, "choice").training["tradeoff"]["chosen"]["episode"]
        for f in FUNCTIONS
        for m in TRAINED
    }
    assert taken - {0}


@pytest.mark.parametrize("way", ["joint", "one-after-the-other", "reversed"])
def test_two_functions_at_once_use_the_chosen_knobs_too(compared, way):
    path = compared / "together" / way / "seed0" / "recipes.yaml"
    written = {one["function"]: one for one in yaml.safe_load(path.read_text())["recipes"]}
    for function, method in OWN.items():
        one = written[function]
        knobs = chosen_knobs(compared, function, method)
        own = one["objective_settings"]
        assert {"lr": one["lr"], "retain_weight": one["retain_weight"], **own} == knobs
        assert (one["tradeoff"], one["seed"]) == ("fixed", 0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_edit_is_made_with_the_choice_worth_most(compared, function):
    facts = record(compared, function, EDIT, "choice").training["tradeoff"]
    assert facts["chosen"]["worth"] == max(one["worth"] for one in facts["tried"])
    ranks = {one["settings"]["rank"] for one in facts["tried"]}
    assert 1 in ranks and 32 not in ranks  # activations are 32 wide
    for seed in range(SEEDS):
        written = recipe(compared, function, EDIT, f"seed{seed}")
        assert written["objective_settings"] == facts["chosen"]["settings"]
        assert "tradeoff" not in written or written["tradeoff"] == "fixed"
        own = compared / function / EDIT / f"seed{seed}" / "patch.safetensors"
        assert same_deltas(own, compared / function / EDIT / "choice" / "patch.safetensors")


def test_choices_never_read_the_test_split(compared):
    for function in FUNCTIONS:
        for method in (*TRAINED, EDIT):
            choice = record(compared, function, method, "choice")
            assert choice.scores == [] and choice.values == []
            assert choice.training["split_reads"]["test"] == 0
            assert choice.training["split_reads"]["validation"] > 0
            assert choice.seed == 1000
            for seed in range(SEEDS):
                reads = record(compared, function, method, f"seed{seed}").training["split_reads"]
                assert reads["test"] == 1


def test_budgets_are_equal_and_told(compared):
    for (method, function), row in rows(compared).items():
        if method not in TRAINED:
            assert not row["total"]["inner_steps"]
            continue
        assert row["choice"]["inner_steps"] == TRIALS * STEPS
        assert row["total"]["inner_steps"] == (TRIALS + SEEDS) * STEPS
        looks = [record(compared, function, method, "choice").training["split_reads"]["validation"]]
        looks += [cell["spent"]["looks"] for cell in row["by_seed"]]
        assert row["total"]["looks"] == sum(looks)
    notes = json_of(compared / COMPARISON_NAME)["notes"]
    assert not [note for note in notes if "steps of training" in note]


def test_probes_are_measured_of_the_first_seed_alone(compared):
    told = {
        seed: "probe_accuracy" in record(compared, "toxicity", "npo", f"seed{seed}").training
        for seed in range(SEEDS)
    }
    assert told == {0: True, 1: False}


# ---- again, and interrupted


def test_the_second_time_nothing_is_done(cli, plan, compared):
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("*") if path.is_file()}
    result = cli("compare", plan, "-o", compared, "--workers", 1, "--json")
    assert result.code == 0, result.err
    assert result.json == json_of(compared / COMPARISON_NAME)
    changed = [path.name for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert changed == [COMPARISON_NAME]


def args(plan, out, workers=1):
    return ["compare", str(plan), "-o", str(out), "--workers", str(workers)]


def test_killed_in_the_middle(cli, plan, compared, tmp_path):
    """SIGKILL in the run of a seed: what was finished stays as it was, to the byte."""
    out = tmp_path / "out"
    place = ("expunge.records", "RunRecord", "save")
    done = run_until(args(plan, out), place, 9, "before", signal.SIGKILL)
    assert done.returncode == KILLED, done.stderr
    before = {path: path.read_bytes() for path in out.rglob("record.json")}
    assert len(before) == 8
    result = cli(*args(plan, out))
    assert result.code == 0, result.err
    assert {path: path.read_bytes() for path in before} == before
    assert found(out) == found(compared)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups")
def test_nothing_stays_behind_of_a_killed_command(plan, compared, tmp_path):
    """Its processes end too, and the same command goes on."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "expunge", *args(plan, out, workers=2)]
    begun = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len([*out.rglob("record.json")]) >= 2)
        assert begun.poll() is None and len(alive(begun.pid)) > 3
        begun.kill()
        begun.wait()
        wait_until(lambda: not alive(begun.pid))
    finally:
        for process in alive(begun.pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    Comparing(ComparisonPlan.load(plan), out, workers=1).run()
    assert found(out) == found(compared)


def wait_until(is_so, seconds=120):
    latest = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < latest
        time.sleep(0.1)


def alive(group):
    """The processes of a group that still do something."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def test_two_processes_find_what_one_does(world, tmp_path):
    small = {"functions": {"knowledge": tiny_settings(world)["functions"]["knowledge"]}}
    small |= {"methods": list(TRAINED), "trials": 1, "interference_seeds": 0, "settings": {}}
    plan = ComparisonPlan.build(tiny_settings(world, **small))
    for workers in (1, 2):
        Comparing(plan, tmp_path / str(workers), workers=workers).run()
    assert found(tmp_path / "2") == found(tmp_path / "1")


def test_more_seeds_later(cli, world, compared, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    kept = out / "knowledge" / "npo" / "seed0" / "record.json"
    before = kept.read_bytes()
    plan = write_plan(tmp_path / "plan.yaml", tiny_settings(world))
    result = cli(*args(plan, out), "--set", "seeds=3", "--json")
    assert result.code == 0, result.err
    assert {tuple(row["seeds"]) for row in result.json["cells"]} == {(0, 1, 2)}
    assert {row["missing"] for row in result.json["cells"]} == {0}
    assert kept.read_bytes() == before


def test_fresh_seeds(cli, world, compared, tmp_path):
    """They train with the settings of the same choice; finished seeds are not run again."""
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    choice = out / "knowledge" / "npo" / "choice" / "record.json"
    before = choice.read_bytes()
    small = tiny_settings(world, methods=list(TRAINED), interference_seeds=1)
    plan = write_plan(tmp_path / "plan.yaml", small)
    finished = out / "knowledge" / "npo" / "seed1" / "record.json"
    known = finished.read_bytes()
    result = cli(*args(plan, out), "--set", "first_seed=1", "--set", "seeds=2", "--json")
    assert result.code == 0, result.err
    assert {tuple(row["seeds"]) for row in result.json["cells"]} == {(1, 2)}
    assert (choice.read_bytes(), finished.read_bytes()) == (before, known)
    assert (out / "together" / "joint" / "seed1" / "record.json").is_file()
    assert json_of(out / "knowledge" / "npo" / "seed2" / "record.json")["seed"] == 2


def test_other_settings_in_its_folder(cli, world, plan, compared):
    before = tree(compared)
    refused = cli(*args(plan, compared), "--set", "functions.knowledge.steps=5")
    check(refused, DATA, "other settings", "steps", "--fresh")
    assert tree(compared) == before


# ---- what is printed


def test_json_alone_goes_to_standard_output(cli, plan, compared):
    result = cli(*args(plan, compared), "--json")
    assert {"cells", "tests", "verdict", "interference", "notes"} <= result.json.keys()


def test_the_table(cli, plan, compared):
    out = cli(*args(plan, compared)).out
    told = json_of(compared / COMPARISON_NAME)
    assert told["verdict"]["sentence"] in " ".join(out.split()) or told["verdict_reason"] in out
    for method in (*TRAINED, EDIT, CONTROL):
        assert out.count(f"{method} ({SEEDS})") == 2
    assert "several functions at once" in out
    assert f" {(TRIALS + SEEDS) * STEPS} " in out
    assert all(note in out.replace("\n", " ") for note in told["notes"][:1])


def test_a_report_of_its_folder(cli, compared, tmp_path):
    """Training alone, as before a sequence, is none of the cells; joint runs hold no scores."""
    page = tmp_path / "page.html"
    result = cli("report", compared, "-o", page, "--json")
    assert result.code == 0, result.err
    text = page.read_text()
    assert all(method in text for method in (*TRAINED, EDIT, CONTROL, "joint(", " then "))
    assert "runs diverged" not in text and "run diverged" not in text
    assert text.count(f"of them {TRIALS * STEPS} to choose") == len(FUNCTIONS) * len(TRAINED)


def test_two_records_of_one_cell_are_refused(cli, compared, tmp_path):
    other = tmp_path / "other" / "seed0"
    shutil.copytree(compared / "knowledge" / "npo" / "seed0", other)
    told = cli("report", compared, other, "-o", tmp_path / "page.html")
    check(told, DATA, "Two records fill one cell", "npo on knowledge, seed 0")
    assert not (tmp_path / "page.html").exists()


# ---- divergence


@pytest.fixture
def diverging(monkeypatch):
    """``diverging(when)``: training of recipes for which ``when`` holds is not finite."""

    def install(when):
        trainer = Learning.trainer
        asked = []

        def breaking(self, one, *given, **more):
            made = trainer(self, one, *given, **more)
            if when(one):
                asked.append(one)

                def fail(*_args):
                    raise DivergedError(
                        what="The loss is not finite", got="nan", allowed="numbers", fix="lower lr"
                    )

                made._step = fail
            return made

        monkeypatch.setattr(Learning, "trainer", breaking)
        return asked

    return install


def test_a_cell_that_diverges(cli, world, compared, tmp_path, diverging):
    """It counts as 0; its control and the sum say so; the others stay; it is not tried again."""
    out, plan = tmp_path / "out", write_plan(tmp_path / "plan.yaml", tiny_settings(world))
    method = OWN["toxicity"]
    asked = diverging(
        lambda one: (
            (one.function, one.seed, one.tradeoff) == ("toxicity", 0, "search")
            and one.objective == method
        )
    )
    result = cli(*args(plan, out), "--json")
    assert result.code == 0, result.err
    assert len(asked) == 1
    cells, whole = rows(out), rows(compared)
    row = cells[method, "toxicity"]
    first, second = row["by_seed"]
    assert (row["diverged"], row["missing"]) == (1, 0)
    assert [first[k] for k in ("status", "forget", "retain", "harmonic")] == ["diverged", 0, 0, 0]
    assert "No episode (search) got as far" in first["reason"]
    assert second == whole[method, "toxicity"]["by_seed"][1]
    assert row["forget"]["mean"] == pytest.approx(second["forget"] / 2)
    control = cells[CONTROL, "toxicity"]["by_seed"]
    assert [cell["status"] for cell in control] == ["diverged", "measured"]
    assert control[0]["reason"] == "what it rests on diverged"
    untouched = set(cells) - {(method, "toxicity"), (CONTROL, "toxicity")}
    assert all(cells[key]["by_seed"] == whole[key]["by_seed"] for key in untouched)

    together = rows(out, "interference")
    assert set(together) == set(rows(compared, "interference"))
    for (way, _), one in together.items():
        assert one["removed"] == "knowledge + toxicity"
        assert one["diverged"] == (" + " in way)

    training = record(out, "toxicity", method, "seed0").training
    assert training["diverged"] == first["reason"]
    again = cli(*args(plan, out), "--json")
    assert again.json == result.json
    assert len(asked) == 1  # not tried again
    assert f"{method} (2, 1 diverged)" in cli(*args(plan, out)).out
    page = cli("report", out, "-o", tmp_path / "page.html")
    assert page.code == 0, page.err
    assert f"{method} on toxicity: 1 run diverged" in (tmp_path / "page.html").read_text()
    assert cli("show", out / "toxicity" / method / "seed0").code == 0


def test_a_search_that_diverges(cli, world, tmp_path, diverging):
    """All its seeds diverged, and all that rests on them."""
    out, plan = tmp_path / "out", write_plan(tmp_path / "plan.yaml", tiny_settings(world))
    method = OWN["knowledge"]
    asked = diverging(lambda one: (one.function, one.objective) == ("knowledge", method))
    result = cli(*args(plan, out), "--json")
    assert result.code == 0, result.err
    assert {one.seed for one in asked} == {1000}
    cells = rows(out)
    for name in (method, CONTROL):
        assert cells[name, "knowledge"]["diverged"] == SEEDS
    assert cells[CONTROL, "toxicity"]["diverged"] == 0
    for one in rows(out, "interference").values():
        assert (one["diverged"], one["missing"]) == (1, 0)
    assert len(rows(out, "interference")) == 8
    for seed in range(SEEDS):
        assert "diverged" in record(out, "knowledge", method, f"seed{seed}").training
    tried = len(asked)
    assert cli(*args(plan, out), "--json").json == result.json
    assert len(asked) == tried

    # The page shows the same cells, and none for the seed of the search.
    assert cli("report", out, "-o", tmp_path / "page.html").code == 0
    text = (tmp_path / "page.html").read_text()
    assert f"{method} on knowledge: {SEEDS} runs diverged" in text
    assert not re.search(r"seed\W+1000", text)


def test_a_joint_training_that_diverges(cli, world, compared, tmp_path, diverging):
    """Two functions at once, where one alone trains well."""
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    shutil.rmtree(out / "together")
    plan = write_plan(tmp_path / "plan.yaml", tiny_settings(world))
    asked = diverging(lambda one: one.tradeoff == "fixed" and one.trained_layers is not None)
    result = cli(*args(plan, out), "--json")
    assert result.code == 0, result.err
    assert asked
    lost = {way for (way, _), one in rows(out, "interference").items() if one["diverged"]}
    assert lost == {f"joint({', '.join(TRAINED)})"}
    assert rows(out) == rows(compared)
    tried = len(asked)
    assert cli(*args(plan, out), "--json").json == result.json
    assert len(asked) == tried


# ---- plans that cannot be used


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("methods=[npo, cosine-rmuu]", ("Unknown objective", "cosine-rmuu", "cosine-rmu")),
        ("own.knowledge=rmu", ("made for knowledge is not among", "'rmu'", "npo")),
        ("own.knowledge=profs", ("cannot be trained with other", "'profs'", "an objective")),
        ("own.knowlege=npo", ("knowlege", "knowledge")),
        ("metods=[npo]", ("metods", "its keys are", "methods")),
        ("functions={}", ("functions", "at least 1")),
        ("functions.knowlege={}", ("knowlege", "knowledge")),
        ("functions.knowledge.stepps=3", ("stepps", "steps")),
        ("settings.npoo.knowledge.lr=0.1", ("npoo", "npo")),
        ("settings.npo.knowlege.lr=0.1", ("knowlege", "knowledge")),
        ("settings.npo.knowledge.objective_settings={bta: 1}", ("bta", "beta")),
        ("functions.knowledge.tradeoff=learned", ("sets tradeoff itself", "learned")),
        ("functions.toxicity.evaluate=false", ("sets evaluate itself", "False")),
        ("seeds=0", ("seeds", "greater than or equal to 1")),
        ("seeds=many", ("seeds", "integer")),
        ("first_seed=-1", ("first_seed", "greater than or equal to 0")),
        ("first_seed=999", ("seeds 999 to 1000", "without 1000", "first_seed")),
    ],
)
def test_plans_that_cannot_be_used(cli, plan, tmp_path, change, said):
    check(cli(*args(plan, tmp_path / "out"), "--set", change), RECIPE, *said)
    assert not (tmp_path / "out").exists()


def test_a_plan_that_is_no_plan(cli, tmp_path):
    (tmp_path / "plan.yaml").write_text("- a\n")
    check(cli(*args(tmp_path / "plan.yaml", tmp_path / "out")), RECIPE, "not a mapping")
    check(cli(*args(tmp_path / "none.yaml", tmp_path / "out")), RECIPE, "none.yaml")


@pytest.mark.parametrize("change", ["quick=true", "data=here", "sedes=3"])
def test_the_built_in_plan_takes_settings_too(cli, tmp_path, change):
    key = change.partition("=")[0]
    check(cli("compare", "-o", tmp_path / "out", "--set", change), RECIPE, key, "its keys are")
    assert not (tmp_path / "out").exists()


def test_quick_is_of_the_built_in_plan(cli, plan, tmp_path):
    check(cli(*args(plan, tmp_path / "out"), "--quick"), RECIPE, "--quick", str(plan))


def test_folders_of_runs_are_told_apart(compared):
    names = {path.name for path in (compared / "knowledge").iterdir()}
    assert names == {*TRAINED, EDIT, CONTROL}
    assert Comparing(None, Path("out")).folder("knowledge", "cosine-rmu (learned)", "seed0") == (
        Path("out/knowledge/cosine-rmu-learned/seed0")
    )


def test_json_of_the_file_is_what_was_found(compared):
    assert json.loads((compared / COMPARISON_NAME).read_text())["settings"]["own"] == OWN
