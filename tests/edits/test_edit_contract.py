"""What holds for every registered edit, on several architectures; the file form; settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from expunge.edits import EDITS, EditInputs, Intervention, edit, load_intervention
from expunge.edits.banned_words import BannedWords
from expunge.edits.project_out import ProjectOut
from expunge.errors import PatchError, RecipeError
from expunge.model.structure import find_structure
from expunge.registry import settings_of
from tiny import HIDDEN, LAYERS, VOCABULARY, padded, texts, tiny_model

# GPT-2 holds weights transposed; Gemma and OLMo 2 have a norm behind the projection; GPT-NeoX
# adds attention and MLP in parallel.
ARCHITECTURES = ("llama", "gpt2", "gemma2", "olmo2", "neox", "phi3")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word is a token: w3 to w63, and some of the English that tests ban."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words |= {f"w{number}": number for number in range(3, VOCABULARY - 2)}
    words |= {"moron": VOCABULARY - 2, "Moron": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def inputs(name: str = "llama", *, model: Any = None, **more: Any) -> EditInputs:
    """Toxic texts of high ids, neutral ones of low ids, as pairs, and one word."""
    model = tiny_model(name) if model is None else model
    neutral = [[3, *(3 + i % 30 for i in ids)] for ids in texts(24)]
    toxic = [[3, *(33 + i % 30 for i in ids)] for ids in texts(24)]
    given = {"toxic": toxic, "neutral": neutral, "paired": True, "words": ["moron"], **more}
    return EditInputs(model, find_structure(model), word_tokenizer(), **given)


def made(name: str, given: EditInputs) -> Any:
    """What an edit returns; probes at chance allowed, for random models know no classes."""
    settings = {"allow_chance": True} if name == "project-out" else {}
    return EDITS.get(name).part(given, **settings)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def logits(model: Any) -> torch.Tensor:
    ids_BT, mask_BT = padded(texts(3, seed=9))
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids_BT, attention_mask=mask_BT.long()).logits
    return out[mask_BT]


every_edit = pytest.mark.parametrize("name", EDITS.names())
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@every_edit
@every_architecture
def test_the_model_given_stays_as_it_was(name: str, architecture: str) -> None:
    given = inputs(architecture)
    before, config = state(given.model), given.model.generation_config.to_dict()
    made(name, given)
    assert all(torch.equal(value, before[key]) for key, value in given.model.state_dict().items())
    assert given.model.generation_config.to_dict() == config
    assert not given.structure.layers[-1]._forward_hooks


@every_edit
def test_the_same_inputs_give_the_same_edit(name: str) -> None:
    first, second = made(name, inputs()), made(name, inputs())
    if isinstance(first, Intervention):
        assert first.values() == second.values()
        first, second = first.tensors(), second.tensors()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_edit
def test_what_is_registered_is_what_comes_back(name: str) -> None:
    entry, result = EDITS.get(name), made(name, inputs())
    kind = entry.extras["intervention"]
    assert entry.source and entry.deviations
    if kind is None:
        assert not isinstance(result, Intervention)
        names = dict(inputs().model.named_parameters())
        assert all(value.dtype == names[key].dtype for key, value in result.items())
    else:
        assert isinstance(result, kind)
        assert result.name == name


def interventions() -> list[Any]:
    names = [entry.name for entry in EDITS if entry.extras["intervention"] is not None]
    return [pytest.param(name, id=name) for name in names]


every_intervention = pytest.mark.parametrize("name", interventions())


@every_intervention
@every_architecture
def test_it_is_undone_after_the_block_and_after_an_error(name: str, architecture: str) -> None:
    given = inputs(architecture)
    intervention, model = made(name, given), given.model
    plain, config = logits(model), model.generation_config.to_dict()
    with intervention.applied(model) as same:
        assert same is model
        assert logits(model).shape == plain.shape
        changed = not torch.equal(logits(model), plain)
        assert changed or model.generation_config.to_dict() != config
    assert torch.equal(logits(model), plain)
    with pytest.raises(KeyError, match="on purpose"), intervention.applied(model):
        raise KeyError("on purpose")
    assert torch.equal(logits(model), plain)
    assert model.generation_config.to_dict() == config


@every_intervention
def test_a_file_gives_back_the_same(name: str, tmp_path: Path) -> None:
    given = inputs()
    intervention = made(name, given)
    path = intervention.save(tmp_path / "i.safetensors")
    loaded = load_intervention(path)
    assert type(loaded) is type(intervention)
    assert loaded.values() == intervention.values()
    assert loaded.metadata == intervention.metadata
    for key, value in intervention.tensors().items():
        assert torch.equal(loaded.tensors()[key], value)
    with intervention.applied(given.model):
        expected = logits(given.model), given.model.generation_config.to_dict()
    with loaded.applied(given.model):
        assert torch.equal(logits(given.model), expected[0])
        assert given.model.generation_config.to_dict() == expected[1]


@every_intervention
def test_another_model_is_refused(name: str) -> None:
    intervention = made(name, inputs())
    other = tiny_model("llama")
    other.resize_token_embeddings(8)
    other.model.layers = other.model.layers[:2]
    other.config.num_hidden_layers = 2
    with pytest.raises(PatchError), intervention.applied(other):
        pass


# ---- files that cannot be read


def saved(folder: Path, **changes: str) -> Path:
    """A saved intervention with some of its header changed."""
    path = ProjectOut(3, torch.eye(HIDDEN)[0], 2.0, 1.0).save(folder / "i.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        header = handle.metadata()
    save_file(load_file(path), path, metadata={**header, **changes})
    return path


def test_a_saved_file_is_the_control(tmp_path: Path) -> None:
    assert load_intervention(saved(tmp_path)).values() == {"layer": 3, "gap": 2.0, "alpha": 1.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": "expunge-patch"}, "no readable intervention"),
        ({"version": "9"}, "version"),
        ({"edit": "nothing-known"}, "not installed"),
        ({"edit": "profs"}, "not installed"),
        ({"values": "{"}, "damaged"),
        ({"values": "[]"}, "damaged"),
        ({"values": json.dumps({"layer": 3, "gap": 2.0})}, "alpha"),
        ({"values": json.dumps({"layer": "x", "gap": 2.0, "alpha": 1.0})}, "damaged"),
        ({"edit": "banned-words"}, "damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, changes: dict[str, str], told: str) -> None:
    with pytest.raises(PatchError, match=told):
        load_intervention(saved(tmp_path, **changes))


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    with pytest.raises(PatchError, match="no readable"):
        load_intervention(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(PatchError, match="no readable"):
        load_intervention(path)


def test_ids_and_lengths_must_agree() -> None:
    tensors = {"ids": torch.tensor([1, 2, 3]), "lengths": torch.tensor([2, 2])}
    with pytest.raises(ValueError, match="agree"):
        BannedWords.restored(tensors, {"words": ["a"]}, {})


# ---- settings


def test_defaults_are_filled_in() -> None:
    assert settings_of(EDITS.get("profs"), {"rank": 3}) == {
        "rank": 3,
        "first_layer": -1,
        "pairs": 500,
    }
    assert settings_of(EDITS.get("banned-words"), {}) == {}


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("profs", {"rang": 2}, "did you mean 'rank'"),
        ("project-out", {"alhpa": 2}, "did you mean 'alpha'"),
        ("banned-words", {"words": 2}, "no settings"),
        ("profs", {"rank": 2.5}, "wrong kind"),
        ("profs", {"rank": True}, "wrong kind"),
        ("project-out", {"alpha": "2"}, "wrong kind"),
        ("project-out", {"probe": 1}, "wrong kind"),
        ("project-out", {"allow_chance": 1}, "wrong kind"),
    ],
)
def test_unknown_and_wrong_settings_are_refused(
    name: str, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        settings_of(EDITS.get(name), given)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("profs", {"rank": 0}),
        ("profs", {"rank": HIDDEN}),
        ("profs", {"pairs": 0}),
        ("profs", {"first_layer": LAYERS}),
        ("profs", {"first_layer": -2}),
        ("project-out", {"alpha": 0.0}),
        ("project-out", {"alpha": float("nan")}),
        ("project-out", {"probe": "logistics"}),
    ],
)
def test_settings_out_of_range_are_refused(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        EDITS.get(name).part(inputs(), **given)
    assert caught.value.allowed and caught.value.fix


def test_an_unknown_edit_meets_its_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'profs'"):
        EDITS.get("proffs")


def test_a_source_is_mandatory() -> None:
    with pytest.raises(ValueError, match="source"):
        edit("empty", source=" ", deviations="none")
