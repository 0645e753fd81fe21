"""Toxicity's data in roles: pairs stay whole, what is measured is never trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from expunge.data.splits import normalise
from expunge.data.text import Labelled, Text
from expunge.errors import DataError, RecipeError
from expunge.functions import FUNCTIONS
from expunge.functions.base import DataSettings
from expunge.functions.knowledge import load_knowledge
from expunge.functions.toxicity import load_toxicity

DATA = Path(__file__).parents[3] / "shared" / "data"
SPLITS = ("validation", "test")


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_pairs(path, pairs):
    return write(path, ["toxic\tneutral1", *(f"{toxic}\t{neutral}" for toxic, neutral in pairs)])


def pair(index):
    opening = f"Ann number {index} went home and said:"
    return f"{opening} you {index} moron", f"{opening} please {index} go"


@pytest.fixture
def files(tmp_path):
    return DataSettings(
        pairs=write_pairs(tmp_path / "pairs.tsv", [pair(i) for i in range(50)]),
        retain=(write(tmp_path / "wiki.txt", [f"garden number {i}" for i in range(100)]),),
        prompts=write(tmp_path / "prompts.txt", [f"and then {i}" for i in range(10)]),
    )


@pytest.fixture
def labelled(files, tmp_path):
    rows = [{"text": f"what a moron you are {i}", "label": 1} for i in range(10)]
    rows += [{"text": f"what a day this is {i}", "label": 0} for i in range(40)]
    source = write(tmp_path / "labelled.jsonl", [json.dumps(row) for row in rows])
    return replace(files, pairs=None, labelled=source)


def contents(items):
    return {normalise(getattr(item, "content", item)) for item in items}


def wordings(pairs):
    return contents([*(one.toxic for one in pairs), *(one.neutral for one in pairs)])


def assert_disjoint(data):
    trained = contents([*data.retain, *data.contrast, *data.forget[0], *data.labelled])
    validation, test = (data.measured[name] for name in SPLITS)
    for split in (validation, test):
        assert not trained & wordings(split.pairs)
        for items in (split.retain_texts, split.perplexity_texts, *split.prompts.values()):
            assert not trained & contents(items)
    assert not wordings(validation.pairs) & wordings(test.pairs)
    for role in ("retain_questions", "retain_texts", "perplexity_texts"):
        assert not contents(getattr(validation, role)) & contents(getattr(test, role))
    for name in ("openings", "prompts"):
        both = [contents(split.prompts.get(name, ())) for split in (validation, test)]
        assert not both[0] & both[1]


def test_registered():
    entry = FUNCTIONS.get("toxicity")
    assert entry.part is load_toxicity
    assert entry.extras["objective"] == "multi-layer-probe"


def test_pairs_in_their_roles(files):
    data = load_toxicity(files)
    assert data.paired and len(data.forget[0]) == len(data.contrast) == 40
    rude = {normalise(a): normalise(b) for a, b in map(pair, range(50))}
    for toxic, neutral in zip(data.forget[0], data.contrast, strict=True):
        assert rude[normalise(toxic.text)] == normalise(neutral.text)
    assert len(data.retain) == 120 and contents(data.contrast) <= contents(data.retain)
    assert [len(data.measured[name].pairs) for name in SPLITS] == [5, 5]
    assert [len(data.measured[name].prompts["openings"]) for name in SPLITS] == [5, 5]
    assert [len(data.measured[name].prompts["prompts"]) for name in SPLITS] == [2, 8]
    assert [len(data.measured[name].retain_texts) for name in SPLITS] == [10, 10]
    assert_disjoint(data)
    assert set(data.hashes) == {files.pairs, files.prompts, *files.retain}


def test_openings_are_the_first_words_of_held_back_pairs(files):
    data = load_toxicity(files)
    test = data.measured["test"]
    for one, opening in zip(test.pairs, test.prompts["openings"], strict=True):
        assert opening == Text(" ".join(one.neutral.split()[:4]))
        assert one.opening.endswith("said:") and one.opening.startswith(opening.text)


def test_own_labelled_texts_are_the_training_texts(files):
    data = load_toxicity(files)
    expected = [Labelled(text.text, toxic=True) for text in data.forget[0]]
    expected += [Labelled(text.text, toxic=False) for text in data.contrast]
    assert list(data.labelled) == expected


def test_the_cap_picks_the_same_pairs_on_both_sides(files):
    data = load_toxicity(replace(files, max_texts=12))
    assert len(data.forget[0]) == len(data.contrast) == 12
    for toxic, neutral in zip(data.forget[0], data.contrast, strict=True):
        assert toxic.text.split()[2] == neutral.text.split()[2]
    sources = [("garden" in text.text) for text in data.retain]
    assert (sources.count(True), sources.count(False)) == (6, 6)  # as many from each source
    whole = load_toxicity(files)
    assert whole.measured == data.measured
    assert contents(data.forget[0]) < contents(whole.forget[0])


def test_paraphrases_of_one_toxic_sentence_stay_together(files, tmp_path):
    pairs = [pair(i) for i in range(50)]
    again = [(toxic.upper(), f"{neutral} now") for toxic, neutral in pairs]
    data = load_toxicity(replace(files, pairs=write_pairs(tmp_path / "two.tsv", pairs + again)))
    assert len(data.forget[0]) == 80
    assert [len(data.measured[name].pairs) for name in SPLITS] == [10, 10]
    assert_disjoint(data)


def test_a_neutral_wording_of_two_toxic_ones_is_in_one_split(files, tmp_path):
    pairs = [pair(i) for i in range(50)]
    other = [(f"{toxic} again", neutral) for toxic, neutral in pairs]
    data = load_toxicity(replace(files, pairs=write_pairs(tmp_path / "two.tsv", pairs + other)))
    note = next(note for note in data.notes if "neutral wording is held back" in note)
    lost = int(note.split(": ")[1].split()[0])
    kept = len(data.forget[0]) + sum(len(data.measured[name].pairs) for name in SPLITS)
    assert kept + lost == 100
    assert len(contents(data.retain)) == len(data.retain)  # rehearsed once
    assert_disjoint(data)


def test_a_neutral_wording_that_is_toxic_elsewhere_is_dropped(files, tmp_path):
    pairs = [pair(i) for i in range(50)]
    pairs.append(("you blockhead", pairs[0][0].upper()))
    data = load_toxicity(replace(files, pairs=write_pairs(tmp_path / "x.tsv", pairs)))
    assert any("1 pairs dropped: neutral wording is toxic elsewhere" in n for n in data.notes)
    assert normalise(pairs[0][0]) not in contents([*data.contrast, *data.retain])


def test_neutral_wordings_among_the_retain_texts_count_once(files, tmp_path):
    neutral = [pair(i)[1] for i in range(50)]
    more = write(tmp_path / "more.txt", [*neutral, "one more", "and another"])
    data = load_toxicity(replace(files, retain=(*files.retain, more)))
    assert any("50 texts dropped that came before" in note for note in data.notes)
    assert_disjoint(data)


def test_toxic_texts_among_the_retain_texts(files, tmp_path):
    leak = write(tmp_path / "leak.txt", [f"rain {i}" for i in range(9)] + [pair(7)[0]])
    settings = replace(files, retain=(*files.retain, leak))
    with pytest.raises(DataError, match="holds forget content"):
        load_toxicity(settings)
    data = load_toxicity(replace(settings, on_overlap="drop"))
    assert any("1 texts dropped that are forget texts too" in note for note in data.notes)
    assert_disjoint(data)


def test_pairs_of_which_nothing_can_be_measured(files, tmp_path):
    """Without a shared opening, or with nothing after it; both can still be trained on."""
    apart = [(f"moron number {i}", f"a person, number {i}") for i in range(30)]
    ended = [(f"number {i} you moron", f"number {i}") for i in range(30)]
    data = load_toxicity(replace(files, pairs=write_pairs(tmp_path / "x.tsv", apart + ended)))
    assert [data.measured[name].pairs for name in SPLITS] == [(), ()]
    assert len(data.forget[0]) == 48
    openings = [one for name in SPLITS for one in data.measured[name].prompts["openings"]]
    assert openings and all(one.text.startswith("number") for one in openings)


def test_openings_that_both_splits_hold_are_divided(files, tmp_path):
    pairs = [(f"so you {i % 7} see, {i} idiot", f"so you {i % 7} see, {i}!") for i in range(200)]
    data = load_toxicity(replace(files, pairs=write_pairs(tmp_path / "x.tsv", pairs)))
    found = [contents(data.measured[name].prompts["openings"]) for name in SPLITS]
    assert found[0] and found[1] and not found[0] & found[1]
    assert found[0] | found[1] == {f"so you {i} see," for i in range(7)}


def test_prompts_that_are_trained_on_are_dropped(files, tmp_path):
    toxic = [pair(i)[0] for i in range(50)]
    source = write(tmp_path / "p.txt", [*toxic, "and then"])
    data = load_toxicity(replace(files, prompts=source))
    assert any("40 prompts dropped: trained on as a text" in note for note in data.notes)
    assert_disjoint(data)


def test_prompts_are_needed(files, tmp_path):
    pairs = [(f"moron number {i}", f"a person, number {i}") for i in range(30)]
    source = write_pairs(tmp_path / "x.tsv", pairs)
    with pytest.raises(DataError, match="nothing to prompt the model with") as caught:
        load_toxicity(replace(files, pairs=source, prompts=None))
    assert "give --prompts" in caught.value.fix
    one = write(tmp_path / "one.txt", ["and then"])
    data = load_toxicity(replace(files, pairs=source, prompts=one))
    assert (data.measured["validation"].prompts, list(data.measured["test"].prompts)) == (
        {},
        ["prompts"],
    )
    assert any("no prompts are left for validation" in note for note in data.notes)


def test_splits_do_not_depend_on_the_order_of_rows(files, tmp_path):
    rows = [pair(i) for i in range(50)]
    mirrored = load_toxicity(replace(files, pairs=write_pairs(tmp_path / "x.tsv", rows[::-1])))
    data = load_toxicity(files)
    assert contents(data.forget[0]) == contents(mirrored.forget[0])
    for name in SPLITS:
        assert set(data.measured[name].pairs) == set(mirrored.measured[name].pairs)


def test_retain_texts_that_answer_a_retain_question_are_not_rehearsed(files, tmp_path):
    rows = [{"question": f"What is z{i}?", "answer": "gold"} for i in range(20)]
    asked = [{**row, "choices": ["gold", "tin"], "answer": 0} for row in rows]
    questions = write(tmp_path / "q.jsonl", [json.dumps(row) for row in asked])
    source = write(tmp_path / "qa.jsonl", [json.dumps(row) for row in rows])
    data = load_toxicity(replace(files, retain=(*files.retain, source), retain_questions=questions))
    assert not any("What is z" in text.text for text in data.retain)
    assert [len(data.measured[name].retain_questions) for name in SPLITS] == [4, 16]
    assert_disjoint(data)


def test_texts_for_perplexity_that_are_trained_on_are_dropped(files):
    data = load_toxicity(replace(files, text=files.retain[0]))
    assert "80 texts for perplexity dropped that are trained on" in data.notes
    assert_disjoint(data)


# ---- labelled texts


def test_labelled_in_their_roles(labelled):
    data = load_toxicity(labelled)
    assert not data.paired
    assert (len(data.forget[0]), len(data.contrast)) == (8, 32)
    assert all("moron" in text.text for text in data.forget[0])
    assert not any("moron" in text.text for text in (*data.contrast, *data.retain))
    for name in SPLITS:
        assert data.measured[name].pairs == ()
    # Both splits begin alike: test has it.
    assert data.measured["test"].prompts["openings"] == (Text("what a moron you"),)
    assert set(data.measured["validation"].prompts) == {"prompts"}
    assert_disjoint(data)


def test_an_opening_is_never_a_whole_labelled_text(labelled, tmp_path):
    rows = [{"text": f"you {'x' * i} moron", "label": 1} for i in range(1, 11)]
    rows += [{"text": f"a fine day {i}", "label": 0} for i in range(10)]
    source = write(tmp_path / "x.jsonl", [json.dumps(row) for row in rows])
    data = load_toxicity(replace(labelled, labelled=source))
    openings = [text.text for name in SPLITS for text in data.measured[name].prompts["openings"]]
    assert len(openings) == 2 and not any("moron" in text for text in openings)


def test_a_text_under_both_labels_counts_as_toxic(labelled, tmp_path):
    lines = Path(labelled.labelled).read_text().splitlines()
    twin = json.dumps({"text": "What a MORON you are 3", "label": 0})
    data = load_toxicity(replace(labelled, labelled=write(tmp_path / "x.jsonl", [*lines, twin])))
    assert any("1 neutral texts dropped: labelled toxic too" in note for note in data.notes)
    assert not any("MORON" in text.text for text in (*data.contrast, *data.retain))


@pytest.mark.parametrize(("label", "missing"), [(0, "toxic"), (1, "neutral")])
def test_a_missing_class_is_refused(labelled, tmp_path, label, missing):
    rows = [json.dumps({"text": f"word {i}", "label": label}) for i in range(9)]
    with pytest.raises(DataError, match=f"holds no {missing} text") as caught:
        load_toxicity(replace(labelled, labelled=write(tmp_path / "x.jsonl", rows)))
    assert "9 " in caught.value.got and "check the columns and the labels" in caught.value.fix


def test_pairs_of_no_use_are_refused(files, tmp_path):
    source = write_pairs(tmp_path / "x.tsv", [("you moron", "you fool"), ("you fool", "you moron")])
    with pytest.raises(DataError, match="holds no pair to train on"):
        load_toxicity(replace(files, pairs=source))


def test_field_names_the_column_of_labelled_texts_only(labelled, tmp_path):
    rows = [json.loads(line) for line in Path(labelled.labelled).read_text().splitlines()]
    renamed = [json.dumps({"tweet": row["text"], "label": row["label"]}) for row in rows]
    source = write(tmp_path / "x.jsonl", renamed)
    data = load_toxicity(replace(labelled, labelled=source, field="tweet"))
    assert data.forget == load_toxicity(labelled).forget


# ---- settings


def test_exactly_one_of_pairs_and_labelled(files, labelled):
    for settings, got in (
        (replace(files, labelled=labelled.labelled), "both"),
        (replace(files, pairs=None), "neither"),
    ):
        with pytest.raises(RecipeError, match="pairs or from labelled") as caught:
            load_toxicity(settings)
        assert caught.value.got == got and "--pairs" in caught.value.fix


def test_data_of_knowledge_are_refused(files):
    with pytest.raises(RecipeError, match="toxicity takes no forget") as caught:
        load_toxicity(replace(files, forget=("a.txt", "b.txt")))
    assert caught.value.got == "forget: a.txt, b.txt" and "--pairs" in caught.value.fix
    with pytest.raises(RecipeError, match="toxicity takes no questions") as caught:
        load_toxicity(replace(files, questions="q.jsonl"))
    assert "--retain-questions" in caught.value.fix


def test_retain_is_needed(files):
    with pytest.raises(RecipeError, match="The recipe lacks retain") as caught:
        load_toxicity(replace(files, retain=()))
    assert caught.value.fix == "give --retain, or `retain:` in the recipe"


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_knowledge_needs_both(files, role):
    given = {"forget": files.retain, "retain": files.retain, role: ()}
    with pytest.raises(RecipeError, match=f"The recipe lacks {role}") as caught:
        load_knowledge(DataSettings(**given))
    assert caught.value.fix == f"give --{role}, or `{role}:` in the recipe"


@pytest.mark.parametrize("role", ["pairs", "labelled", "prompts"])
def test_knowledge_refuses_data_of_toxicity(files, role):
    settings = DataSettings(forget=files.retain, retain=files.retain, **{role: "x.tsv"})
    with pytest.raises(RecipeError, match=f"knowledge takes no {role}"):
        load_knowledge(settings)


# ---- real data


real = pytest.mark.skipif(not DATA.is_dir(), reason="real data sets are not beside the checkout")


@pytest.mark.shared
@real
def test_paradetox_with_web_prompts():
    settings = DataSettings(
        pairs=str(DATA / "paradetox/paradetox_dev.tsv"),
        retain=(str(DATA / "wikitext/wikitext2_train_part.txt"),),
        prompts=str(DATA / "real-toxicity-prompts/toxic_dev.jsonl"),
        retain_questions=str(DATA / "tofu/retain_perturbed.jsonl"),
        text=str(DATA / "wikitext/wikitext2_valid.txt"),
    )
    data = load_toxicity(settings)
    assert len(data.forget[0]) == len(data.contrast) == 1981
    test = data.measured["test"]
    sets = {name: len(texts) for name, texts in test.prompts.items()}
    assert sets == {"openings": 131, "prompts": 160}
    assert len(test.pairs) == 160 and len(test.retain_questions) == 320
    assert_disjoint(data)


@pytest.mark.shared
@real
def test_jigsaw_comments():
    settings = DataSettings(
        labelled=str(DATA / "jigsaw-sample/train.csv"),
        retain=(str(DATA / "wikitext/wikitext2_train_part.txt"),),
    )
    data = load_toxicity(settings)
    assert (len(data.forget[0]), len(data.contrast)) == (23, 203)
    assert all(data.measured[name].prompts["openings"] for name in SPLITS)
    assert_disjoint(data)
