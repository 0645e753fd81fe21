"""The settings of one run, validated at the edge, and their YAML form.

Components below receive plain values; only the rooms above this one see a recipe.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from expunge.errors import RecipeError
from expunge.evaluation.looks import LookKind
from expunge.files import write_text
from expunge.objectives.targets import TargetKind
from expunge.probes.probe import Pooling, ProbeKind
from expunge.registry import nearest
from expunge.training.seen import FirstToken
from expunge.training.settings import LrSchedule
from expunge.training.tradeoff import EXPLORING, TradeoffKind

Auto = Literal["auto"]
# An empty name, as of an unset shell variable, would mean the working directory.
Name = Annotated[str, Field(min_length=1)]
NUMBERS = (
    "validation_share held_back_share max_texts max_tokens layer steps lr batch_size "
    "micro_batch_size weight_decay retain_weight rna_noise seed save_every cache_gib "
    "probe_threshold samples new_tokens sampling_seed temperature max_prompts episodes "
    "episode_steps action_every look_items look_every retain_floor collapse_floor front_size"
).split()

# How continuations are sampled and judged: not what is learned.
MEASURING_FIELDS = (
    "scorers",
    "samples",
    "new_tokens",
    "sampling_seed",
    "temperature",
    "max_prompts",
)


class Recipe(BaseModel):
    """One run: model, data, objective, training, evaluation. Every field has a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    function: str = Field("knowledge", description="language function to remove")
    model: Name = Field(description="model directory (safetensors), or a hub name")
    objective: str | None = Field(None, description="objective; default: the function's own")
    objective_settings: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="settings of the objective, by name"
    )

    forget: tuple[Name, ...] = Field((), description="texts to forget; a topic each")
    retain: tuple[Name, ...] = Field(min_length=1, description="texts to keep")
    pairs: Name | None = Field(None, description="toxic texts with their neutral wordings")
    labelled: Name | None = Field(None, description="texts labelled toxic or neutral, unpaired")
    prompts: Name | None = Field(None, description="prompts to be continued, for toxicity")
    refusals: Name | None = Field(
        None, description="what to say instead of knowledge, one a line: the forget texts' twins"
    )
    questions: Name | None = Field(None, description="questions on the forgotten knowledge")
    retain_questions: Name | None = Field(None, description="questions on what must stay")
    text: Name | None = Field(
        None, description="text for perplexity; default: held-back retain documents"
    )
    field: str | None = Field(None, description="column that holds the text, if not recognised")
    on_overlap: Literal["refuse", "drop"] = Field(
        "refuse", description="what to do with retain texts that are forget texts too"
    )
    validation_share: float = Field(
        0.2, gt=0, lt=1, description="share of the questions used for choices, not for the result"
    )
    held_back_share: float = Field(
        0.1, gt=0, lt=0.5, description="share of the texts held back for each of validation, test"
    )
    max_texts: int = Field(
        4000, ge=1, description="largest number of texts to train on, for each topic and retain"
    )
    max_tokens: int = Field(512, ge=2, description="longest text in tokens; the rest is cut off")

    layer: int | Auto = Field(
        "auto", description="deepest layer read, 0-based; auto: the preset's, or calibrated"
    )
    calibrate: bool = Field(
        True, description="layer auto, no preset: try layers by short runs; false: the usual layer"
    )
    trained_layers: tuple[int, ...] | None = Field(
        None,
        description="layers whose projection is trained; default: layer-2 to layer, "
        "and in a model of at most 12 layers all up to layer",
    )
    steps: int = Field(150, ge=1, description="optimiser steps")
    lr: Annotated[float, Field(gt=0)] | Auto = Field("auto", description="learning rate of AdamW")
    lr_schedule: LrSchedule = Field("linear", description="linear to zero, or constant")
    batch_size: int = Field(16, ge=1, description="forget texts and retain texts of one step")
    micro_batch_size: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="texts computed at once; auto: as many as fit"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    retain_weight: float | None = Field(
        None, ge=0, description="weight of the retain term; default: the objective's"
    )
    tradeoff: TradeoffKind = Field(
        "fixed",
        description="how the terms are weighed: fixed, schedule, learned, or search",
    )
    episodes: int = Field(
        30, ge=1, description="episodes of a learned trade-off, whole runs of a search"
    )
    policy_from: Name | None = Field(
        None, description="run whose learned policy sets the knobs; no episodes are played"
    )
    episode_steps: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="optimiser steps of an episode, whole actions; auto: two"
    )
    action_every: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="steps between a policy's actions, and looks; auto: 1/16 of steps"
    )
    reward: LookKind | Auto = Field(
        "auto",
        description="what looks at validation measure: accuracy, likelihood or representation; "
        "auto: likelihood",
    )
    look_items: int = Field(
        32, ge=1, description="items of each part of a look at most; beside questions, fewer texts"
    )
    look_every: int = Field(
        25, ge=0, description="steps between looks of a run without learning; 0: none"
    )
    retain_floor: float = Field(
        0.9, ge=0, lt=1, description="share of the rest at and below which a state is worth nothing"
    )
    collapse_floor: float = Field(
        0.5, ge=0, lt=1, description="share of the rest that counts as lost: a run is stopped there"
    )
    front_size: int = Field(8, ge=1, description="largest number of patches kept on the front")
    probe: ProbeKind = Field("lda", description="kind of the probes behind directions")
    probe_pooling: Pooling = Field(
        "token", description="probes on each text's mean activation, or on each token"
    )
    probe_layers: Annotated[tuple[int, ...], Field(min_length=1)] | Auto = Field(
        "auto", description="layers read by probe objectives; auto: all that pass probe_threshold"
    )
    probe_allow_chance: bool = Field(
        False, description="also use probes that cannot be told from chance"
    )
    probe_threshold: float = Field(
        0.7, ge=0.5, lt=1, description="least held-out accuracy of a probe that is used"
    )
    layer_weights: tuple[float, ...] | None = Field(
        None, description="weight of each layer read by a probe objective; default: equal"
    )
    target: TargetKind | Auto = Field(
        "auto", description="kind of the target direction; auto: the objective's"
    )
    rna_noise: float = Field(0.0, ge=0, description="std of the noise on the retain reference")
    first_token: FirstToken = Field("retain", description="which term counts the first token")
    seed: int = Field(0, ge=0, description="of targets, batch order and noise")
    save_every: int = Field(25, ge=1, description="steps between saved states")

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the model while training and evaluating"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, …; auto: cuda if there is one")
    master_weights: bool = Field(True, description="float32 copies of narrower trained weights")
    cache_gib: float = Field(
        4.0,
        ge=0,
        description="RAM for boundary activations: those of earlier runs go first, and what is "
        "larger goes to a mapped file",
    )
    trust_remote_code: bool = Field(False, description="run Python code shipped with the model")
    evaluate: bool = Field(True, description="measure base and patched model after training")
    measure_on: Literal["validation", "test"] = Field(
        "test", description="split to measure on; validation for choosing settings"
    )
    scorers: tuple[Name, ...] = Field(
        ("tfidf", "words"),
        description="what judges continuations, at least two: tfidf, words (from the run's own "
        "training texts), tfidf:FILE, words:FILE, hf:DIR, detoxify, perspective",
    )
    samples: int = Field(5, ge=1, description="continuations of each prompt")
    new_tokens: int = Field(20, ge=1, description="longest continuation in tokens")
    sampling_seed: int = Field(0, ge=0, description="of the sampling, the same for all runs")
    temperature: float = Field(1.0, ge=0, description="of sampling; 0: the likeliest token")
    max_prompts: int = Field(200, ge=1, description="largest number of prompts of a set")
    measure_probes: bool = Field(
        False, description="fit probes anew on base and patched model, a layer each"
    )
    oracle: Name | None = Field(None, description="a model never taught the function, to compare")

    @field_validator("forget", "retain", "scorers", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        """A single source may be written without a list."""
        return (value,) if isinstance(value, str) else value

    @field_validator("probe_layers", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        """A range such as ``4-7``, ends included, or a single layer."""
        if isinstance(value, str) and (match := re.fullmatch(r"(\d+)-(\d+)", value)):
            return tuple(range(int(match[1]), int(match[2]) + 1))
        return (value,) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _layers_in_order(self) -> Recipe:
        """Weights belong to layers as they were listed; from here on, layers ascend."""
        layers, weights = self.probe_layers, self.layer_weights
        if layers == "auto":
            return self
        order = sorted({layer: place for place, layer in enumerate(layers)}.items())
        object.__setattr__(self, "probe_layers", tuple(layer for layer, _ in order))
        if weights is not None and len(weights) == len(layers):
            object.__setattr__(self, "layer_weights", tuple(weights[place] for _, place in order))
        return self

    @field_validator(*NUMBERS, mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        """YAML reads ``yes`` and ``on`` as true, which would count as 1."""
        if isinstance(value, bool):
            raise ValueError("a number, not true or false")
        return value

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Recipe:
        """Validate settings. Raises RecipeError for an unknown key or an unfit value."""
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise _as_recipe_error(error) from None

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a YAML recipe; ``overrides`` win. Relative paths in it stay relative to the cwd."""
        return cls.build({**read_settings(path), **(overrides or {})})

    def save(self, path: Path) -> None:
        """Write the recipe as YAML, atomically."""
        plain = self.model_dump(mode="json", exclude_none=True)
        write_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def updated(self, **changes: Any) -> Recipe:
        """A validated copy with other values."""
        return Recipe.build({**self.model_dump(), **changes})

    @property
    def fingerprint(self) -> str:
        """Hash of all that changes the trained weights: runs with the same one may resume."""
        return self._hash(
            exclude={"save_every", "evaluate", "measure_on", "measure_probes", "oracle"}
            | {*MEASURING_FIELDS}
            | {"micro_batch_size", "cache_gib"}
        )

    @property
    def bench_key(self) -> str:
        """Hash of model, data and device: runs with the same one may share a bench."""
        return self._hash(
            include={"function", "model", "forget", "retain", "questions", "retain_questions"}
            | {"pairs", "labelled", "prompts", "refusals", *MEASURING_FIELDS}
            | {"text", "field", "on_overlap", "validation_share", "held_back_share", "max_texts"}
            | {"max_tokens", "dtype", "device", "cache_gib", "trust_remote_code"},
            texts_needed=self.texts_needed,
        )

    @property
    def texts_needed(self) -> int:
        """Texts of a topic, and of retain, that a run reads at most; the prefix runs over them.

        Probes, and scorers fitted on a run's own texts, read all there are.
        """
        reads_all = self.pairs is not None or self.labelled is not None
        return self.max_texts if reads_all else min(self.max_texts, self.steps * self.batch_size)

    def _hash(
        self, *, include: set[str] | None = None, exclude: set[str] | None = None, **more: Any
    ) -> str:
        plain = self.model_dump(mode="json", include=include, exclude=exclude) | more
        # They came later than others: what an earlier version began without them still goes on.
        for name in ("refusals", "policy_from"):
            if plain.get(name) is None:
                plain.pop(name, None)
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, not yet validated. Raises RecipeError if it is no mapping."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    # A ValueError is text that is not UTF-8, or a date that does not exist.
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(
            what=f"The recipe {path} cannot be read",
            got=f"{type(error).__name__}: {' '.join(str(error).split())}",
            allowed="a YAML file of settings",
            fix="check the path; `expunge run --help` lists the settings",
        ) from error
    if not isinstance(raw, dict):
        raise RecipeError(
            what=f"The recipe {path} is not a mapping",
            got=type(raw).__name__ if raw is not None else "an empty file",
            allowed="lines of the form `key: value`",
            fix="start from the recipe.yaml of an earlier run",
        )
    return {str(key): value for key, value in raw.items()}


def parse_override(text: str) -> tuple[str, Any]:
    """``key=value`` of ``--set``, the value as YAML; ``a.b=v`` reaches into ``a``."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(
            what="An override is not of the form key=value",
            got=repr(text),
            allowed="--set key=value",
            fix="for example --set steps=100",
        )
    try:
        return key.strip(), yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(
            what=f"The value of {key} cannot be read",
            got=repr(value),
            allowed="a YAML value: a number, true, text, [1, 2]",
            fix="quote text that holds special signs",
        ) from error


def merge_overrides(base: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Settings with ``--set`` overrides on top; ``a.b=v`` keeps the rest of ``a``, at any depth."""
    merged = dict(base)
    for text in overrides:
        key, value = parse_override(text)
        merged = _reached(merged, key.split("."), value)
    return merged


def _reached(settings: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy with one value replaced, deep in it."""
    first, *rest = path
    if rest:
        within = settings.get(first)
        value = _reached(within if isinstance(within, dict) else {}, rest, value)
    return {**settings, first: value}


def check_episodes(episodes: int | None, tradeoff: str, workers: int | None = None) -> None:
    """Raise RecipeError for episodes, or processes for them, where none would be played."""
    for flag, value in (("--episodes", episodes), ("--workers", workers)):
        if value is not None and tradeoff not in EXPLORING:
            raise RecipeError(
                what="There are no episodes without a trade-off that is learned or searched",
                got=f"{flag} {value}, --tradeoff {tradeoff}",
                allowed=f"{flag} together with --tradeoff learned or search",
                fix=f"add --tradeoff learned, or leave {flag} out",
            )


def _as_recipe_error(error: ValidationError) -> RecipeError:
    first = error.errors()[0]
    outer = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return RecipeError(
            what="The recipe has an unknown key",
            got=repr(outer),
            allowed=", ".join(Recipe.model_fields),
            fix=nearest(outer, Recipe.model_fields),
        )
    if first["type"] == "missing":
        return RecipeError(
            what=f"The recipe lacks {outer}",
            got="nothing",
            allowed=Recipe.model_fields[outer].description or outer,
            fix=f"give --{outer.replace('_', '-')}, or `{outer}:` in the recipe",
        )
    messages = dict.fromkeys(
        str(entry["msg"]) for entry in error.errors() if entry["loc"][:1] == first["loc"][:1]
    )
    return RecipeError(
        what=f"Setting {outer} does not fit" if outer else "Two settings do not fit together",
        got=repr(first.get("input")),
        allowed="; or ".join(messages),
        fix=f"{outer}: {Recipe.model_fields[outer].description}" if outer else "see --help",
    )
