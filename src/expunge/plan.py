"""What a run will read, compute and take, before anything is loaded: `expunge plan`.

Counts follow from the config and the headers of the safetensors files alone, or from a preset's
config on the meta device. What is counted is an objective that reads one layer and keeps no
originals of forget texts. Memory is exact for weights and stored boundaries and an estimate for
activations; time is the counted work divided by the speed of a matrix product, measured on this
machine or published for another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from expunge.defaults import resolve_device, resolve_dtype, resolve_layers
from expunge.errors import ModelError, RecipeError
from expunge.evaluation.looks import LOOK_KINDS
from expunge.metalearning.choosing import CLOSER, CLOSER_TEXTS, SCALE_LOOKS
from expunge.metalearning.looking import texts_beside
from expunge.model.checkpoint import Checkpoint
from expunge.presets import PRESETS, Preset, named_preset
from expunge.recipe import Recipe
from expunge.training.tradeoff import steps_of_action, steps_of_episode

# Share of the matrix-product peak that the engine reaches (results/engine.json).
EFFICIENCY = 0.5
# Side of the matrices whose product is timed: large enough that a GPU is busy.
PROBE_SIDE, PROBE_SIDE_CUDA, PROBE_SECONDS = 1024, 8192, 0.3

# Operations a second that NVIDIA publishes for dense matrix products in (16 bit, float32 without
# TF32): data sheets of H100 SXM and A100; Ada architecture white paper, accumulating in float32.
PUBLISHED = {"h100": (989e12, 67e12), "a100": (312e12, 19.5e12), "rtx4090": (165e12, 82.6e12)}
# Share of a published peak. Ours: the lower end of what the pre-training of Llama 3 reached on
# H100, 38 to 43 % (arXiv:2407.21783).
PUBLISHED_EFFICIENCY = 0.38

# Tokens that a question with its choices is taken to have, a guess on the high side for one with
# four short choices (LOG.md, "Texts of a look"), and how many parts of a look are questions: those
# on what is to go, and those on the rest.
QUESTION_TOKENS, QUESTION_PARTS = 128, 2


@dataclass(frozen=True)
class LearnedPlan:
    """The cost of a run whose trade-off is learned: all episodes, then the run itself.

    The first episode is as long as the run.

    Boundaries are computed once and shared. A reward by what the model says needs it whole.

    Attributes:
        reward: what looks measure: ``likelihood``, which is counted as ``accuracy`` would be, or
            ``representation``.
        episodes, episode_steps: how many, and optimiser steps of each but the first.
        looks: times that validation is looked at for the policy, one after each action, in all.
        look_items: questions of each side in such a look; there are a quarter as many texts. By
            representation, texts of each side.
        closer_looks: looks at the front's points and at what is made of them, at the end.
        flops_train, flops_looks, flops_closer: floating-point operations of all steps, of all looks
            and of all closer ones: forward only, from the lowest trained layer to the head, or the
            layer read, and the base's, which is looked at first and whole. A question with its
            choices is taken to have QUESTION_TOKENS; validation, to have as many items as closer
            looks read at most.
        memory_weights: bytes of the weights opened, with gradients and optimiser of the trained.
        seconds: estimated time of computing prefix, steps and looks.
    """

    reward: str
    episodes: int
    episode_steps: int
    looks: int
    look_items: int
    closer_looks: int
    flops_train: float
    flops_looks: float
    flops_closer: float
    memory_weights: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The cost of a run.

    Attributes:
        layers_read: decoder layers read from disk, of ``layers_total``.
        bytes_read: of the weights read from disk, of ``bytes_total``.
        flops_prefix, flops_train: floating-point operations of the one pass over the texts and of
            all steps.
        memory_weights, memory_boundaries, memory_step: bytes of the opened weights with gradients
            and optimiser, of the stored boundaries (a mapped file beyond ``cache_gib``), and an
            estimate for the activations of one step.
        dtype, device: what the time is for.
        matmul_flops: operations a second of a matrix product there.
        efficiency: share of them that the engine is taken to reach.
        measured: whether they were measured here; False: published, and the time a rough guess.
        seconds: estimated time of computing prefix and steps. Reading weights, and moving
            boundaries to and from memory or disk, come on top.
        learned: the same with a learned trade-off; None where no episodes were asked for.
    """

    layer: int
    trained_layers: tuple[int, ...]
    layers_read: int
    layers_total: int
    bytes_read: int
    bytes_total: int
    flops_prefix: float
    flops_train: float
    memory_weights: int
    memory_boundaries: int
    memory_step: int
    dtype: str
    device: str
    matmul_flops: float
    efficiency: float
    measured: bool
    seconds: float
    learned: LearnedPlan | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def plan(
    model: str,
    *,
    layer: Any = "auto",
    steps: int | None = None,
    batch_size: int | None = None,
    tokens: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    episodes: int | None = None,
    episode_steps: int | None = None,
    look_items: int | None = None,
    reward: str = "likelihood",
) -> Plan:
    """Count a run's cost, and that of a run with a learned trade-off.

    What is None, and ``layer: auto``, is the preset's, or else the recipe's default.

    Args:
        model: a directory, a preset's name, or a name on the Hub. One that a preset stands for is
            counted by the preset, whose vocabulary may differ a little, and nothing is fetched.
        layer: deepest layer read, or ``auto``.
        tokens: of every text; each step reads ``batch_size`` forget and as many retain texts.
        device: ``auto``, ``cpu``, ``cuda``, …, which is measured, or a key of PUBLISHED.
        episodes: of a learned trade-off; 0 leaves it out; None: a recipe's.
        episode_steps: optimiser steps of one; None: the default's.
        look_items: questions of each side in a look. Actions are as far apart as a recipe has them
            by default.
        reward: what looks measure: ``likelihood``, ``accuracy`` or ``representation``.

    Raises:
        ModelError: the directory is no causal LM in safetensors.
        RecipeError: the layer, the dtype, the device or the reward does not exist.
    """
    if reward not in LOOK_KINDS:
        raise RecipeError(
            what="Unknown reward",
            got=repr(reward),
            allowed=", ".join(LOOK_KINDS),
            fix="likelihood is a run's default",
        )
    preset = named_preset(model)
    brought = preset.settings if preset else {}

    def chosen(given: Any, name: str) -> Any:
        default = brought.get(name, Recipe.model_fields[name].default)
        return default if given is None else given

    episodes, look_items = chosen(episodes, "episodes"), chosen(look_items, "look_items")
    steps, batch_size = chosen(steps, "steps"), chosen(batch_size, "batch_size")
    tokens, dtype = chosen(tokens, "max_tokens"), chosen(dtype, "dtype")
    width = resolve_dtype(dtype).itemsize
    shapes = Shapes.of(preset or model)
    wanted = None
    if layer == "auto" and brought:
        layer, wanted = brought["layer"], brought["trained_layers"]
    trained, layer = resolve_layers(layer, wanted, shapes.n_layers)

    hidden, inner, layers = shapes.hidden_size, shapes.intermediate_size, shapes.layers
    projection = hidden * inner
    side = steps * batch_size * tokens  # tokens of all forget texts, and of all retain texts
    step_tokens = 2 * batch_size * tokens
    below = sum(layers[: trained[0]]) + layers[trained[0]] - projection
    segment = projection + sum(layers[trained[0] + 1 : layer + 1])
    # Of retain texts the originals are kept too, of forget texts what enters the segment alone.
    flops_prefix = 2.0 * (2 * below + segment) * side
    # Two operations a weight and token forward; backward once for activations, and once more for
    # the trained matrices alone.
    flops_step = (4.0 * segment + 2.0 * len(trained) * projection) * step_tokens
    # Gradient in the model's type, two moments and, for a narrow type, a master in float32.
    optimiser = len(trained) * projection * (width + 8 + (4 if width < 4 else 0))
    opened = sum(layers[: layer + 1]) + shapes.embeddings
    speed = _speed(device, dtype)

    def seconds(*flops: float) -> float:
        return sum(flops) / (speed.matmul_flops * speed.efficiency)

    learned = None
    if episodes:
        action = steps_of_action("auto", steps)
        episode_steps = steps_of_episode(
            "auto" if episode_steps is None else episode_steps, steps, action
        )
        # The first episode is as long as the run.
        short = episodes - 1
        looks = short * math.ceil(episode_steps / action) + 2 * math.ceil(steps / action)
        by_angles = reward == "representation"
        look = segment if by_angles else sum(layers[trained[0] :]) + shapes.head
        before = below if by_angles else sum(layers[: trained[0]])
        closer_looks = chosen(None, "front_size") + 1 + SCALE_LOOKS

        def flops_of(times: int, items: int) -> float:
            asked = QUESTION_PARTS * items * QUESTION_TOKENS
            read = 2 * items * tokens if by_angles else asked + texts_beside(items, items) * tokens
            # The base's look runs all layers; what it kept lets the others begin at the lowest.
            return 2.0 * (before + look * (times + 1)) * read

        flops_looks = flops_of(looks, look_items)
        most = CLOSER_TEXTS if by_angles else CLOSER
        flops_closer = flops_of(closer_looks, max(most, look_items))
        flops_all = flops_step * (short * episode_steps + 2 * steps)
        learned = LearnedPlan(
            reward=reward,
            episodes=episodes,
            episode_steps=episode_steps,
            looks=looks,
            look_items=look_items,
            closer_looks=closer_looks,
            flops_train=flops_all,
            flops_looks=flops_looks,
            flops_closer=flops_closer,
            memory_weights=(opened if by_angles else shapes.elements) * width + optimiser,
            seconds=seconds(flops_prefix, flops_all, flops_looks, flops_closer),
        )
    return Plan(
        layer=layer,
        trained_layers=trained,
        layers_read=layer + 1,
        layers_total=shapes.n_layers,
        bytes_read=shapes.stored(layer),
        bytes_total=sum(stored for _, stored in shapes.tensors.values()),
        flops_prefix=flops_prefix,
        flops_train=flops_step * steps,
        memory_weights=opened * width + optimiser,
        memory_boundaries=side * (2 * inner + 3 * hidden) * width,
        memory_step=step_tokens * len(trained) * (6 * hidden + 4 * inner) * width,
        dtype=dtype,
        **speed._asdict(),
        seconds=seconds(flops_prefix, flops_step * steps),
        learned=learned,
    )


