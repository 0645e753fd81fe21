"""What a record keeps behind its scores: value by value, the questions, what the models said."""

from __future__ import annotations

import json
import math

import pytest
from learned_world import same_deltas
from small_world import WORDS, questions, write_rows
from test_compose import knowledge, toxicity

from expunge.compose import compose, control
from expunge.errors import DataError
from expunge.measuring import ASKED
from expunge.records import RunRecord, Score, Values
from expunge.run import run
from expunge.workbench import Workbench

LONG = " ".join(WORDS * 2)


@pytest.fixture(scope="module")
def asked(world, tmp_path_factory):
    """Questions of which some are too long for the model: they are not scored."""
    rows = questions(12, seed=11)
    for row in rows[::3]:  # some of either split
        row["question"] = f"{row['question']} {LONG}"
    return write_rows(tmp_path_factory.mktemp("asked") / "asked.jsonl", rows)


@pytest.fixture(scope="module")
def facts(world, asked, tmp_path_factory):
    recipe = knowledge(
        world,
        questions=str(world.questions),
        retain_questions=str(asked),
        validation_share=0.1,
        oracle=str(world.oracle),
    )
    return run(recipe, tmp_path_factory.mktemp("facts") / "out")


@pytest.fixture(scope="module")
def manners(world, tmp_path_factory):
    return run(toxicity(world, max_prompts=6), tmp_path_factory.mktemp("manners") / "out")


def behind(record: RunRecord, score: Score) -> Values:
    (found,) = [
        one
        for one in record.values
        if (one.key, one.model, one.split) == (score.key, score.model, score.split)
    ]
    return found


@pytest.mark.parametrize("name", ["facts", "manners"])
def test_values_make_up_their_score(request, name):
    record = request.getfixturevalue(name)
    checked = set()
    for score in record.scores:
        if not any((one.key, one.model) == (score.key, score.model) for one in record.values):
            continue  # a summary of other scores
        values = behind(record, score)
        assert values.unit == score.unit
        scored = [at for at, value in enumerate(values.values) if value is not None]
        assert len(scored) == score.n
        if score.value is None:
            assert not scored
            continue
        weights = values.weights or [1.0] * len(values.values)
        assert len(weights) == len(values.values)
        total = sum(weights[at] * values.values[at] for at in scored)
        mean = total / sum(weights[at] for at in scored)
        expected = math.log(score.value) if score.unit == "perplexity" else score.value
        assert mean == pytest.approx(expected, abs=1e-5), score
        checked.add(score.name)
    assert {"perplexity"} < checked
    wanted = {"forget_accuracy", "retain_accuracy", "forget_nll"}
    assert (wanted if name == "facts" else {"toxicity_rate", "fluency", "neutral_nll"}) <= checked


def test_weights_are_told_where_examples_count_differently(facts):
    of = {one.name: one for one in facts.values if one.model == "patched"}
    assert of["forget_accuracy"].weights is None
    assert of["perplexity"].weights is not None and len(set(of["perplexity"].weights)) > 1


def test_models_are_measured_on_the_same_examples(facts, manners):
    for record in (facts, manners):
        sizes: dict = {}
        for one in record.values:
            sizes.setdefault(one.key, set()).add(len(one.values))
        assert all(len(found) == 1 for found in sizes.values())
    assert {one.model for one in facts.values} == {"base", "patched", "oracle"}


def test_what_was_not_scored_is_none_in_its_place(facts):
    places = [at for at, text in enumerate(facts.asked["retain"]) if LONG in text]
    for one in facts.values:
        if one.name == "retain_accuracy":
            assert [at for at, value in enumerate(one.values) if value is None] == places
            assert one.weights is None or all(one.weights[at] == 0 for at in places)
    assert 0 < len(places) < len(facts.asked["retain"])


