"""A tiny random model, its tokenizer, and texts and questions in its words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [f"w{number}" for number in range(60)]
RUDE, POLITE = WORDS[50:], WORDS[:40]
LAYERS, HIDDEN, INNER, CONTEXT = 4, 32, 48, 24


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON value; fails if there is anything beside it."""
        return json.loads(self.out)


Cli = Callable[..., Result]


@dataclass(frozen=True)
class World:
    """Where everything is."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "base"

    @property
    def oracle(self) -> Path:
        return self.root / "oracle"

    def __getattr__(self, name: str) -> Path:
        """``world.forget`` is the file whose name begins so."""
        (path,) = self.root.glob(f"{name}.*")
        return path

    def args(self, out: Path, *more: Any, **changes: Any) -> list[str]:
        """A whole `expunge run`: flags with ``changes``, None leaving one out, then ``more``."""
        flags = {
            "model": self.model,
            "function": "knowledge",
            "objective": "cosine-rmu",
            "forget": self.forget,
            "retain": self.retain,
            "layer": 2,
            "steps": 4,
            "lr": 0.01,
            "batch_size": 4,
            "out": out,
            **changes,
        }
        return _command(flags, more)

    def rude_args(self, out: Path, *more: Any, **changes: Any) -> list[str]:
        """A whole `expunge run` on toxicity: as `args`, with two scorers and short samples."""
        flags = {
            "model": self.model,
            "function": "toxicity",
            "pairs": self.pairs,
            "prompts": self.prompts,
            "retain": self.retain,
            "scorer": (f"words:{self.words}", "tfidf"),
            # No more pairs are read than the steps need, and probes need all of the 96.
            "steps": 8,
            "lr": 0.01,
            "batch_size": 12,
            "out": out,
            **changes,
        }
        short = ("--set", "samples=2", "--set", "new_tokens=5")
        return _command(flags, (*short, *more))


def _command(flags: dict[str, Any], more: tuple[Any, ...]) -> list[str]:
    words: list[Any] = ["run"]
    for name, value in flags.items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [] if one is None else [f"--{name.replace('_', '-')}", one]
    return [str(word) for word in (*words, *more)]


def save_model(directory: Path, *, seed: int, words: int = len(WORDS), **config: Any) -> None:
    """A random Llama of four layers and a word-level tokenizer of ``words`` words.

    The embeddings of rude words have a part in common, so that probes can tell them.
    """
    settings = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(SPECIAL) + len(WORDS),
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        model.model.embed_tokens.weight[[len(SPECIAL) + WORDS.index(word) for word in RUDE]] += 1.0
    model.save_pretrained(directory)
    save_tokenizer(directory, words)


def save_tokenizer(directory: Path, words: int = len(WORDS)) -> None:
    """A tokenizer that knows ``words`` words."""
    every = [*SPECIAL, *(f"w{number}" for number in range(words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(every)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(
        directory
    )


def sentences(n: int, *, seed: int, longest: int = 12) -> list[str]:
    """Random sentences of 6 words to ``longest``."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(6, longest))) for _ in range(n)]


def wordings(n: int, *, seed: int) -> list[tuple[str, str]]:
    """Pairs of a rude and a polite sentence that share their first four words."""
    chance = random.Random(seed)
    found = []
    for _ in range(n):
        opening = chance.choices(POLITE, k=4)
        size = chance.randint(4, 8)
        sides = (chance.choices(words, k=size) for words in (RUDE, POLITE))
        rude, polite = (" ".join([*opening, *side]) for side in sides)
        found.append((rude, polite))
    return found


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    return write_lines(path, ["toxic\tneutral1", *("\t".join(pair) for pair in pairs)])


def questions(n: int, *, seed: int) -> list[dict[str, Any]]:
    """Random questions of four choices."""
    chance = random.Random(seed)
    return [
        {
            "question": " ".join(chance.choices(WORDS, k=5)),
            "choices": chance.sample(WORDS, 4),
            "answer": chance.randrange(4),
        }
        for _ in range(n)
    ]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_lines(path, [json.dumps(row) for row in rows])
