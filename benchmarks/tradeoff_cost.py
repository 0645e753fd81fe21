"""What learning the trade-off costs, against one run of a textbook loop.

    python benchmarks/tradeoff_cost.py --out results/tradeoff_cost.json

Of two bases: the miniature, which is shallow, so that all its layers are trained, and a random one
of 32 layers and the same width, read at layer 7 and trained at three as published; there with looks
by representation and by likelihood. The random base has no answer to any question: it is looked at
by as many texts instead, and a run goes on whatever they show.

The textbook loop is RMU over whole models (benchmarks/textbook.py), with the demo's steps, batch
and texts, in float32 as all is: once with texts drawn at random, whatever their lengths, and once
in the package's own batches, of texts of about one length, which pad less. Between two runs of
each: `expunge run --tradeoff learned` from the opened base on, prefix, all episodes, looks, the
last run and the closer look at the front included, the final test left out, episodes in processes
beside as that command has them by default. Times are wall seconds, an episode's too, whatever ran
beside it. A round has both textbook loops before and after, since a machine's speed drifts: a ratio
is to the mean of the two, and the median of rounds is reported. The random base has a third as
many.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import LAYER, make_base
from expunge.demo import demo_recipe
from expunge.evaluation.looks import LookKind
from expunge.files import write_json
from expunge.metalearning.episodes import EPISODES_NAME
from expunge.metalearning.exploring import explore
from expunge.miniature import base_directory, check_data
from expunge.players import players_of
from expunge.provenance import environment
from expunge.recipe import Recipe
from expunge.training.loop import Stage
from expunge.training.order import Batches
from expunge.workbench import Workbench
from textbook import textbook_rmu

RETAIN_WEIGHT, COEFFICIENT, LR = 20.0, 6.5, 1e-4
# Width of the miniature.
HIDDEN = 128

Texts = Sequence[tuple[int, ...]]
Pairs = list[tuple[Tensor, Tensor]]


def drawn(forget: Texts, retain: Texts, recipe: Recipe) -> Pairs:
    """Each step's texts, drawn at random: what a loop does that knows nothing of lengths."""
    sides = (forget, 0), (retain, 1)
    return list(zip(*(_drawn(texts, recipe, seed) for texts, seed in sides), strict=True))


def _drawn(texts: Texts, recipe: Recipe, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (recipe.steps, recipe.batch_size)
    return [
        padded([texts[i] for i in picked])
        for picked in torch.randint(len(texts), size, generator=generator).tolist()
    ]


def grouped(forget: Texts, retain: Texts, recipe: Recipe) -> Pairs:
    """Each step's texts as the package orders them: texts of about one length together."""
    lengths = [[len(text) for text in texts] for texts in (forget, retain)]
    order = Batches(lengths[:1], lengths[1], recipe.batch_size, recipe.seed)
    read = [order.at(step)[1:] for step in range(recipe.steps)]
    return [(padded([forget[i] for i in f]), padded([retain[i] for i in r])) for f, r in read]


def padded(texts: Texts) -> Tensor:
    width = max(map(len, texts))
    return torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])


def textbook_run(
    bench: Workbench, recipe: Recipe, order: Callable[[Texts, Texts, Recipe], Pairs]
) -> dict[str, float]:
    """Seconds of one run of the textbook loop, models opened beforehand, and tokens of a step."""
    tokens = bench.learning.tokens(recipe)
    # As the learned run computes: the miniature is stored in float16, which many CPUs emulate.
    model, frozen = (
        AutoModelForCausalLM.from_pretrained(bench.checkpoint.directory, dtype=torch.float32)
        for _ in range(2)
    )
    target_D = torch.rand(model.config.hidden_size)
    pairs = order(tokens.forget[0], tokens.retain, recipe)
    start = time.perf_counter()
    textbook_rmu(
        model,
        frozen,
        forget=[forget for forget, _ in pairs],
        retain=[retain for _, retain in pairs],
        layer=max(bench.learning.where(recipe).captured),
        target_D=target_D / target_D.norm(),
        coefficient=COEFFICIENT,
        retain_weight=RETAIN_WEIGHT,
        lr=LR,
    )
    return {
        "seconds": time.perf_counter() - start,
        "step_tokens": statistics.fmean(f.numel() + r.numel() for f, r in pairs),
    }


