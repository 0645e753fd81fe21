"""Train the miniature: `python -m expunge.miniature.build --out DIR [--oracle]`.

Writes DIR/base (or DIR/oracle) as a model directory and records what it measured in
DIR/manifest.json. An interrupted training continues from its last checkpoint.
"""

import argparse
import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from expunge.files import replacing, write_json
from expunge.miniature.architecture import VOCABULARY, new_model, train_tokenizer
from expunge.miniature.measure import accuracy, measure, tokens
from expunge.miniature.world import World

STEPS = 2400
BATCH = 32
POOL = 8  # batches sorted by length together, which saves padding
RATE = 2e-3
WARM_UP = 200
CHECKPOINT_EVERY = 300


def batches(texts: list[list[int]], seed: int, first: int, last: int) -> Iterator[Tensor]:
    """Yield the padded batches of steps first..last-1; the order depends on the seed alone."""
    step = 0
    for epoch in range(last):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(texts), generator=generator).tolist()
        for begin in range(0, len(order) - BATCH * POOL + 1, BATCH * POOL):
            pool = sorted(order[begin : begin + BATCH * POOL], key=lambda row: len(texts[row]))
            for slot in torch.randperm(POOL, generator=generator).tolist():
                if first <= step < last:
                    rows = [texts[row] for row in pool[slot * BATCH : (slot + 1) * BATCH]]
                    length = max(map(len, rows))
                    yield torch.tensor([row + [0] * (length - len(row)) for row in rows])
                step += 1
                if step >= last:
                    return


def loss_of(model: LlamaForCausalLM, tokens_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats/token over all tokens but padding."""
    # Padding on the right is invisible to a causal model, so no mask is needed.
    logits_BTV = model(input_ids=tokens_BT).logits[:, :-1]
    return functional.cross_entropy(
        logits_BTV.reshape(-1, VOCABULARY), tokens_BT[:, 1:].reshape(-1), ignore_index=0
    )


def rate_at(step: int, steps: int) -> float:
    """Return the learning rate: linear warm-up, then a cosine to zero."""
    if step < WARM_UP:
        return RATE * (step + 1) / WARM_UP
    return RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    texts: list[str],
    *,
    steps: int,
    checkpoint: Path,
) -> None:
    """Train in place with AdamW; continue from the checkpoint if there is one, and renew it."""
    encoded = [tokens(tokenizer, text) for text in texts]
    optimiser = torch.optim.AdamW(
        model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    first = restore(model, optimiser, checkpoint, steps) if checkpoint.exists() else 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=steps, completed=first)
        for step, batch in enumerate(batches(encoded, world.seed, first, steps), first):
            for group in optimiser.param_groups:
                group["lr"] = rate_at(step, steps)
            loss = loss_of(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            progress.update(task, advance=1, description=f"loss {loss.item():.2f}")
            if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
                save_state(model, optimiser, checkpoint, step + 1, steps)
                right = [
                    accuracy(model, tokenizer, questions[::6])
                    for questions in (world.hazard_questions, world.benign_questions)
                ]
                progress.console.print(
                    f"step {step + 1}: loss {loss.item():.3f} nats/token, accuracy "
                    f"hazard {right[0]:.2f} benign {right[1]:.2f}"
                )


def save_state(
    model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, path: Path, step: int, steps: int
) -> None:
    """Save weights and optimiser moments; a reader sees the old file or the new one."""
    state = {}
    for name, weight in model.named_parameters():
        moments = optimiser.state[weight]
        state[f"weight.{name}"] = weight.detach()
        state[f"exp_avg.{name}"] = moments["exp_avg"]
        state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
    with replacing(path) as temporary:
        save_file(state, temporary, {"step": str(step), "steps": str(steps)})


def restore(
    model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, path: Path, steps: int
) -> int:
    """Load a saved state in place and return its step; 0 if it belongs to another schedule."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if metadata["steps"] != str(steps):
            return 0
        for name, weight in model.named_parameters():
            weight.data.copy_(file.get_tensor(f"weight.{name}"))
            optimiser.state[weight] = {
                "step": torch.tensor(float(metadata["step"])),
                "exp_avg": file.get_tensor(f"exp_avg.{name}"),
                "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}"),
            }
    return int(metadata["step"])


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a float16 model directory beside its place, then move it there."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.half().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(path, ignore_errors=True)
    (partial / "model.safetensors").chmod(0o644)  # safetensors makes it private to its owner
    partial.replace(path)


def record(path: Path, name: str, world: World, entry: dict[str, object]) -> None:
    """Add a model's entry to the manifest; entries of another world's data are dropped."""
    common = {"seed": world.seed, "data_sha256": world.data_hash()}
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(old.get(key) == value for key, value in common.items())
    entries = {**(old["models"] if same else {}), name: entry}
    write_json(path, {**common, "models": dict(sorted(entries.items()))})


def build(out: Path, oracle: bool, steps: int = STEPS, seed: int = 0) -> dict[str, float]:
    """Train, save and measure one of the two models; return the measurements."""
    name = "oracle" if oracle else "base"
    out.mkdir(parents=True, exist_ok=True)
    world = World.generate(seed)
    tokenizer = train_tokenizer(list(world.corpus()))  # one tokenizer for both models
    model = new_model(seed)
    checkpoint = out / f"{name}.training.safetensors"
    began = time.monotonic()
    texts = list(world.corpus(oracle))
    train(model, tokenizer, world, texts, steps=steps, checkpoint=checkpoint)
    seconds = time.monotonic() - began
    save_model(model, tokenizer, out / name)
    # Measured on what is shipped: the weights after rounding to float16.
    shipped = LlamaForCausalLM.from_pretrained(out / name, dtype=torch.float32)
    measured = measure(shipped.eval(), tokenizer, world)
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    entry = {
        "command": "python -m expunge.miniature.build --out DIR"
        + (" --oracle" if oracle else "")
        + f" --steps {steps} --seed {seed}",
        "steps": steps,
        "training_seconds": round(seconds),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
        "measured": measured,
    }
    record(out / "manifest.json", name, world, entry)
    checkpoint.unlink(missing_ok=True)
    return measured


def main() -> None:
    """Parse the command line, build, print the measurements."""
    parser = argparse.ArgumentParser(prog="python -m expunge.miniature.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoints")
    parser.add_argument("--oracle", action="store_true", help="train the retrained oracle")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one thread: the model is too small to gain from more
    for key, value in build(**vars(arguments)).items():
        print(f"{key} {value:.3f}")


if __name__ == "__main__":
    main()
