"""The model card: read back by the Hub's own parser, cautious, safe with hostile names."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard
from report_records import record
from test_hostile import EVERY, poisoned

from expunge.card import MARK, card, record_beside, save_card
from expunge.errors import DataError
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
    [("owner/name-7b", "owner/name-7b"), ("/home/user/models/mine", None), ("a/b/c", None)],
)
def test_only_a_name_on_the_hub_is_a_base_model(model, shown):
    recipe = {**record().provenance["recipe"], "model": model}
    text = card(record(provenance={"recipe": recipe}))
    assert parsed(text).data.base_model == shown
    assert "/home" not in text


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
