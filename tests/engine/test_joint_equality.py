"""Joint training is one AdamW over the gradients of the summed losses, on two whole models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_equality
import test_probe_equality
import torch
from torch import Tensor

import textbook
import tiny
from expunge.model.boundaries import BoundaryStore
from expunge.model.segment import LOGPROBS, Segment
from expunge.objectives import OBJECTIVES
from expunge.objectives.targets import Targets
from expunge.training.loop import Stage, Trainer, TrainingResult
from expunge.training.settings import TrainingSettings
from expunge.training.state import TrainingState
from expunge.training.tradeoff import Dials, Fixed
from textbook import BATCH, LR, SEED, STEPS, assert_equal, batch_of, hidden

LAYER = 2
# The cosine objective reads layer 2, probes layers 1 to 3 and the head: all train what they reach.
TRAINED = (0, 1, 2, 3)


def cosine_loss(updated: Any, frozen: Any, forget: Sequence[int], retain: Sequence[int]) -> Tensor:
    u_D = Targets("positive", SEED, tiny.HIDDEN).at(0, torch.zeros(1, 1, dtype=torch.long))
    forget_ids, forget_mask = batch_of(tiny.texts(10, seed=0), forget)
    retain_ids, retain_mask = batch_of(tiny.texts(13, seed=50), retain)
    counted = forget_mask.clone()
    counted[:, 0] = False
    with torch.no_grad():
        (frozen_BTD,) = hidden("llama", frozen, retain_ids, retain_mask, [LAYER])
    (forget_BTD,) = hidden("llama", updated, forget_ids, forget_mask, [LAYER])
    (retain_BTD,) = hidden("llama", updated, retain_ids, retain_mask, [LAYER])
    return test_equality.cosine_rmu(forget_BTD, retain_BTD, frozen_BTD, counted, retain_mask, u_D)


def probe_loss(updated: Any, frozen: Any, forget: Sequence[int], retain: Sequence[int]) -> Tensor:
    return test_probe_equality.loss("llama", updated, frozen, forget, retain, twins=True)


def by_the_book(*, balance: bool) -> textbook.Textbook:
    """The sum of both losses; with ``balance`` each over the RMS of its gradient norms so far."""
    squares: list[list[float]] = [[], []]
    plain: list[float] = []

    def step(updated: Any, frozen: Any, forget: Sequence[int], retain: Sequence[int]) -> Tensor:
        losses = [loss(updated, frozen, forget, retain) for loss in (cosine_loss, probe_loss)]
        plain.append(sum(loss.item() for loss in losses))
        weights = [p for p in updated.parameters() if p.requires_grad]
        sizes = [1.0, 1.0]
        for n, loss in enumerate(losses) if balance else ():
            found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            squares[n].append(sum(float(g.square().sum()) for g in found if g is not None))
            sizes[n] = (sum(squares[n]) / len(squares[n])) ** 0.5
        return losses[0] / sizes[0] + losses[1] / sizes[1]

    book = textbook.train("llama", step, TRAINED)
    return replace(book, losses=plain)


def stores(segment: Segment) -> list[BoundaryStore]:
    """Forget, retain and twin texts, computed at this segment's cut."""
    sets = (tiny.texts(10, seed=0), tiny.texts(13, seed=50), tiny.texts(10, seed=90))
    found = [BoundaryStore(segment, texts, reference=True) for texts in sets]
    for store in found:
        store.compute()
    return found


@dataclass(frozen=True)
class Scaled:
    """Both terms of the probes' loss, times a number."""

    scale: float

    def at(self, step: int, steps: int, points: Any) -> Dials:
        return Dials(self.scale, self.scale * test_probe_equality.ALPHA)


class Two:
    """A model with two cuts, and trainers over them."""

    def __init__(self) -> None:
        self.model = tiny.tiny_model("llama")
        _, self.low = tiny.cut(self.model, trained=TRAINED[: LAYER + 1], captured=(LAYER,))
        read = (LOGPROBS, *test_probe_equality.READ)
        _, self.high = tiny.cut(self.model, trained=TRAINED, captured=read)
        self.low_stores, self.high_stores = stores(self.low), stores(self.high)

    def trainer(self, *, balance: bool = True, **more: Any) -> Trainer:
        beside = self._one("multi-layer-probe", self.high, self.high_stores, **more)
        return self._one(
            "cosine-rmu", self.low, self.low_stores, beside=[beside], balance=balance, **more
        )

    def _one(
        self,
        objective: str,
        segment: Segment,
        texts: list[BoundaryStore],
        beside: Sequence[Trainer] = (),
        balance: bool = True,
        **more: Any,
    ) -> Trainer:
        entry = OBJECTIVES.get(objective)
        probes = objective == "multi-layer-probe"
        alpha = test_probe_equality.ALPHA if probes else test_equality.ALPHA
        own = test_probe_equality.settings()["objective_settings"] if probes else {}
        given = {"steps": STEPS, "lr": LR, "batch_size": BATCH, "seed": SEED, **more}
        return Trainer(
            segment,
            texts[:1],
            texts[1],
            objective=partial(entry.part, **own),
            tradeoff=Fixed(alpha),
            settings=TrainingSettings(**given),
            needs=entry.extras["needs"],
            twins=texts[2] if probes else None,
            directions=test_probe_equality.DIRECTIONS if probes else None,
            beside=beside,
            balance=balance,
        )


