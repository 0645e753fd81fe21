"""Two functions removed from one model by training: jointly, and one after the other."""

from __future__ import annotations

import json
import signal
from io import StringIO

import pytest
import torch
from rich.console import Console
from small_world import save_model
from stopping import KILLED, LOOP, STOPPED, run_until
from test_bad_input import tree
from test_compose import knowledge, toxicity

from expunge.compose import compose
from expunge.cuts import Where
from expunge.errors import DataError, RecipeError
from expunge.interference import joint, sequence
from expunge.interference.joint import WorstLook, joint_recipes, trained_together
from expunge.jobs import Job, JointJob, SequenceJob, run_jobs
from expunge.model.apply import apply_patch
from expunge.model.patch import Patch
from expunge.model.segment import LOGPROBS
from expunge.records import RunRecord
from expunge.run import run
from expunge.tables import print_record
from expunge.training.state import TrainingState
from expunge.training.watch import Point
from expunge.workbench import Workbench

JOINT_FILES = {"recipes.yaml", "losses.jsonl", "patch.safetensors", "record.json"}


def patch_in(folder):
    return Patch.load(folder / "patch.safetensors")


def same_deltas(one, other):
    assert one.names == other.names and one.base == other.base
    return all(torch.equal(one.deltas[name], other.deltas[name]) for name in one.names)


def losses(out):
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def names_in(out):
    return {path.name for path in out.iterdir()}


def facts(world, **changes):
    return knowledge(world, **{"steps": 8, "evaluate": False, **changes})


def manners(world, **changes):
    return toxicity(world, **{"evaluate": False, **changes})


@pytest.fixture(scope="module")
def together(world, tmp_path_factory):
    """Facts and manners, trained jointly."""
    out = tmp_path_factory.mktemp("joint") / "out"
    joint([facts(world), manners(world)], out)
    return out


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    """The run of facts alone."""
    out = tmp_path_factory.mktemp("first") / "out"
    run(facts(world), out)
    return out


@pytest.fixture(scope="module")
def after(world, first, tmp_path_factory):
    """Facts, then manners."""
    out = tmp_path_factory.mktemp("sequence") / "out"
    sequence([facts(world), manners(world)], out, before=first)
    return out


# ---- layers


@pytest.mark.parametrize(
    ("wheres", "found"),
    [
        # What one trains the other trains too, up to what it reads.
        ([((1, 2), (2,)), ((4, 5), (5,))], [(1, 2), (1, 2, 4, 5)]),
        ([((1, 2), (5,)), ((0, 3), (3,))], [(0, 1, 2, 3), (0, 1, 2, 3)]),
        # Twins read the head, but forget and retain texts stop at the deepest layer.
        ([((0, 1, 2), (LOGPROBS, 1, 2)), ((5,), (5,))], [(0, 1, 2), (0, 1, 2, 5)]),
        # Log-probabilities are read above all.
        ([((2,), (2,)), ((6, 7), (LOGPROBS,))], [(2,), (2, 6, 7)]),
    ],
)
def test_each_trains_what_any_trains_and_it_can_reach(wheres, found):
    assert trained_together([Where(*where) for where in wheres], 8) == found


def test_the_worst_of_several_looks_counts():
    look = WorstLook((lambda: Point(0.2, 0.9), lambda: Point(0.5, 0.7)))
    assert look() == Point(0.2, 0.7)


# ---- joint


def test_what_a_joint_training_leaves(world, together):
    assert names_in(together) == JOINT_FILES
    record = RunRecord.load(together)
    assert record.function == "knowledge + toxicity"
    assert record.objective == "joint(cosine-rmu, multi-layer-probe)"
    assert record.scores == [] and record.seed == 0
    assert [len(recipe) > 10 for recipe in record.provenance["recipes"]] == [True, True]
    assert [one["objective"] for one in record.training["each"]] == [
        "cosine-rmu",
        "multi-layer-probe",
    ]
    patch = patch_in(together)
    assert set(record.provenance["base"]) == set(patch.names)
    assert patch.metadata["recipes"][0]["model"] == "base"  # not where it lies
    lowest = {min(one["trained_layers"]) for one in record.training["each"]}
    assert lowest == {0}
    assert len(losses(together)) == 8


