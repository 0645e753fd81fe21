"""Measure any model, patched or not, on questions and text: `expunge eval`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from expunge.data.sources import read_prompts, read_questions, read_texts
from expunge.data.text import Question, Text
from expunge.defaults import fitting_tokens, resolve_device, resolve_dtype
from expunge.errors import DataError
from expunge.evaluation.examples import Examples
from expunge.evaluation.fluency import nll, perplexity
from expunge.evaluation.generation import SAMPLING, Sampling
from expunge.evaluation.likelihood import score
from expunge.evaluation.multiple_choice import accuracy, answer_nll, prepare_questions
from expunge.evaluation.prepared import prepare_texts
from expunge.evaluation.scorers import build_scorers
from expunge.evaluation.stats import to_score
from expunge.evaluation.toxicity import Collected, ToxicitySuite
from expunge.folder import load_artefact_file
from expunge.model.checkpoint import Checkpoint, open_model
from expunge.progress import Progress, Silent
from expunge.records import ModelRole, Score

QUESTION_BATCH, TEXT_BATCH = 256, 16


def measure(
    model: str,
    *,
    patch: Path | None = None,
    questions: str | None = None,
    text: str | None = None,
    prompts: str | None = None,
    scorers: Sequence[str] = (),
    sampling: Sampling = SAMPLING,
    max_tokens: int = 512,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Score]:
    """``accuracy``, ``answer_nll``, ``text_nll``, ``perplexity`` and, of continuations, toxicity.

    All of the given data is used.

    Args:
        model: directory or hub name.
        patch: a patch or an intervention, applied in memory while measuring.
        questions: multiple choice in any form that `read_questions` knows.
        text: texts in any form that `read_texts` knows.
        prompts: prompts in any form that `read_prompts` knows.
        scorers: what judges continuations, at least two that need no texts of a run.
        sampling: how prompts are continued.
        dtype: of the model in memory; a patch needs one that holds what is on disk.
        trust_remote_code: run Python code shipped with the model.

    Raises:
        DataError: there is nothing to measure on, or a file cannot be used.
        ModelError, PatchError, RecipeError: as `open_model`, `Patch`, `resolve_device` raise them.
    """
    progress = progress or Silent()
    if questions is None and text is None and prompts is None:
        raise DataError(
            what="There is nothing to measure on",
            got="neither questions nor text nor prompts",
            allowed="--questions FILE, --text FILE, --prompts FILE, or several",
            fix="give at least one of them",
        )
    asked = None if questions is None else read_questions(questions)
    texts = None if text is None else read_texts(text)
    openings = None if prompts is None else read_prompts(prompts)
    judges = () if openings is None else build_scorers(scorers, ())
    for loaded in (asked, texts, openings):
        if loaded is not None and loaded.skipped:
            progress.say(f"note: {loaded}")
    learned = None if patch is None else load_artefact_file(patch)
    tokens = fitting_tokens(max_tokens, Checkpoint.open(model).config)
    if tokens < max_tokens:
        progress.say(f"note: the model's context is {tokens} tokens; longer texts are cut there")
    network, tokenizer = open_model(
        model,
        layers=None,
        dtype=resolve_dtype(dtype),
        device=resolve_device(device),
        trust_remote_code=trust_remote_code,
    )
    role: ModelRole = "base" if learned is None else "patched"
    suite = None
    if openings is not None:
        suite = ToxicitySuite.build(
            tokenizer,
            split="all",
            prompts={"prompts": openings.items},
            pairs=(),
            neutral_texts=(),
            scorers=judges,
            sampling=sampling,
            max_tokens=tokens,
        )
    examples: list[Examples] = []
    said = None
    with nullcontext() if learned is None else learned.applied(network):
        if asked is not None:
            examples += _on_questions(network, tokenizer, asked.items, tokens, progress)
        if texts is not None:
            examples += _on_texts(network, tokenizer, texts.items, tokens, progress)
        if suite is not None:
            said = _collect(suite, network, progress)
    scores = [to_score(one, model=role, split="all") for one in examples]
    if suite is not None and said is not None:
        # The unpatched model tells how fluent the continuations are. What compares with the base's
        # own continuations, the summary, takes a run.
        judged, _ = suite.judge(said, network, said, role)
        # Without pairs there is no summary.
        scores += [one for one in judged if one.prompts and "detoxification" not in one.name]
    return scores


def _on_questions(
    model: Any, tokenizer: Any, questions: Sequence[Question], max_tokens: int, progress: Progress
) -> list[Examples]:
    prepared = prepare_questions(tokenizer, questions, max_tokens=max_tokens)
    with progress.phase("questions", prepared.rows) as advance:
        scored = score(model, prepared, batch_size=QUESTION_BATCH, on_progress=advance)
    return [
        accuracy(questions, scored, name="accuracy", higher_is="better"),
        answer_nll(questions, scored, name="answer_nll", higher_is="worse"),
    ]


def _on_texts(
    model: Any, tokenizer: Any, texts: Sequence[Text], max_tokens: int, progress: Progress
) -> list[Examples]:
    prepared = prepare_texts(tokenizer, texts, max_tokens=max_tokens)
    with progress.phase("text", prepared.rows) as advance:
        scored = score(model, prepared, batch_size=TEXT_BATCH, on_progress=advance)
    return [nll(scored, name="text_nll", higher_is="worse"), perplexity(scored)]


def _collect(suite: ToxicitySuite, model: Any, progress: Progress) -> Collected:
    with progress.phase("prompts", suite.rows) as advance:
        return suite.collect(model, advance)
