"""The model card: read back by the Hub's own parser, cautious, safe with hostile names."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard
from report_records import record
from test_hostile import EVERY, poisoned

from expunge.card import MARK, card, record_beside, save_card
from expunge.errors import DataError, RecipeError
from expunge.recipe import Recipe


def parsed(text):
    found = ModelCard(text, ignore_metadata_errors=False)
    assert found.data.to_dict()
    return found


def test_the_hub_reads_the_evidence_back():
    found = parsed(card(record()))
    results = {one.metric_name: one for one in found.data.eval_results}
    forget = results["forget_accuracy (lower is better)"]
    assert forget.metric_value == 0.3 and forget.metric_type == "accuracy"
    assert forget.dataset_name == "knowledge: forget (20 examples)"
    assert forget.dataset_split == "test"
    retain = results["retain_accuracy (lower is better)"]
    assert retain.dataset_name == "knowledge: retain (20 examples)"
    assert len(results) == 2
    assert found.data.library_name == "transformers"
    assert {"expunge", "unlearning", "removed-knowledge"} <= set(found.data.tags)


def test_it_says_what_was_measured_and_promises_nothing():
    text = card(record())
    assert "| forget_accuracy, chance 0.25 | 1.000 [0.900, 1.000] | 0.300 [0.200, 0.400]" in text
    assert "**Measured, not guaranteed**" in text and "93.3 %" in text
    for heading in ("Intended use", "Limits", "Provenance", "How to reproduce", "Evidence"):
        assert f"\n## {heading}\n" in text
    assert "No attack was run" in text and "One run" in text
    assert text.count("\n# ") == 1


def test_of_a_run_that_was_not_measured_nothing_is_claimed():
    text = card(record(scores=[], values=[]))
    assert "nothing is claimed" in text and "not measured at all" in text
    assert not parsed(text).data.eval_results


def test_the_recipe_in_it_is_a_recipe():
    recipe = {"function": "knowledge", "model": "base", "forget": ["f.txt"], "retain": ["r.txt"]}
    text = card(record(provenance={"recipe": recipe}))
    block = text.split("```yaml\n")[1].split("```")[0]
    assert Recipe.build(yaml.safe_load(block)).forget == ("f.txt",)
    assert yaml.safe_load(block) == recipe


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("models/foo", None),
        ("lab7m", None),
        ("/srv/me/models/mine", None),
        ("a/b/c", None),
    ],
)
def test_only_a_name_known_on_the_hub_is_a_base_model(model, shown, tmp_path, monkeypatch):
    recipe = {**record().provenance["recipe"], "model": model}
    made = record(provenance={"recipe": recipe})
    text = card(made)
    assert parsed(text).data.base_model == shown
    assert f"| base model | {model.removeprefix('/srv/me/models/')} |" in text
    assert ("a folder, or a Hub model" in text) == (shown is None)
    assert "/srv" not in text
    # The same wherever it is made.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta-llama" / "Llama-3.1-8B").mkdir(parents=True)
    assert card(made) == text


def test_a_name_on_the_hub_can_be_given():
    text = card(record(), base_model="owner/name-7b")
    assert parsed(text).data.base_model == "owner/name-7b"
    assert "| base model | owner/name-7b |" in text
    for bad in ("lab7m", "a/b/c", "/models/x", "owner/name\n"):
        with pytest.raises(RecipeError, match="no name of a model on the Hub"):
            card(record(), base_model=bad)


@pytest.mark.parametrize(
    ("method", "training", "told"),
    [
        ("cosine-rmu + npo", {"parts": {"one": "ab", "two": "cd"}}, "the sum of several"),
        ("joint(cosine-rmu, npo)", {"parts": {"joint": "ab"}}, "other trainings left"),
        ("cosine-rmu then npo", {"parts": {"sequence": "ab"}}, "other trainings left"),
        ("random-control", {"control_of": {"run": "ab"}}, "A random change as large"),
    ],
)
def test_a_recipe_does_not_claim_what_it_did_not_make(method, training, told):
    text = card(record(method, training=training))
    how = text.split("## How to reproduce")[1]
    assert told in how and "SHA-256 of its patch ab" in how
    assert "expunge run" not in how and "```" not in how


def test_a_sum_that_names_its_parts_alone():
    how = card(record(training={"parts": ["one", "two"]})).split("## How to reproduce")[1]
    assert "- one\n- two" in how and "expunge run" not in how


def test_an_adapter_is_told_from_what_was_measured():
    text = card(record(), adapter_error=0.125)
    assert "12.5 %" in text and "not of this adapter" in text
    assert parsed(text).data.library_name == "peft"


@pytest.mark.parametrize("bad", [*EVERY, "---\ntags: [x]", "```\n# title", "| a | b |"], ids=ascii)
def test_hostile_names_change_nothing(bad):
    plain, text = card(poisoned("word")), card(poisoned(bad))
    text.encode("utf-8")
    found = parsed(text)
    assert found.data.to_dict().keys() == parsed(plain).data.to_dict().keys()
    prose = text.split(MARK)[1].split("```yaml")[0].split("````yaml")[0]
    assert "<script" not in prose and "<img" not in prose and "<svg" not in prose
    assert "](javascript" not in prose
    headings = [line for line in prose.splitlines() if line.startswith("#")]
    assert len(headings) == 7
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert all(row.count("|") in (3, 7) for row in rows)


def test_a_users_readme_stays(tmp_path):
    text = card(record())
    mine = tmp_path / "README.md"
    mine.write_text("my own words")
    with pytest.raises(DataError, match="did not write"):
        save_card(text, tmp_path)
    assert mine.read_text() == "my own words"
    assert save_card(text, tmp_path, replace=True) == mine
    assert save_card(text, tmp_path) == mine  # an earlier card may go
    assert mine.read_text() == text


def test_the_record_beside_a_patch(tmp_path):
    with pytest.raises(DataError, match="No readable run record"):
        record_beside(tmp_path / "patch.safetensors")
    record().save(tmp_path)
    assert record_beside(tmp_path / "patch.safetensors") == record_beside(tmp_path) == record()