def test_it_is_measured_as_either_function(world, together, tmp_path):
    for make in (knowledge, toxicity):
        recipe = make(world)
        out = tmp_path / recipe.function
        record = compose(recipe, (together,), out, bench=Workbench(recipe))
        assert record.function == "knowledge + toxicity"
        assert record.objective == "joint(cosine-rmu, multi-layer-probe)"
        assert record.scores == Workbench(recipe).evaluate(patch_in(together))


def test_it_is_neither_part_nor_their_sum(world, together, first, tmp_path):
    run(manners(world), tmp_path / "manners")
    parts = [patch_in(first), patch_in(tmp_path / "manners")]
    ours = patch_in(together)
    for other in (*parts, parts[0] + parts[1]):
        name = min(other.names)
        assert (ours.deltas[name] - other.deltas[name]).norm() > 0.1 * other.deltas[name].norm()


def test_a_plain_sum_of_losses_is_something_else(world, together, tmp_path):
    recipes = [facts(world), manners(world)]
    record = joint(recipes, tmp_path / "out", balance=False)
    assert record.objective == "joint-sum(cosine-rmu, multi-layer-probe)"
    assert not same_deltas(patch_in(tmp_path / "out"), patch_in(together))
    with pytest.raises(DataError, match="something else than these recipes"):
        joint(recipes, tmp_path / "out")


def test_the_same_recipes_give_the_same_bits(world, together, tmp_path):
    recipes = [facts(world), manners(world)]
    # With benches that have opened other depths and trained other things before.
    benches = [Workbench(recipe) for recipe in joint_recipes(recipes)]
    for bench in benches:
        bench.train(bench.recipe)
    joint(recipes, tmp_path / "again", benches=benches)
    assert same_deltas(patch_in(tmp_path / "again"), patch_in(together))
    assert losses(tmp_path / "again") == losses(together)
    # And what shared a model trains alone as before.
    fresh, _ = Workbench(recipes[0]).train(recipes[0])
    shared, _ = benches[0].train(recipes[0])
    assert same_deltas(fresh, shared)


def test_layers_that_are_left_open_are_settled_once(world, tmp_path):
    recipes = [facts(world, layer="auto", questions=None), manners(world)]
    record = joint(recipes, tmp_path / "out")
    tried = record.training["settled"][0]["calibration"]
    assert record.training["each"][0]["read_layers"] == [tried["layer"]]
    assert record.training["split_reads"]["validation"] >= len(tried["tried"])


def test_two_recipes_of_one_bench(world, tmp_path):
    """The same data and function twice: the stores are shared, the seeds differ."""
    record = joint([facts(world), facts(world, seed=1)], tmp_path / "out")
    assert record.function == "knowledge + knowledge"
    assert [one["seed"] for one in record.training["each"]] == [0, 1]


def test_a_finished_one_is_not_trained_again(world, together, monkeypatch):
    before = tree(together)
    monkeypatch.setattr(Workbench, "check", None)
    record = joint([facts(world), manners(world)], together)
    assert record.to_dict() == RunRecord.load(together).to_dict()
    assert tree(together) == before


def shown(record):
    """What `expunge show` prints of a record."""
    console = Console(file=StringIO(), width=200)
    print_record(console, record)
    return console.file.getvalue()


def test_a_run_that_collapses_is_noticed(world, tmp_path):
    said = []

    class Loud(type(Workbench(facts(world)).progress)):
        def say(self, message):
            said.append(message)

    wild = {"lr": 0.05, "look_every": 1, "collapse_floor": 0.9}
    record = joint([facts(world, **wild), manners(world)], tmp_path / "out", progress=Loud())
    assert record.training["collapsed"] is not None, losses(tmp_path / "out")
    assert record.training["restored"] < record.training["collapsed"]
    assert any("the run stopped" in message for message in said)
    recipe = knowledge(world)
    measured = compose(recipe, (tmp_path / "out",), tmp_path / "m", bench=Workbench(recipe))
    assert measured.training["collapsed"] == {"out": record.training["collapsed"]}
    told = "collapsed after {collapsed} steps; what is taken is, or is made of, the state after "
    told += "{restored} steps"
    assert told.format(**record.training) in shown(record)
    assert "collapsed" not in shown(measured)  # of a sum there is one for each part


