"""How well a model predicts running text: nats/token and perplexity.

    prepared = prepare_texts(tokenizer, texts, max_tokens=256)   # once
    perplexity(score(model, prepared, batch_size=16))            # for each model

Perplexity here is per token of the model's own tokenizer, and each text is read by itself up to
``max_tokens``; published WikiText perplexities (per word, or by sliding window) are other numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from expunge.evaluation.examples import Examples, HigherIs, Unit, collect
from expunge.evaluation.likelihood import Scored


def nll(
    scored: Sequence[Sequence[Scored]], *, name: str = "nll", higher_is: HigherIs = "worse"
) -> Examples:
    """Nats/token of each text, weighted by its scored tokens.

    Args:
        scored: what `likelihood.score` gave for `prepare_texts`.
    """
    return _per_text(scored, name, "nats/token", higher_is)


def perplexity(
    scored: Sequence[Sequence[Scored]], *, name: str = "perplexity", higher_is: HigherIs = "worse"
) -> Examples:
    """As `nll`, with unit ``perplexity``: `stats.to_score` takes exp of the weighted mean."""
    return _per_text(scored, name, "perplexity", higher_is)


def _per_text(
    scored: Sequence[Sequence[Scored]], name: str, unit: Unit, higher_is: HigherIs
) -> Examples:
    return collect(
        name,
        [(-total / tokens, tokens) if tokens else None for ((total, tokens),) in scored],
        unit=unit,
        higher_is=higher_is,
        reason="no token to score, or no finite likelihood",
    )