ORDERS = {"drawn": drawn, "grouped": grouped}


def learned_run(recipe: Recipe) -> dict[str, Any]:
    """Seconds of a learned run from the opened base on, and of its parts."""
    bench = Workbench(recipe)
    bench.learning.opened(recipe.model, None)
    bench.learning.tokens(recipe)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        with players_of(recipe, bench, None, folder) as players:
            stage = Stage(state=folder / "state.safetensors")
            explore(bench.learning, recipe, folder, stage, players)
        seconds = time.perf_counter() - start
        _, *lines = (folder / EPISODES_NAME).read_text(encoding="utf-8").splitlines()
    # The first episode is a whole run, and the last line the run after them.
    first, *short, last = map(json.loads, lines)
    return {
        "learned": seconds,
        "first": first["seconds"],
        "episode": statistics.fmean(one["seconds"] for one in short),
        "last": last["seconds"],
        "timing": dict(bench.learning.timing),
        "inner_steps": sum(one["steps"] for one in (first, *short, last)),
        "processes": 1 if players is None else players.count,
    }


def deep_recipe(recipe: Recipe, folder: Path, reward: LookKind) -> Recipe:
    """The same run of a random base of 32 layers, which is written to ``folder``."""
    make_base(folder, HIDDEN)
    AutoTokenizer.from_pretrained(base_directory()).save_pretrained(folder)
    return recipe.updated(
        model=str(folder),
        layer=LAYER,
        questions=None,
        retain_questions=None,
        reward=reward,
        retain_floor=0.0,
        collapse_floor=0.0,
    )


def measured(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Rounds on one base, and the medians of their ratios."""
    bench, found = Workbench(recipe), []
    for _ in range(rounds):
        before = {name: textbook_run(bench, recipe, ORDERS[name]) for name in ORDERS}
        learned = learned_run(recipe)
        after = {name: textbook_run(bench, recipe, ORDERS[name]) for name in ORDERS}
        found.append(learned | {"textbook": {}})
        for name in ORDERS:
            seconds = [one[name]["seconds"] for one in (before, after)]
            textbook = statistics.fmean(seconds)
            found[-1]["textbook"][name] = {
                "seconds": seconds,
                "step_tokens": before[name]["step_tokens"],
                "ratio": learned["learned"] / textbook,
                "episode_ratio": learned["episode"] / textbook,
            }
        print(found[-1])
    where = bench.learning.where(recipe)

    def median(name: str, what: str) -> float:
        return statistics.median(one["textbook"][name][what] for one in found)

    return {
        "layers": bench.checkpoint.n_layers,
        "trained_layers": list(where.trained),
        "read_layers": list(where.captured),
        "learned_over_textbook": {name: median(name, "ratio") for name in ORDERS},
        "episode_over_textbook": {name: median(name, "episode_ratio") for name in ORDERS},
        "rounds": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/tradeoff_cost.json"))
    parser.add_argument("--rounds", type=int, default=3)
    given, origin = parser.parse_args(), environment()
    with tempfile.TemporaryDirectory() as name:
        data, deep = Path(name) / "data", Path(name) / "deep"
        check_data().write(data)
        recipe = demo_recipe(data, tradeoff="learned", oracle=None)
        kinds: tuple[LookKind, ...] = ("representation", "likelihood")
        bases = {"miniature": recipe}
        bases |= {f"32 layers, {kind}": deep_recipe(recipe, deep, kind) for kind in kinds}
        # The deep base takes long, so it has fewer rounds.
        rounds = dict.fromkeys(bases, max(1, given.rounds // 3)) | {"miniature": given.rounds}
        found = {base: measured(own, rounds[base]) for base, own in bases.items()}
    write_json(
        given.out,
        {
            "command": f"python benchmarks/tradeoff_cost.py --rounds {given.rounds}",
            "episodes": recipe.episodes,
            "steps": recipe.steps,
            "bases": found,
            "environment": origin,
        },
    )


if __name__ == "__main__":
    main()
