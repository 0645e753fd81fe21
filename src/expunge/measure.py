"""Measure any model, patched or not, on questions and text: `expunge eval`."""

from __future__ import annotations

from pathlib import Path

from expunge.data.sources import read_questions, read_texts
from expunge.defaults import fitting_tokens, resolve_device, resolve_dtype
from expunge.errors import DataError
from expunge.evaluation.fluency import nll, perplexity
from expunge.evaluation.likelihood import score
from expunge.evaluation.multiple_choice import accuracy, answer_nll, prepare_questions
from expunge.evaluation.prepared import prepare_texts
from expunge.evaluation.stats import to_score
from expunge.model.checkpoint import Checkpoint, open_model
from expunge.model.patch import Patch
from expunge.progress import Progress, Silent
from expunge.records import ModelRole, Score

QUESTION_BATCH, TEXT_BATCH = 256, 16


def measure(
    model: str,
    *,
    patch: Path | None = None,
    questions: str | None = None,
    text: str | None = None,
    max_tokens: int = 512,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Score]:
    """``accuracy``, ``answer_nll``, ``text_nll`` and ``perplexity`` over all of the given data.

    Args:
        model: directory or hub name.
        patch: applied in memory before measuring.
        questions: multiple choice in any form that `read_questions` knows.
        text: texts in any form that `read_texts` knows.
        dtype: of the model in memory; a patch needs one that holds what is on disk.
        trust_remote_code: run Python code shipped with the model.

    Raises:
        DataError: neither questions nor text is given, or a file cannot be used.
        ModelError, PatchError, RecipeError: as `open_model`, `Patch`, `resolve_device` raise them.
    """
    progress = progress or Silent()
    if questions is None and text is None:
        raise DataError(
            what="There is nothing to measure on",
            got="neither questions nor text",
            allowed="--questions FILE, --text FILE, or both",
            fix="give at least one of them",
        )
    asked = None if questions is None else read_questions(questions)
    texts = None if text is None else read_texts(text)
    for loaded in (asked, texts):
        if loaded is not None and loaded.skipped:
            progress.say(f"note: {loaded}")
    learned = None if patch is None else Patch.load(patch)
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
    role: ModelRole = "base"
    if learned is not None:
        learned.apply_(network)
        role = "patched"
    examples = []
    if asked is not None:
        prepared = prepare_questions(tokenizer, asked.items, max_tokens=tokens)
        with progress.phase("questions", prepared.rows) as advance:
            scored = score(network, prepared, batch_size=QUESTION_BATCH, on_progress=advance)
        examples += [
            accuracy(asked.items, scored, name="accuracy", higher_is="better"),
            answer_nll(asked.items, scored, name="answer_nll", higher_is="worse"),
        ]
    if texts is not None:
        prepared = prepare_texts(tokenizer, texts.items, max_tokens=tokens)
        with progress.phase("text", prepared.rows) as advance:
            scored = score(network, prepared, batch_size=TEXT_BATCH, on_progress=advance)
        examples += [nll(scored, name="text_nll", higher_is="worse"), perplexity(scored)]
    return [to_score(one, model=role, split="all") for one in examples]
