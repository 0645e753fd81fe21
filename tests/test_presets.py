"""Presets: every setting has a source, and the configs make the published models.

The published numbers of parameters are half the ``total_size`` in bytes, or ``total_parameters``,
of each model's ``model.safetensors.index.json`` on the Hub.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expunge import plan as plan_module
from expunge.errors import RecipeError
from expunge.learning import objective_of
from expunge.model.structure import find_structure
from expunge.presets import PRESETS, find_preset, named_preset, preset
from expunge.recipe import Recipe
from expunge.registry import settings_of

PUBLISHED = {
    "llama-3.1-8b": 16_060_522_496 // 2,
    "qwen2.5-7b": 15_231_233_024 // 2,
    "olmo-3-7b": 7_298_011_136,
    "mistral-7b": 14_483_464_192 // 2,
}
OBJECTIVES = ("cosine-rmu", "rmu", "adaptive-rmu")
every = pytest.mark.parametrize("name", PRESETS)


def narrow(config: dict[str, Any]) -> Any:
    """A model of the same class and depth, so small that it can be run."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, **sizes, **heads}))


def test_the_four_families_are_there() -> None:
    assert PRESETS.keys() == PUBLISHED.keys()


@every
def test_config_makes_the_published_model(name: str) -> None:
    """To the last parameter; its layers and projections are those that runs on it would use."""
    one = PRESETS[name]
    model = one.meta_model()
    parameters = dict(model.named_parameters())
    assert {p.device.type for p in parameters.values()} == {"meta"}
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert sum(p.numel() for p in parameters.values()) == one.parameters == PUBLISHED[name]

    small = narrow(dict(one.config))
    structure = find_structure(small)
    assert structure.splits_at_product and structure.projection == "mlp.down_proj"
    assert dict(small.named_parameters()).keys() == parameters.keys()
    shape = (one.config["hidden_size"], one.config["intermediate_size"])
    for layer in range(one.config["num_hidden_layers"]):
        assert parameters[structure.weight_name(layer)].shape == shape


def test_layer_types_are_those_of_transformers() -> None:
    config = dict(PRESETS["olmo-3-7b"].config)
    kinds = config.pop("layer_types")
    assert AutoConfig.for_model(**config).layer_types == kinds


@every
def test_every_setting_has_a_source(name: str) -> None:
    one = PRESETS[name]
    assert one.provenance.keys() == {*one.settings, "config", "parameters"}
    for source in one.provenance.values():
        assert len(source.strip()) > 10
    # Nobody has published cosine-rmu's numbers, so none may look as if somebody had.
    ours = [text for key, text in one.provenance.items() if key.startswith("cosine-rmu.")]
    assert ours and all(text.startswith("ours: ") and "untested" in text for text in ours)


@every
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_settings_are_those_of_a_recipe(name: str, objective: str) -> None:
    one = PRESETS[name]
    settings = one.settings_for(objective)
    recipe = Recipe.build(
        {"model": "m", "retain": "r", "forget": "f", "objective": objective, **settings}
    )
    settings_of(objective_of(recipe), recipe.objective_settings)
    layer, trained = settings["layer"], settings["trained_layers"]
    assert (recipe.layer, recipe.trained_layers) == (layer, trained)
    assert trained == (layer - 2, layer - 1, layer)
    assert trained[0] >= 0 and layer < one.config["num_hidden_layers"]
    for key in one.settings:
        owner, _, rest = key.partition(".")
        assert (rest == "") or owner in OBJECTIVES, key


def test_what_the_literature_gives() -> None:
    """Spot checks against arXiv:2403.03218 and arXiv:2408.06223, for Zephyr-7B."""
    zephyr = preset("mistral-7b")
    assert "HuggingFaceH4/zephyr-7b-beta" in zephyr.hub_names
    assert zephyr.settings_for("rmu") == {
        "layer": 7,
        "trained_layers": (5, 6, 7),
        "steps": 150,
        "batch_size": 4,
        "max_tokens": 512,
        "dtype": "bfloat16",
        "lr": 5e-5,
        "lr_schedule": "constant",
        "retain_weight": 1200.0,
        "objective_settings": {"coefficient": 6.5},
    }
    adaptive = zephyr.settings_for("adaptive-rmu")
    assert (adaptive["steps"], adaptive["objective_settings"]) == (500, {"beta": 5.0})
    assert "coefficient" not in str(preset("olmo-3-7b").settings)


@every
def test_found_by_its_own_config(name: str) -> None:
    config = dict(PRESETS[name].config)
    assert find_preset(config) is PRESETS[name]
    # As saved by transformers, with added tokens, and inside a multimodal model.
    assert find_preset(AutoConfig.for_model(**config).to_dict()) is PRESETS[name]
    assert find_preset({**config, "vocab_size": config["vocab_size"] + 2}) is PRESETS[name]
    assert find_preset({"model_type": "wrapper", "text_config": config}) is PRESETS[name]
    for other in (
        {"model_type": "gpt2"},
        {"num_hidden_layers": 12},
        {"hidden_size": 2048},
        {"intermediate_size": 8192},
        {"vocab_size": config["vocab_size"] // 2},
        {"vocab_size": None},
    ):
        assert find_preset({**config, **other}) is None
    assert find_preset({}) is None


def test_zephyrs_later_sisters_are_found() -> None:
    later = {**PRESETS["mistral-7b"].config, "vocab_size": 32768, "sliding_window": None}
    assert find_preset(later) is PRESETS["mistral-7b"]


def test_unknown_preset() -> None:
    with pytest.raises(RecipeError) as error:
        preset("lama-3.1-8b")
    assert "'lama-3.1-8b'" in error.value.got and "llama-3.1-8b" in error.value.fix
    assert "mistral-7b" in error.value.allowed


def test_a_preset_has_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mistral = PRESETS["mistral-7b"]
    for name in ("mistral-7b", "Mistral-7B", *mistral.hub_names, "huggingfaceh4/zephyr-7b-beta"):
        assert named_preset(name) is mistral
    assert named_preset("mistral") is None and named_preset("someone/mistral-7b") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistral-7b").mkdir()
    assert named_preset("mistral-7b") is None


def test_a_hub_name_is_planned_without_its_files() -> None:
    by_hub, by_preset = (
        plan_module.plan(name, device="h100", tokens=16)
        for name in ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b")
    )
    assert by_hub == by_preset


def test_presets_are_read_without_torch() -> None:
    code = "import sys, expunge.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_and_docs_name_every_preset() -> None:
    root = Path(plan_module.__file__).parent
    help_text = (root / "cli" / "looking.py").read_text(encoding="utf-8")
    docs = root.parents[1] / "docs" / "runs.md"
    for name, one in PRESETS.items():
        assert name in help_text
        if docs.is_file():
            assert all(word in docs.read_text(encoding="utf-8") for word in (name, *one.hub_names))


@every
def test_the_docs_tell_what_the_plan_gives(name: str) -> None:
    docs = Path(plan_module.__file__).parents[2] / "docs" / "runs.md"
    if not docs.is_file():
        pytest.skip("the documentation lies with the sources alone")
    found = plan_module.plan(name, device="h100")
    learned = found.learned
    assert learned is not None
    memory = [f"{one.memory_weights / 2**30:.1f}" for one in (found, learned)]
    boundaries = f"{found.memory_boundaries / 2**30:.0f} GiB"
    seconds = f"{found.seconds:.0f} s / {learned.seconds / 60:.1f} min"
    row = f"| `{name}` | {' / '.join(memory)} GiB | {boundaries} | {seconds} |"
    assert row in docs.read_text(encoding="utf-8").splitlines()
