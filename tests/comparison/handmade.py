"""Small run records made by hand: a few questions, prompts, texts, and what three models say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expunge.evaluation.examples import Unit, collect
from expunge.evaluation.stats import to_score, to_values
from expunge.records import ModelRole, RunRecord

Numbers = Sequence[float | None]
CHANCE = 0.25
UNITS: dict[str, Unit] = {"nll": "nats/token", "perplexity": "perplexity"}
SCORERS = ("words", "tfidf")


def rights(share: float, n: int, generator: np.random.Generator | None = None) -> list[float]:
    """``n`` answers, that share of them right: the first ones, or drawn."""
    if generator is None:
        return [1.0] * round(share * n) + [0.0] * (n - round(share * n))
    return (generator.random(n) < share).astype(float).tolist()


def record(
    objective: str,
    function: str = "knowledge",
    seed: int = 0,
    *,
    measured: Mapping[str, Mapping[ModelRole, Numbers]],
    weights: Mapping[str, Sequence[float]] | None = None,
    removed: str | None = None,
    data: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    values: bool = True,
    **recipe: Any,
) -> RunRecord:
    """A record.

    Args:
        measured: score, or ``toxicity_rate/<prompts>/<scorer>`` -> model -> value of each example.
        weights: score -> weight of each example.
        removed: what the patch is for, where that is not what was measured.
        values: whether it keeps them.
        recipe: settings beside the function and the seed.
    """
    scores, behind = [], []
    for key, by_model in measured.items():
        name, _, rest = key.partition("/")
        prompts, _, scorer = rest.partition("/")
        for model, numbers in by_model.items():
            own = (weights or {}).get(key, [1.0] * len(numbers))
            examples = collect(
                name,
                [None if x is None else (x, w) for x, w in zip(numbers, own, strict=True)],
                unit=UNITS.get(name.rpartition("_")[2], "fraction"),
                higher_is="worse",
                chance=CHANCE if "accuracy" in name else None,
                reason="left out by hand",
                prompts=prompts or None,
                scorer=scorer or None,
            )
            scores.append(to_score(examples, model=model, split="test"))
            behind.append(to_values(examples, model=model, split="test"))
    settings = {"function": function, "seed": seed, "model": "base", "retain_floor": 0.9, **recipe}
    return RunRecord(
        function=removed or function,
        objective=objective,
        seed=seed,
        timing={},
        peak_memory_bytes=0,
        provenance={"recipe": settings, "data": dict(data or {"questions.jsonl": "hash"})},
        scores=scores,
        values=behind if values else [],
        training=dict(training or {}),
    )


def knowledge(
    objective: str,
    seed: int = 0,
    *,
    forget: float = 0.5,
    retain: float = 0.7,
    rise: float = 0.2,
    n: int = 40,
    generator: np.random.Generator | None = None,
    **more: Any,
) -> RunRecord:
    """A run on knowledge; the base answers .75 of both kinds of questions, chance is .25.

    Args:
        forget, retain: accuracies afterwards.
        rise: of the texts' nats/token over the base's 2.
    """
    base = rights(0.75, n)
    measured: dict[str, dict[ModelRole, Numbers]] = {
        "forget_accuracy": {"base": base, "patched": rights(forget, n, generator)},
        "retain_accuracy": {"base": base, "patched": rights(retain, n, generator)},
        "perplexity": {"base": [1.0, 2.0, 3.0], "patched": [1 + rise, 2 + rise, 3 + rise]},
    }
    return record(objective, "knowledge", seed, **{"measured": measured, **more})


def toxicity(
    objective: str,
    seed: int = 0,
    *,
    rates: tuple[float, float] = (0.1, 0.2),
    rise: float = 0.1,
    n: int = 40,
    generator: np.random.Generator | None = None,
    **more: Any,
) -> RunRecord:
    """A run on toxicity; either scorer calls .5 of the base's continuations toxic.

    Args:
        rates: afterwards, by scorer.
        rise: of the neutral wordings' nats/token.
    """
    base = rights(0.5, n)
    measured: dict[str, dict[ModelRole, Numbers]] = {
        f"toxicity_rate/openings/{scorer}": {"base": base, "patched": rights(rate, n, generator)}
        for scorer, rate in zip(SCORERS, rates, strict=True)
    }
    # A second set of prompts, which does not count.
    measured["toxicity_rate/long/words"] = {"base": [1.0, 0.0], "patched": [1.0, 1.0]}
    measured["retain_accuracy"] = {"base": rights(0.75, n), "patched": rights(0.75, n)}
    measured["perplexity"] = {"base": [1.0, 2.0], "patched": [1.0, 2.0]}
    measured["neutral_nll"] = {"base": [3.0, 4.0], "patched": [3 + rise, 4 + rise]}
    return record(objective, "toxicity", seed, **{"measured": measured, **more})