@dataclass(frozen=True)
class Shapes:
    """What a plan counts of a model.

    Attributes:
        tensors: name -> (elements, bytes on disk).
    """

    n_layers: int
    hidden_size: int
    intermediate_size: int
    tensors: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, model: Preset | str) -> Shapes:
        """Of a preset, a directory, or a model on the Hub. Raises ModelError if it is none."""
        if isinstance(model, Preset):
            config = model.config
            parameters = model.meta_model().named_parameters()
            return cls(
                config["num_hidden_layers"],
                config["hidden_size"],
                config["intermediate_size"],
                {name: (p.numel(), p.numel() * p.itemsize) for name, p in parameters},
            )
        try:
            checkpoint = Checkpoint.open(model)
        except ModelError as error:
            if Path(model).exists():
                raise
            raise ModelError(
                what=error.what,
                got=error.got,
                allowed=f"{error.allowed}; or a preset, {', '.join(PRESETS)}",
                fix=error.fix,
            ) from error
        return cls(
            checkpoint.n_layers,
            checkpoint.hidden_size,
            checkpoint.intermediate_size,
            {
                name: (math.prod(info.shape), info.end - info.start)
                for name, info in checkpoint.tensors.items()
            },
        )

    @cached_property
    def layers(self) -> list[int]:
        """Elements of each decoder layer."""
        found = [0] * self.n_layers
        for name, (size, _) in self.tensors.items():
            if (index := self._layer_of(name)) is not None:
                found[index] += size
        return found

    @property
    def elements(self) -> int:
        """Of the whole model."""
        return sum(size for size, _ in self.tensors.values())

    @property
    def embeddings(self) -> int:
        """Elements that turn ids and positions into the first activations."""
        return sum(self.tensors[name][0] for name in self._outside() if _is_embedding(name))

    @property
    def head(self) -> int:
        """Elements of the head, or of the embedding it is tied to: the largest tensor outside."""
        return max((self.tensors[name][0] for name in self._outside()), default=0)

    def stored(self, layer: int) -> int:
        """Bytes on disk of the embeddings and of the layers up to this one."""
        indices = {name: self._layer_of(name) for name in self.tensors}
        return sum(
            stored
            for name, (_, stored) in self.tensors.items()
            if (_is_embedding(name) if (at := indices[name]) is None else at <= layer)
        )

    def _outside(self) -> list[str]:
        return [name for name in self.tensors if self._layer_of(name) is None]

    def _layer_of(self, name: str) -> int | None:
        """The decoder layer of a tensor: the first number in its name (``model.layers.3.…``)."""
        number = next((part for part in name.split(".") if part.isdigit()), None)
        return int(number) if number is not None and int(number) < self.n_layers else None


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe"))


