"""The engine against a textbook loop: same data, same steps, same result, alternating.

    python benchmarks/engine.py --out results/engine.json

Times are wall seconds in one process, textbook and engine in turn; the ratios are taken round by
round and their median is reported. Memory is the peak of a fresh process for each, above that of
a process that only imports the libraries. The trained matrices of both must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from expunge.files import write_json
from expunge.model.boundaries import BoundaryStore
from expunge.model.memory import peak_bytes
from expunge.model.segment import Segment
from expunge.model.structure import find_structure
from expunge.objectives import OBJECTIVES
from expunge.objectives.targets import Targets
from expunge.provenance import environment
from expunge.training.loop import Trainer
from expunge.training.settings import TrainingSettings
from expunge.training.tradeoff import Fixed
from textbook import textbook_rmu

LAYER, TRAINED = 7, (5, 6, 7)
BATCH, TOKENS, VOCABULARY = 4, 128, 8192
COEFFICIENT, RETAIN_WEIGHT, LR = 6.5, 1200.0, 5e-5


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def make_base(folder: Path, hidden: int) -> None:
    """A random 32-layer Llama on disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=32,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=TOKENS,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def texts(steps: int, seed: int) -> list[tuple[int, ...]]:
    """Token ids of one epoch's texts, all of one length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (steps * BATCH, TOKENS), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def open_truncated(folder: Path) -> Any:
    """The base up to the layer read, as the engine opens it."""
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers = LAYER + 1
    return AutoModel.from_pretrained(folder, config=config).eval()


class Engine:
    """Engine runs on one opened base."""

    def __init__(self, folder: Path, steps: int) -> None:
        model = open_truncated(folder)
        structure = find_structure(model)
        self.segment = Segment(model, structure, trained=TRAINED, captured=(LAYER,))
        self.steps = steps
        self.forget, self.retain = texts(steps, 1), texts(steps, 2)
        self.stores: tuple[BoundaryStore, BoundaryStore] | None = None

    def prefix(self) -> None:
        """Compute the boundaries anew."""
        store = partial(BoundaryStore, self.segment)
        self.stores = store(self.forget, reference=False), store(self.retain, reference=True)
        for one in self.stores:
            one.compute()

    def train(self) -> dict[str, Tensor]:
        """One run from stored boundaries."""
        assert self.stores is not None
        trainer = Trainer(
            self.segment,
            [self.stores[0]],
            self.stores[1],
            objective=partial(OBJECTIVES.get("rmu").part, coefficient=COEFFICIENT),
            tradeoff=Fixed(RETAIN_WEIGHT),
            settings=TrainingSettings(
                steps=self.steps,
                lr=LR,
                lr_schedule="constant",
                batch_size=BATCH,
                first_token="both",
            ),
        )
        return trainer.run().weights

    def batches(self) -> tuple[list[Tensor], list[Tensor]]:
        """The batches that `train` uses, step by step, for the textbook loop."""
        from expunge.data.tokens import training_batches

        def one(rows: list[tuple[int, ...]], seed: int) -> list[Tensor]:
            lengths = [len(row) for row in rows]
            order = training_batches(
                len(rows), batch_size=BATCH, seed=seed * 100_003, lengths=lengths
            )
            return [torch.tensor([rows[i] for i in indices]) for indices in order]

        return one(self.forget, 0), one(self.retain, 1)


def run_textbook(folder: Path, engine: Engine, *, all_gradients: bool) -> Callable[[], Any]:
    """A textbook run on a freshly opened base; opening is not timed."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    frozen = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    forget, retain = engine.batches()
    target_D = Targets("positive", 0, model.config.hidden_size).at(0, forget[0])
    return partial(
        textbook_rmu,
        model,
        frozen,
        forget=forget,
        retain=retain,
        layer=LAYER,
        target_D=target_D,
        coefficient=COEFFICIENT,
        retain_weight=RETAIN_WEIGHT,
        lr=LR,
        all_gradients=all_gradients,
    )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def child(kind: str, folder: Path, steps: int) -> int:
    """Peak memory in bytes of a fresh process that does one run of a kind."""
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--steps", str(steps)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.strip().splitlines()[-1])