# ---- one after the other


def test_what_a_sequence_leaves(world, after):
    assert names_in(after) == JOINT_FILES
    record = RunRecord.load(after)
    assert record.function == "knowledge + toxicity"
    assert record.objective == "cosine-rmu then multi-layer-probe"
    assert record.training["before"]["objective"] == "cosine-rmu"
    assert set(record.provenance["data"]) == {"forget.txt", "retain.txt", "questions.jsonl"} | {
        "pairs.tsv",
        "prompts.jsonl",
    }


def test_it_equals_training_on_an_exported_model(world, first, after, tmp_path):
    """The second recipe sees the patched base, with its probes, boundaries and references."""
    apply_patch(patch_in(first), world.model, tmp_path / "patched")
    recipe = manners(world, model=str(tmp_path / "patched"))
    run(recipe, tmp_path / "second")
    second, ours = patch_in(tmp_path / "second"), patch_in(after)
    base = Workbench(facts(world)).learning.opened(str(world.model), None).model
    other = Workbench(recipe).learning.opened(recipe.model, None).model
    second.apply_(other)
    ours.apply_(base)
    theirs = dict(other.named_parameters())
    for name, parameter in base.named_parameters():
        assert torch.allclose(parameter, theirs[name], rtol=1e-5, atol=1e-6)
    # Control: on the untouched base the second patch is another one.
    run(manners(world), tmp_path / "alone")
    alone = patch_in(tmp_path / "alone")
    assert max(float((alone.deltas[n] - second.deltas[n]).abs().max()) for n in alone.names) > 1e-3


def test_both_orders_differ_and_share_a_function(world, after, tmp_path):
    record = sequence([manners(world), facts(world)], tmp_path / "out")
    assert record.function == "knowledge + toxicity"
    assert record.objective == "multi-layer-probe then cosine-rmu"
    assert not same_deltas(patch_in(tmp_path / "out"), patch_in(after))
    # Without a folder of the first, it is trained within.
    assert names_in(tmp_path / "out") == JOINT_FILES | {"before"}


def test_a_run_of_the_first_is_used_as_it_is(world, first, after, tmp_path):
    before = tree(first)
    sequence([facts(world), manners(world)], tmp_path / "out", before=first)
    assert tree(first) == before
    assert same_deltas(patch_in(tmp_path / "out"), patch_in(after))
    with pytest.raises(DataError, match="other settings"):
        sequence([facts(world, seed=5), manners(world)], tmp_path / "else", before=first)
    assert tree(first) == before


def test_three_in_a_row(world, first, tmp_path):
    recipes = [facts(world), manners(world), facts(world, seed=3)]
    record = sequence(recipes, tmp_path / "out")
    assert record.objective == "cosine-rmu then multi-layer-probe then cosine-rmu"
    assert same_deltas(patch_in(tmp_path / "out" / "before" / "before"), patch_in(first))


# ---- interrupted


def write_recipes(world, folder):
    paths = []
    for name, recipe in (("facts", facts(world)), ("manners", manners(world))):
        recipe.updated(save_every=3).save(folder / f"{name}.yaml")
        paths.append(str(folder / f"{name}.yaml"))
    return paths


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, KILLED), (signal.SIGTERM, STOPPED)])
def test_joint_training_goes_on_with_the_same_bits(cli, world, together, tmp_path, number, code):
    out = tmp_path / "out"
    args = ["joint", *write_recipes(world, tmp_path), "-o", str(out)]
    done = run_until(args, (LOOP, "", "append_step"), 5, "after", number)
    assert done.returncode == code, done.stderr
    state = TrainingState.load(out / "state.safetensors")
    assert state.step == (3 if number == signal.SIGKILL else 5)
    assert len(state.beside) == 1
    assert cli(*args).code == 0
    assert names_in(out) == JOINT_FILES
    assert same_deltas(patch_in(out), patch_in(together))
    assert losses(out) == losses(together)


