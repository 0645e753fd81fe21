"""What fitting probes at every layer costs, against one plain forward pass over the same texts.

    python benchmarks/probes.py --model DIR --pairs paradetox.tsv --out results/probes.json

Times are wall seconds in one process, plain passes and fits in turn; the ratios are taken round by
round and their median is reported. The plain pass goes over the same groups of similar length:
``backbone`` without the head (the stricter measure), ``whole`` with it. Memory is the peak of a
fresh process for each number of texts, above that of a process that only opens the model; it grows
until the kept rows reach their limit (``--max-rows``), and then by the token ids alone. Texts
beyond those in the file are the same ones with their words shuffled.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from expunge.files import write_json
from expunge.model.boundaries import GROUP_TOKENS
from expunge.model.memory import peak_bytes
from expunge.model.structure import find_structure
from expunge.probes.fit import fit_probes
from expunge.probes.stream import SHORTEST, length_groups
from expunge.provenance import environment

FITS = [
    ("logistic", "mean"),
    ("mean-difference", "mean"),
    ("lda", "mean"),
    ("lda", "token"),
    ("logistic", "token"),
]

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Bench:
    """An opened model and pairs of token ids."""

    def __init__(self, model: Path, pairs: Path, texts: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.structure = find_structure(self.model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.toxic, self.neutral = self._encode(pairs, texts // 2)

    def _encode(self, path: Path, count: int) -> tuple[list[list[int]], list[list[int]]]:
        with path.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        both: tuple[list[list[int]], list[list[int]]] = ([], [])
        generator, turn = random.Random(0), 0
        while rows and len(both[0]) < count:
            chosen = [[self._shuffled(t, generator, turn) for t in row[:2]] for row in rows]
            for toxic, neutral in chosen:
                ids = [self.tokenizer(text)["input_ids"] for text in (toxic, neutral)]
                if len(both[0]) < count and min(map(len, ids)) >= SHORTEST:
                    both[0].append(ids[0])
                    both[1].append(ids[1])
            turn += 1
        return both

    @staticmethod
    def _shuffled(text: str, generator: random.Random, turn: int) -> str:
        words = text.split()
        if turn:
            generator.shuffle(words)
        return " ".join(words)

    @torch.no_grad()
    def plain(self, *, head: bool) -> None:
        """One forward pass and nothing else."""
        texts = [*self.neutral, *self.toxic]
        forward = self.model if head else self.structure.backbone
        for group in length_groups([len(ids) for ids in texts], GROUP_TOKENS["cpu"]):
            ids_BT = pad_sequence([torch.tensor(texts[i]) for i in group], batch_first=True)
            lengths_B = torch.tensor([len(texts[i]) for i in group])
            mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
            mask = None if bool(mask_BT.all()) else mask_BT.long()
            forward(input_ids=ids_BT, attention_mask=mask, use_cache=False)

    def fit(self, kind: Any, pooling: Any, max_rows: int) -> Any:
        """Probes at all layers."""
        return fit_probes(
            self.model,
            self.structure,
            self.toxic,
            self.neutral,
            layers=range(self.structure.n_layers),
            kind=kind,
            pooling=pooling,
            paired=True,
            max_rows=max_rows,
        )


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def child(given: argparse.Namespace, texts: int) -> int:
    """Peak memory in bytes of a fresh process that fits on so many texts; 0: only opens."""
    command = [sys.executable, __file__, "--model", str(given.model), "--pairs", str(given.pairs)]
    done = subprocess.run(
        [*command, "--child", str(texts), "--max-rows", str(given.max_rows)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.strip().splitlines()[-1])


def run_child(given: argparse.Namespace) -> None:
    bench = Bench(given.model, given.pairs, given.child or 2)
    if given.child:
        bench.fit("logistic", "mean", given.max_rows)
    print(peak_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True, help="tsv: toxic, neutral")
    parser.add_argument("--out", type=Path, default=Path("results/probes.json"))
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--memory-texts", type=int, nargs="+", default=[2_000, 10_000, 40_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-rows", type=int, default=4096)
    parser.add_argument("--child", type=int)
    given = parser.parse_args()
    if given.child is not None:
        run_child(given)
        return
    bench = Bench(given.model, given.pairs, given.texts)
    works: dict[str, Callable[[], Any]] = {
        "backbone": lambda: bench.plain(head=False),
        "whole": lambda: bench.plain(head=True),
    }
    for kind, pooling in FITS:
        works[f"{kind} {pooling}"] = lambda k=kind, p=pooling: bench.fit(k, p, given.max_rows)
    # Warm up: the first pass, and the libraries' imports.
    works["backbone"]()
    Bench(given.model, given.pairs, 40).fit("logistic", "mean", given.max_rows)
    rounds = []
    for number in range(given.rounds):
        print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
        rounds.append({name: seconds(work) for name, work in works.items()})
        print(json.dumps(rounds[-1]), file=sys.stderr)
    fits = [name for name in works if name not in ("backbone", "whole")]
    memory = {str(texts): child(given, texts) for texts in given.memory_texts}
    opened = child(given, 0)
    counted = [len(ids) for ids in (*bench.toxic, *bench.neutral)]
    result = {
        "command": f"python benchmarks/probes.py --model {given.model.name} "
        f"--pairs {given.pairs.name} --texts {given.texts} --rounds {given.rounds} "
        f"--max-rows {given.max_rows}",
        "model": {"layers": bench.structure.n_layers, "hidden": bench.structure.hidden_size},
        "texts": {"n": len(counted), "tokens": sum(counted)},
        "seconds": rounds,
        "cost_in_plain_passes": {
            measure: {
                name: statistics.median(r[name] / r[measure] for r in rounds) for name in fits
            }
            for measure in ("backbone", "whole")
        },
        "peak_memory_bytes": {
            "opened": opened,
            "fit": memory,
            "above_opened": {texts: peak - opened for texts, peak in memory.items()},
        },
        "environment": environment(),
    }
    write_json(given.out, result)
    shown = {"cost_in_plain_passes", "peak_memory_bytes"}
    print(json.dumps({name: result[name] for name in sorted(shown)}, indent=2))


if __name__ == "__main__":
    main()
