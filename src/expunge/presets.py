"""Settings for well-known 7-8B models, each with its source: literature, or a guess of ours.

None of them has been run here on the model that it is for; `cosine-rmu` besides is a
reconstruction. Shapes and parameter counts are the published ones, held by a test on torch's meta
device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.errors import RecipeError
from expunge.registry import nearest

# A model of the same shape may have so many more or fewer ids: padding, added tokens.
VOCABULARY_SLACK = 0.05
SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")


@dataclass(frozen=True)
class Preset:
    """What is known of one model family.

    Attributes:
        name: as given to ``expunge plan --model``.
        hub_names: the models that it stands for.
        config: what of ``config.json`` decides the shapes.
        parameters: published number of weights.
        settings: of a recipe. A key with an objective's name before it, such as
            ``rmu.retain_weight``, holds for that objective alone.
        provenance: where each setting, ``config`` and ``parameters`` come from; what is not
            published begins with "ours".
    """

    name: str
    hub_names: tuple[str, ...]
    config: Mapping[str, Any]
    parameters: int
    settings: Mapping[str, Any]
    provenance: Mapping[str, str]

    def settings_for(self, objective: str) -> dict[str, Any]:
        """The settings of a recipe with this objective, for `Recipe.build`."""
        found = {key: value for key, value in self.settings.items() if "." not in key}
        for key, value in self.settings.items():
            owner, _, path = key.partition(".")
            if path and owner == objective:
                group, _, inner = path.partition(".")
                found[group] = {**found.get(group, {}), inner: value} if inner else value
        return found

    def meta_model(self) -> Any:
        """The causal LM in bfloat16 on torch's meta device: shapes, no weights."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**self.config), dtype=torch.bfloat16
            )


def preset(name: str) -> Preset:
    """The preset of that name. Raises RecipeError, with the nearest name, if there is none."""
    if name not in PRESETS:
        raise RecipeError(
            what="Unknown preset",
            got=repr(name),
            allowed=", ".join(PRESETS),
            fix=nearest(name, PRESETS),
        )
    return PRESETS[name]


def named_preset(name: str) -> Preset | None:
    """The preset of that name or of that model on the Hub, in any case, or None.

    A directory of that name goes first, as it does in transformers.
    """
    if Path(name).is_dir():
        return None
    wanted = name.lower()
    for one in PRESETS.values():
        if wanted in (one.name, *map(str.lower, one.hub_names)):
            return one
    return None


def find_preset(config: Mapping[str, Any]) -> Preset | None:
    """The preset whose architecture a ``config.json`` describes, or None.

    Type, depth and widths must agree; the vocabulary may differ by VOCABULARY_SLACK. Weights
    are not looked at, so every fine-tune of that shape gets the preset.
    """
    text = config.get("text_config", config)
    ids = text.get("vocab_size")
    for one in PRESETS.values():
        known = one.config["vocab_size"]
        if (
            all(text.get(key) == one.config[key] for key in SHAPE)
            and isinstance(ids, int)
            and abs(ids - known) <= VOCABULARY_SLACK * known
        ):
            return one
    return None


# A setting and where it comes from.
_Sourced = dict[str, tuple[Any, str]]

_RMU = "arXiv:2403.03218 and repository centerforaisafety/wmdp, for Zephyr-7B"
_ADAPTIVE = "arXiv:2408.06223 and repository RebelsNLU-jaist/llm-unlearning, for Zephyr-7B"
_GUESS = "ours: a guess, untested on this model"
_COSINE = "ours: cosine-rmu is a reconstruction, untested on any 7-8B model"
_CARRIED = f"{_GUESS}; carried over from Zephyr-7B"
_COMPOSABLE = "repository hartvigsen-group/composable-interventions"


def _deepest(layer: int, source: str, *, same_model: bool = False) -> _Sourced:
    """The layer read, and the three trained ones after RMU's rule."""
    rule = f"{_RMU}: the layer read and the two below"
    return {
        "layer": (layer, source),
        "trained_layers": (
            (layer - 2, layer - 1, layer),
            rule if same_model else f"{_GUESS}; the rule of {rule}",
        ),
    }


def _shared(*, same_model: bool = False) -> _Sourced:
    """The budget of RMU's authors; for another model than theirs it is carried over."""
    rmu, adaptive = (_RMU, _ADAPTIVE) if same_model else (_CARRIED, _CARRIED)
    return {
        "steps": (150, f"{rmu}: 150 batches, topics by turns"),
        "batch_size": (4, f"{rmu}: 4 forget and 4 retain texts"),
        "max_tokens": (512, f"{rmu}: 512 for biology and retain texts (768 for cyber there)"),
        "dtype": ("bfloat16", "the type of the published weights; float32 where a file has that"),
        "cosine-rmu.lr": ("auto", f"{_COSINE}; the rule of defaults.py, from small models"),
        "cosine-rmu.retain_weight": (5.0, f"{_COSINE}; the objective's default"),
        "cosine-rmu.target": (
            "centered",
            f"{_COSINE}; better on our small models, but in the circuit-breaker ablation "
            "(arXiv:2406.04313) only positive converged on Llama-3-8B: try that next",
        ),
        "rmu.lr": (5e-5, f"{rmu}: AdamW, 5e-5"),
        "rmu.lr_schedule": ("constant", f"{rmu}: no schedule"),
        "adaptive-rmu.steps": (500, f"{adaptive}: 500 batches"),
        "adaptive-rmu.lr": (5e-5, f"{adaptive}: AdamW, 5e-5"),
        "adaptive-rmu.lr_schedule": ("constant", f"{adaptive}: no schedule"),
        "adaptive-rmu.retain_weight": (1200.0, f"{adaptive}: 1200"),
        "adaptive-rmu.objective_settings.beta": (5.0, f"{adaptive}: 5"),
    }


