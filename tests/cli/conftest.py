"""The command line called in this process, over a tiny world."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_world import (
    RUDE,
    Cli,
    Result,
    World,
    questions,
    save_model,
    sentences,
    wordings,
    write_lines,
    write_pairs,
    write_rows,
)

from expunge import cli as cli_module
from expunge import console
from expunge.recipe import Recipe
from expunge.run import run


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """``cli("run", …)`` calls main() as the console script would."""
    monkeypatch.setenv("COLUMNS", "200")
    # The console took its width when it was made: 80 in a pytest-xdist worker.
    monkeypatch.setattr(console, "stdout", Console(width=200))
    before = signal.getsignal(signal.SIGTERM)

    def call(*args: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["expunge", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli_module.main()
        captured = capsys.readouterr()
        code = stopped.value.code
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two models of one shape and tokenizer, and small files of every kind."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "base", seed=0)
    save_model(root / "oracle", seed=1)
    write_lines(root / "forget.txt", sentences(20, seed=0))
    write_lines(root / "second.txt", sentences(12, seed=1))
    write_lines(root / "retain.txt", sentences(30, seed=2))
    write_rows(root / "other.jsonl", [{"text": text} for text in sentences(30, seed=3)])
    write_lines(root / "fluent.txt", sentences(10, seed=4))
    write_rows(root / "questions.jsonl", questions(10, seed=5))
    write_rows(root / "asked.jsonl", questions(10, seed=6))
    write_pairs(root / "pairs.tsv", wordings(120, seed=7))
    rude, polite = zip(*wordings(120, seed=8), strict=True)
    rows = [{"text": text, "label": int(side is rude)} for side in (rude, polite) for text in side]
    write_rows(root / "labelled.jsonl", rows)
    openings = [" ".join(text.split()[:4]) for text in sentences(10, seed=9)]
    write_rows(root / "prompts.jsonl", [{"prompt": {"text": text}} for text in openings])
    write_lines(root / "words.txt", RUDE)
    return World(root)


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with questions on both sides; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    settings = {
        "model": str(world.model),
        "forget": str(world.forget),
        "retain": str(world.retain),
        "questions": str(world.questions),
        "retain_questions": str(world.asked),
        "layer": 2,
        "steps": 4,
        "lr": 0.01,
        "batch_size": 4,
    }
    run(Recipe.build(settings), out)
    return out