@pytest.mark.parametrize("place", [5, 13])
def test_a_sequence_goes_on_in_either_part(cli, world, after, tmp_path, place):
    out = tmp_path / "out"
    args = ["sequence", *write_recipes(world, tmp_path), "-o", str(out)]
    done = run_until(args, (LOOP, "", "append_step"), place, "after", signal.SIGKILL)
    assert done.returncode == KILLED, done.stderr
    assert (out / "before" / "record.json").exists() == (place == 13)
    assert cli(*args).code == 0
    assert same_deltas(patch_in(out), patch_in(after))
    assert not (out / "state.safetensors").exists()


def test_the_command_measures_by_each_function(cli, world, tmp_path):
    knowledge(world).save(tmp_path / "facts.yaml")
    toxicity(world).save(tmp_path / "manners.yaml")
    given = ("joint", tmp_path / "facts.yaml", tmp_path / "manners.yaml", "-o", tmp_path / "out")
    result = cli(*given, "--json")
    assert result.code == 0, result.err
    assert list(result.json["measured"]) == ["measured-knowledge", "measured-toxicity"]
    assert result.json["objective"] == "joint(cosine-rmu, multi-layer-probe)"
    for name, record in result.json["measured"].items():
        assert RunRecord.load(tmp_path / "out" / name).to_dict() == record
    again = cli(*given)
    assert again.code == 0 and "finished" in again.err
    assert "joint(cosine-rmu, multi-layer-probe)" in again.out
    assert cli(*given, "--fresh").code == 0


# ---- in jobs


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_wait_for_what_they_build_on(world, together, first, after, tmp_path, workers):
    pair = (facts(world), manners(world))
    names = ["measured", "after", "joint", "first"]
    paths = {name: tmp_path / name for name in names}
    jobs = [
        Job(knowledge(world), paths["measured"], sum_of=(paths["joint"],)),
        SequenceJob(pair, paths["after"], before=paths["first"]),
        JointJob(pair, paths["joint"]),
        Job(facts(world), paths["first"]),
    ]
    records = dict(zip(names, run_jobs(jobs, workers=workers), strict=True))
    assert records["measured"].objective == "joint(cosine-rmu, multi-layer-probe)"
    assert records["after"].objective == "cosine-rmu then multi-layer-probe"
    assert same_deltas(patch_in(paths["joint"]), patch_in(together))
    assert same_deltas(patch_in(paths["after"]), patch_in(after))
    assert same_deltas(patch_in(paths["first"]), patch_in(first))


# ---- refused


@pytest.mark.parametrize("way", [joint, sequence])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "nothing to combine"),
        ({"model": "elsewhere"}, "different bases"),
        ({"objective": "profs"}, "trains nothing"),
        ({"tradeoff": "learned"}, "learned trade-off"),
    ],
)
def test_recipes_that_cannot_be_trained_so(world, tmp_path, way, changes, message):
    save_model(tmp_path / "elsewhere", seed=9)
    recipes = [facts(world)]
    if changes is not None:
        if "model" in changes:
            changes = {"model": str(tmp_path / "elsewhere")}
        recipes.append(manners(world, **changes))
    with pytest.raises(RecipeError, match=message):
        way(recipes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_opened_model_has_one_dtype(world, tmp_path):
    with pytest.raises(RecipeError, match="differ in dtype"):
        joint([facts(world), manners(world, dtype="bfloat16")], tmp_path / "out")


def test_a_file_that_is_not_there_leaves_no_folder(world, tmp_path):
    recipes = [facts(world), manners(world, pairs=str(tmp_path / "none.tsv"))]
    for way in (joint, sequence):
        with pytest.raises(DataError):
            way(recipes, tmp_path / "out" / way.__name__)
    assert not (tmp_path / "out" / "joint").exists()


def test_another_folder_is_refused(world, together, first, after, tmp_path):
    recipes = [facts(world), manners(world)]
    for way, out in ((sequence, together), (joint, after), (joint, first)):
        before = tree(out)
        with pytest.raises(DataError, match="something else than these recipes"):
            way(recipes, out)
        assert tree(out) == before
    with pytest.raises(DataError, match="something else than these recipes"):
        joint(recipes[::-1], together)
    with pytest.raises(DataError, match="without its recipe"):
        run(recipes[0], together)