def test_questions_are_those_of_the_values(world, facts):
    said = {side: len(texts) for side, texts in facts.asked.items()}
    of = {one.name: len(one.values) for one in facts.values}
    assert said == {"forget": of["forget_accuracy"], "retain": of["retain_accuracy"]}
    assert max(said.values()) <= ASKED
    rows = [json.loads(line)["question"] for line in world.questions.read_text().splitlines()]
    assert all(any(row in text for row in rows) for text in facts.asked["forget"])


def test_what_the_models_said_and_who_flags_it(world, manners):
    rude = set(world.words.read_text().split())
    sets = {one.prompts for one in manners.samples}
    assert sets == {score.prompts for score in manners.scores if score.prompts}
    for one in manners.samples:
        assert set(one.said) == set(one.flagged) == {"base", "patched"}
        for model, text in one.said.items():
            by_words = any(name.startswith("words") for name in one.flagged[model])
            assert by_words == bool(rude & set(text.split())), (model, text)
    flags = [f for one in manners.samples for f in one.flagged.values()]
    assert any(flags) and not all(flags)


def test_sums_and_controls_keep_values_too(world, asked, tmp_path):
    recipe = knowledge(world, retain_questions=str(asked))
    first = run(recipe, tmp_path / "run")
    bench = Workbench(recipe)
    alone = compose(recipe, [tmp_path / "run"], tmp_path / "sum", bench=bench)
    assert alone.values == first.values and alone.asked == first.asked
    noise = control(recipe, tmp_path / "run", tmp_path / "control", bench=bench)
    base = [one for one in first.values if one.model == "base"]
    assert [one for one in noise.values if one.model == "base"] == base
    assert noise.values != first.values


def test_a_record_comes_back_as_it_was(facts, manners, tmp_path):
    for record in (facts, manners):
        record.save(tmp_path)
        assert RunRecord.load(tmp_path) == record


def test_records_of_the_first_version_are_read(facts, tmp_path):
    raw = facts.to_dict() | {"schema_version": 1}
    for name in ("values", "asked", "samples"):
        del raw[name]
    (tmp_path / "record.json").write_text(json.dumps(raw))
    found = RunRecord.load(tmp_path)
    assert (found.schema_version, found.scores) == (1, facts.scores)
    assert (found.values, found.asked, found.samples) == ([], {}, [])


@pytest.mark.parametrize(
    "change",
    [{"schema_version": 3}, {"values": [{"name": "x"}]}, {"samples": [1]}, {"asked": []}],
)
def test_records_of_another_kind_are_not(facts, tmp_path, change):
    (tmp_path / "record.json").write_text(json.dumps(facts.to_dict() | change))
    with pytest.raises(DataError):
        RunRecord.load(tmp_path)


# ---- probes


def test_probes_before_and_after(world, tmp_path):
    """Of every layer; asking for them changes neither the run nor how it is known."""
    recipe = toxicity(world, objective="npo", evaluate=False, seed=2)
    asking = recipe.updated(measure_probes=True)
    assert asking.fingerprint == recipe.fingerprint
    assert asking.bench_key == recipe.bench_key
    bench = Workbench(recipe)
    record = run(asking, tmp_path / "asking", bench=bench)
    told = record.training["probe_accuracy"]
    assert [layer for layer, _ in told["before"]] == [layer for layer, _ in told["after"]]
    assert [layer for layer, _ in told["before"]] == [0, 1, 2, 3]
    assert all(0 <= share <= 1 for side in told.values() for _, share in side)
    # The base's are those of the base, after a run on the same bench too.
    learning = Workbench(recipe).learning
    fresh = learning.probing._fitted(recipe, learning.opened(recipe.model, None), (0, 1, 2, 3))
    assert told["before"] == [[probe.layer, probe.accuracy] for probe in fresh]
    again = run(recipe, tmp_path / "plain")
    assert "probe_accuracy" not in again.training
    one, other = (tmp_path / name / "patch.safetensors" for name in ("asking", "plain"))
    assert same_deltas(one, other)