def run_child(kind: str, folder: Path, steps: int) -> None:
    if kind != "imports":
        engine = Engine(folder, steps)
        if kind == "engine":
            engine.prefix()
            engine.train()
        else:
            del engine.segment
            run_textbook(folder, engine, all_gradients=True)()
    print(peak_bytes())


def matmul_peak(seconds: float = 1.0) -> float:
    """Operations a second of the best float32 matrix product seen."""
    a, best, spent = torch.randn(1024, 1024), 0.0, 0.0
    while spent < seconds:
        took, _ = timed(lambda: a @ a)
        best, spent = max(best, 2 * 1024**3 / took), spent + took
    return best


def difference(one: dict[str, Tensor], other: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """Largest difference of two trained matrices, relative to what was learned."""
    triples = zip(sorted(one), sorted(other), sorted(base), strict=True)
    return max(
        float((one[a] - other[b]).norm() / (other[b] - base[c]).norm()) for a, b, c in triples
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/engine.json"))
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=["imports", "engine", "textbook"])
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.child:
        run_child(given.child, given.folder, given.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder, given.hidden)
        memory = {
            kind: child(kind, folder, given.steps) for kind in ("imports", "textbook", "engine")
        }
        engine = Engine(folder, given.steps)
        base = {name: p.detach().clone() for name, p in engine.segment.weights.items()}
        rounds: list[dict[str, float]] = []
        agreement = 0.0
        for number in range(given.rounds):
            print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
            work = run_textbook(folder, engine, all_gradients=True)
            textbook, expected = timed(work)
            lean, _ = timed(run_textbook(folder, engine, all_gradients=False))
            prefix, _ = timed(engine.prefix)
            train, learned = timed(engine.train)
            repeat, _ = timed(engine.train)
            agreement = max(agreement, difference(learned, expected, base))
            rounds.append(
                {
                    "textbook": textbook,
                    "textbook_lean": lean,
                    "engine_first": prefix + train,
                    "engine_repeat": repeat,
                }
            )
            print(json.dumps(rounds[-1]), file=sys.stderr)
        with FlopCounterMode(display=False) as counter:
            engine.train()
        peak = matmul_peak()
    ratio = {
        "first": statistics.median(r["textbook"] / r["engine_first"] for r in rounds),
        "repeat": statistics.median(r["textbook"] / r["engine_repeat"] for r in rounds),
        "first_against_lean": statistics.median(
            r["textbook_lean"] / r["engine_first"] for r in rounds
        ),
        "repeat_against_lean": statistics.median(
            r["textbook_lean"] / r["engine_repeat"] for r in rounds
        ),
    }
    used = {kind: memory[kind] - memory["imports"] for kind in ("textbook", "engine")}
    repeat = statistics.median(r["engine_repeat"] for r in rounds)
    result = {
        "command": f"python benchmarks/engine.py --hidden {given.hidden} --steps {given.steps} "
        f"--rounds {given.rounds}",
        "model": {"layers": 32, "hidden": given.hidden, "layer": LAYER, "trained": TRAINED},
        "batch": {"texts": BATCH, "tokens": TOKENS, "steps": given.steps},
        "seconds": rounds,
        "speed_ratio": ratio,
        "peak_memory_bytes": {**memory, "above_imports": used},
        "memory_ratio": used["engine"] / used["textbook"],
        "largest_difference_relative_to_learned": agreement,
        "matmul_peak_flops": peak,
        "repeat_flops": counter.get_total_flops(),
        "share_of_peak_on_repeat": counter.get_total_flops() / repeat / peak,
        "environment": environment(),
    }
    write_json(given.out, result)
    print(json.dumps({k: result[k] for k in ("speed_ratio", "memory_ratio")}, indent=2))


if __name__ == "__main__":
    main()