def _make(
    name: str,
    hub_names: tuple[str, ...],
    config: Mapping[str, Any],
    parameters: int,
    published: Mapping[str, str],
    settings: _Sourced,
) -> Preset:
    """No setting without a source: both come from one table."""
    return Preset(
        name,
        hub_names,
        config,
        parameters,
        {key: value for key, (value, _) in settings.items()},
        {**published, **{key: source for key, (_, source) in settings.items()}},
    )


_ALL = (
    _make(
        "llama-3.1-8b",
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
            "max_position_embeddings": 131072,
        },
        8_030_261_248,
        {
            "config": "config.json of meta-llama/Llama-3.1-8B, as its conversions repeat it",
            "parameters": "its model.safetensors.index.json: 16,060,522,496 bytes of bfloat16",
        },
        {
            **_deepest(
                7,
                f"{_CARRIED}, which is as deep; others read 3 or 5 of Llama-3-8B ({_COMPOSABLE}) "
                "or 11 of Llama-3.1-8B (arXiv:2605.11685, another method)",
            ),
            **_shared(),
            "rmu.lr": (5e-5, f"{_COMPOSABLE}, for Llama-3-8B; as for Zephyr-7B"),
            "rmu.retain_weight": (
                1300.0,
                "literature on RMU for Llama-3.1-8B (alpha 1300), the paper not on record here: "
                "check before you rely on it",
            ),
            "rmu.objective_settings.coefficient": (
                45.0,
                "literature on RMU for Llama-3.1-8B (c 45), the paper not on record here: check "
                f"before you rely on it; 20 for Llama-3-8B at layers 3 and 5 in {_COMPOSABLE}",
            ),
        },
    ),
    _make(
        "qwen2.5-7b",
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
            "max_position_embeddings": 131072,
            "use_sliding_window": False,
        },
        7_615_616_512,
        {
            "config": "config.json of Qwen/Qwen2.5-7B, as its fine-tunes repeat it; 32,768 "
            "positions in Qwen2.5-7B-Instruct",
            "parameters": "model.safetensors.index.json of Qwen/Qwen2.5-7B-Instruct: "
            "15,231,233,024 bytes of bfloat16",
        },
        {
            **_deepest(
                6,
                f"{_GUESS}; as deep for 28 layers as 7 of 32 in Zephyr-7B (arXiv:2403.03218), and "
                "as 10 of 48 in the literature on RMU for Qwen2.5-14B",
            ),
            **_shared(),
            "rmu.retain_weight": (
                350.0,
                f"{_GUESS}; Qwen2.5-14B's alpha in the literature on RMU",
            ),
            "rmu.objective_settings.coefficient": (
                460.0,
                f"{_GUESS}; Qwen2.5-14B's c in the literature on RMU. c follows the norm of the "
                "activations, which may differ here: adaptive-rmu needs no such number",
            ),
        },
    ),
    _make(
        "olmo-3-7b",
        ("allenai/Olmo-3-1025-7B", "allenai/Olmo-3-7B-Instruct", "allenai/Olmo-3-7B-Think"),
        {
            "model_type": "olmo3",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 100278,
            "tie_word_embeddings": False,
            "max_position_embeddings": 65536,
            "sliding_window": 4096,
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        },
        7_298_011_136,
        {
            "config": "config.json of allenai's Olmo-3-7B models, as their conversions repeat it; "
            "transformers' Olmo3Config makes the same layer_types",
            "parameters": "total_parameters in model.safetensors.index.json of allenai's "
            "Olmo-3-7B models",
        },
        # No rmu: nobody has published a coefficient for OLMo 3, and we have no ground to guess.
        {
            **_deepest(7, f"{_CARRIED}, which is as deep"),
            **{k: v for k, v in _shared().items() if not k.startswith("rmu.")},
        },
    ),
    _make(
        "mistral-7b",
        (
            "HuggingFaceH4/zephyr-7b-beta",
            "mistralai/Mistral-7B-v0.1",
            "mistralai/Mistral-7B-v0.3",
            "mistralai/Mistral-7B-Instruct-v0.3",
        ),
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "tie_word_embeddings": False,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
        7_241_732_096,
        {
            "config": "config.json of HuggingFaceH4/zephyr-7b-beta and mistralai/Mistral-7B-v0.1; "
            "v0.3 has 32,768 ids and no sliding window",
            "parameters": "model.safetensors.index.json of mistralai's Mistral-7B with 32,000 ids: "
            "14,483,464,192 bytes of bfloat16",
        },
        {
            **_deepest(
                7,
                f"{_RMU}: layer 7; 6 for Mistral-7B-Instruct-v0.3 in {_COMPOSABLE}",
                same_model=True,
            ),
            **_shared(same_model=True),
            "rmu.retain_weight": (
                1200.0,
                f"{_RMU}: alpha 1200; 1000 for Mistral-7B-Instruct-v0.3 in {_COMPOSABLE}",
            ),
            "rmu.objective_settings.coefficient": (6.5, f"{_RMU}: c 6.5"),
        },
    ),
)
PRESETS = {one.name: one for one in _ALL}