@pytest.fixture(scope="module")
def two() -> Two:
    return Two()


@pytest.mark.parametrize("micro_batch_size", [0, 3])
@pytest.mark.parametrize("balance", [True, False])
def test_same_matrices_as_the_textbook(two: Two, micro_batch_size: int, balance: bool) -> None:
    """Also above the layer that the first objective reads, by the head's gradient."""
    ours = two.trainer(micro_batch_size=micro_batch_size, balance=balance).run()
    assert_equal(ours, by_the_book(balance=balance))


def test_the_comparison_notices_a_missing_loss(two: Two) -> None:
    """Control: either loss alone, and the sum without balance, end far away."""
    book = by_the_book(balance=True)
    alone = two._one("cosine-rmu", two.low, two.low_stores)
    for trainer in (alone, two.trainer().beside[0], two.trainer(balance=False)):
        ours = trainer.run()
        for key, weight in ours.weights.items():
            learned = (book.weights[key] - book.originals[key]).norm()
            assert (weight - book.weights[key]).norm() > 0.1 * learned


def test_balanced_the_scale_of_a_loss_decides_nothing(two: Two) -> None:
    """A loss in other units leads to the same weights; control: in a plain sum it does not."""
    found = {}
    for balance in (True, False):
        for scale in (1.0, 100.0):
            trainer = two.trainer(steps=5, balance=balance)
            beside = trainer.beside[0]
            beside.tradeoff = Scaled(scale)
            found[balance, scale] = trainer.run().weights
    for name in found[True, 1.0]:
        assert torch.allclose(found[True, 1.0][name], found[True, 100.0][name], atol=1e-4)
        assert not torch.allclose(found[False, 1.0][name], found[False, 100.0][name], atol=1e-3)


def test_the_log_tells_the_sum_and_each(two: Two) -> None:
    for entry in two.trainer(steps=2).run().log:
        for name in ("loss", "forget", "retain"):
            parts = entry.logs[f"1/{name}"] + entry.logs[f"2/{name}"]
            assert getattr(entry, name) == pytest.approx(parts)
    assert {"1/cos_target", "2/place", "2/nll_content", "2/gradient_norm"} <= entry.logs.keys()


def test_the_model_is_as_it_was(two: Two) -> None:
    before = {name: p.detach().clone() for name, p in two.model.named_parameters()}
    two.trainer(steps=2).run()
    for name, parameter in two.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_memory_that_runs_out_beside_is_met_by_smaller_pieces(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step begins again: what the first trainer had added up is not counted twice."""
    whole = two.trainer(steps=3).run()
    trainer = two.trainer(steps=3)
    beside = trainer.beside[0]
    real, failures = beside._accumulate, [torch.OutOfMemoryError("out of memory")]

    def once(*args: Any) -> dict[str, float]:
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(beside, "_accumulate", once)
    found = trainer.run()
    assert (trainer.micro_batch_size, beside.micro_batch_size) == (0, BATCH // 2)
    for name, weight in whole.weights.items():
        assert torch.allclose(found.weights[name], weight, atol=1e-5)


def timeless(result: TrainingResult) -> list[dict[str, Any]]:
    return [{**vars(entry), "seconds": 0} for entry in result.log]


@pytest.mark.parametrize("k", [1, 3, 4])
def test_after_an_interruption_the_same_bits(two: Two, k: int, tmp_path: Path) -> None:
    settings = {"steps": 6, "save_every": 3, "rna_noise": 0.05}
    whole = two.trainer(**settings).run()
    at = Stage(tmp_path / "state.safetensors", tmp_path / "losses.jsonl", "here")

    def stop(entry: Any) -> None:
        if entry.step + 1 == k:
            raise KeyboardInterrupt

    interrupted = two.trainer(**settings)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(at, stop)
    (saved,) = TrainingState.load(tmp_path / "state.safetensors").beside
    assert saved == (interrupted.beside[0].sight.first_norm, 0)
    assert saved[0]
    resumed = two.trainer(**settings)
    again = resumed.run(at)
    assert resumed.beside[0].sight.first_norm == interrupted.beside[0].sight.first_norm
    assert again.weights.keys() == whole.weights.keys()
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)
    assert timeless(again) == timeless(whole)


def test_cuts_at_different_layers_are_refused(two: Two) -> None:
    """Boundaries above a layer that another objective trains would go stale."""
    _, higher = tiny.cut(two.model, trained=(1, 2), captured=(2,))
    with pytest.raises(AssertionError):
        two._one("cosine-rmu", higher, two.low_stores, beside=two.trainer().beside)