class _Speed(NamedTuple):
    """As in `Plan`."""

    device: str
    matmul_flops: float
    efficiency: float
    measured: bool


def _speed(device: str, dtype: str) -> _Speed:
    if device in PUBLISHED:
        narrow, wide = PUBLISHED[device]
        peak = wide if dtype == "float32" else narrow
        return _Speed(device, peak, PUBLISHED_EFFICIENCY, measured=False)
    try:
        here = resolve_device(device)
    except RecipeError as error:
        raise RecipeError(
            what=error.what,
            got=error.got,
            allowed=f"{error.allowed}; of other machines, as estimates, {', '.join(PUBLISHED)}",
            fix=error.fix,
        ) from error
    return _Speed(str(here), _matmul_flops(here, dtype), EFFICIENCY, measured=True)


def _matmul_flops(device: torch.device, dtype: str) -> float:
    """Operations a second of a square matrix product here, the best of those that fit the time."""
    side = PROBE_SIDE_CUDA if device.type == "cuda" else PROBE_SIDE
    a = torch.randn(side, side, dtype=getattr(torch, dtype), device=device)
    best, spent = 0.0, 0.0
    while spent < PROBE_SECONDS:
        start = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            product[0, 0].item()
        took = time.perf_counter() - start
        best, spent = max(best, 2.0 * side**3 / took), spent + took
    return best
