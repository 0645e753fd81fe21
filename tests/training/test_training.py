"""The loop: a golden curve, the rails that stop a run that cannot have worked, and the step."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from expunge.errors import ResourceError, TrainingError
from expunge.model.boundaries import BoundaryBatch, BoundaryStore
from expunge.model.segment import LOGPROBS, Boundary
from expunge.objectives import Activations, Captured, Loss
from expunge.objectives.misdirection import rmu
from expunge.training import seen
from expunge.training.loop import Stage, TrainingResult
from expunge.training.seen import Sight
from expunge.training.state import TrainingState
from expunge.training.tradeoff import Dials, Fixed, Schedule, rule

# ---- golden

# Weighed loss of each step. A refactor that moves these changed what is computed.
# (Noise gives rerouting a gradient at the first step; without it there is none but rounding.)
GOLDEN: dict[str, list[float]] = {
    "rmu": [2.435909, 2.312842, 2.028788, 1.994601, 1.884664,
            2.086856, 1.844382, 1.923249, 1.728585, 1.819368],
    "adaptive-rmu": [30.67184, 30.6914, 28.33923, 30.17822, 27.8241,
                     36.0629, 28.04433, 30.50932, 28.42117, 28.18169],
    "cosine-rmu": [0.9730706, 0.8964686, 0.7891459, 0.7875925, 0.7446731,
                   0.722864, 0.7473721, 0.7147599, 0.7013962, 0.711853],
    "rerouting": [1.115657, 1.594875, 2.065075, 2.059299, 1.821163,
                  2.244176, 2.017437, 1.687156, 1.883048, 1.775008],
    "npo": [22.88844, 23.18896, 21.52135, 21.98343, 19.80597,
            21.28606, 20.47004, 19.26153, 20.68064, 18.43293],
    "dpo": [9.718643, 10.06828, 9.767252, 9.666269, 9.41503,
            8.904769, 8.823979, 9.053242, 9.173592, 8.324306],
    "graddiff": [4.475374, 4.833088, 4.390903, 4.391634, 3.996686,
                 3.596999, 3.354195, 3.698552, 3.780171, 2.891353],
    "simnpo": [9.025506, 9.368194, 9.09696, 8.983989, 8.763114,
               8.231522, 8.161793, 8.414445, 8.505904, 7.67638],
    "multi-layer-probe": [5.095743, 5.324223, 4.807797, 4.912977, 4.692455,
                          5.042537, 4.946856, 4.738169, 4.645969, 4.501314],
    "multi-layer-probe, unpaired": [0.3279068, 0.4681885, 0.2807375, 0.3690927, 0.2620998,
                                    0.3867105, 0.3609395, 0.2942613, 0.3215479, 0.2429273],
    "single-layer-probe": [4.92819, 5.182508, 4.93068, 4.771745, 4.761222,
                           5.073428, 4.816259, 4.864819, 4.518431, 4.602271],
}  # fmt: skip


@pytest.mark.parametrize("objective", GOLDEN)
def test_golden_loss_curve(objective: str) -> None:
    name, _, unpaired = objective.partition(", ")
    world = tiny.bench_for(name, **({"twins": False} if unpaired else {}))
    trainer = world.trainer(name, steps=10, retain_weight=2.0, rna_noise=0.01)
    assert [entry.loss for entry in trainer.run().log] == pytest.approx(GOLDEN[objective], rel=1e-4)


# ---- rails


@pytest.fixture(scope="module")
def bench() -> tiny.Bench:
    return tiny.bench()


@cache
def bench_for(objective: str) -> tiny.Bench:
    """A bench that fits the objective; runs leave it as it was."""
    return tiny.bench_for(objective)


@pytest.fixture(scope="module")
def narrow() -> tiny.Bench:
    return tiny.bench(dtype=torch.bfloat16)


def test_a_rate_of_zero_cannot_have_worked(bench: tiny.Bench) -> None:
    seen: list[int] = []
    with pytest.raises(TrainingError, match="No trained weight has changed"):
        bench.trainer(lr=0.0).run(on_step=lambda entry: seen.append(entry.step))
    assert seen == []  # said after the first step, not after the last


def test_updates_lost_in_bfloat16_are_noticed(narrow: tiny.Bench) -> None:
    with pytest.raises(TrainingError, match="No trained weight has changed"):
        narrow.trainer(lr=1e-9, master_weights=False).run()


def test_master_weights_add_up_small_updates(narrow: tiny.Bench) -> None:
    """Steps too small for most bfloat16 weights get through with a master copy."""

    def moved(**settings: Any) -> float:
        result = narrow.trainer(lr=1e-4, steps=20, lr_schedule="constant", **settings).run()
        name, weight = next(iter(result.weights.items()))
        return float((weight.float() - narrow.segment.weights[name].detach().float()).norm())

    assert weight_dtypes(narrow.trainer(steps=2).run()) == {torch.bfloat16}
    assert moved(master_weights=True) > 2 * moved(master_weights=False)


def weight_dtypes(result: TrainingResult) -> set[torch.dtype]:
    return {weight.dtype for weight in result.weights.values()}


def test_a_rate_beyond_all_bounds_stops_the_run(bench: tiny.Bench, tmp_path: Path) -> None:
    at = Stage(tmp_path / "state", tmp_path / "losses.jsonl")
    with pytest.raises(TrainingError, match="not finite at step 1"):
        bench.trainer(lr=1e30).run(at)
    kept = TrainingState.load(tmp_path / "state")
    assert kept.step == 1
    assert all(bool(tensor.isfinite().all()) for tensor in kept.weights.values())


def test_a_loss_that_is_nan_stops_the_run_before_the_update(
    bench: tiny.Bench, tmp_path: Path
) -> None:
    calls: list[int] = []

    def breaks(forget: Captured, retain: Captured) -> Loss:
        calls.append(1)
        loss = rmu(forget, retain)
        return replace(loss, forget=loss.forget * math.nan) if len(calls) == 3 else loss

    trainer = bench.trainer()
    trainer.objective = breaks
    with pytest.raises(TrainingError, match="not finite at step 2"):
        trainer.run(Stage(tmp_path / "state", tmp_path / "losses.jsonl"))
    kept = TrainingState.load(tmp_path / "state")
    assert kept.step == 2
    assert all(bool(tensor.isfinite().all()) for tensor in kept.weights.values())
    assert all(bool(tensor.isfinite().all()) for tensor in kept.optimiser.values())
    after_two = bench.trainer()
    after_two.objective = rmu
    with pytest.raises(KeyboardInterrupt):
        after_two.run(Stage(tmp_path / "other", tmp_path / "other.jsonl"), _stop_at(1))
    good = TrainingState.load(tmp_path / "other")
    assert all(torch.equal(good.weights[name], kept.weights[name]) for name in good.weights)


def _stop_at(step: int) -> Any:
    def on_step(entry: Any) -> None:
        if entry.step == step:
            raise KeyboardInterrupt

    return on_step


def test_a_gradient_that_is_not_finite_stops_the_run(bench: tiny.Bench) -> None:
    def breaks(forget: Captured, retain: Captured) -> Loss:
        loss = rmu(forget, retain)
        # sqrt at 0: the value is 0, its gradient is infinite.
        zero = (loss.forget - loss.forget.detach()).sqrt()
        return replace(loss, forget=loss.forget + zero)

    trainer = bench.trainer()
    trainer.objective = breaks
    with pytest.raises(TrainingError, match="not finite at step 0"):
        trainer.run()


def test_a_constant_loss_cannot_have_taught_anything(bench: tiny.Bench) -> None:
    def flat(forget: Captured, retain: Captured) -> Loss:
        loss = rmu(forget, retain)
        return replace(loss, forget=loss.forget - loss.forget.detach(), retain=0 * loss.retain)

    trainer = bench.trainer()
    trainer.objective = flat
    with pytest.raises(TrainingError, match="same at every step"):
        trainer.run()


# ---- memory


def limited(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """More than ``rows`` texts of a side run out of memory; returns the sizes tried of both."""
    tried: list[tuple[int, int]] = []
    real = Sight.forward

    def forward(self: Sight, forget: BoundaryBatch, retain: BoundaryBatch) -> Any:
        tried.append((len(forget.ids_BT), len(retain.ids_BT)))
        if max(tried[-1]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(self, forget, retain)

    monkeypatch.setattr(Sight, "forward", forward)
    return tried


OBJECTIVES = [
    ("rmu", {}),
    ("cosine-rmu", {}),
    ("adaptive-rmu", {"scale": "first-batch"}),
    ("adaptive-rmu", {"scale": "per-sample"}),
    ("npo", {}),
    ("dpo", {"beta": 0.5}),
    ("graddiff", {}),
    ("simnpo", {"beta": 0.5, "gamma": 0.2}),
    ("multi-layer-probe", {}),
]


@pytest.mark.parametrize(("objective", "own"), OBJECTIVES)
def test_out_of_memory_halves_the_texts_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, objective: str, own: dict[str, Any]
) -> None:
    bench = bench_for(objective)
    whole = bench.trainer(objective, objective_settings=own).run()
    tried = limited(1, monkeypatch)
    pieces = bench.trainer(objective, objective_settings=own).run()
    assert tried[:3] == [(4, 4), (2, 2), (1, 1)]
    assert set(tried[2:]) == {(1, 1)}  # the size that fits is kept
    assert pieces.micro_batch_size == 1
    assert whole.micro_batch_size == 0
    assert_close(whole, pieces)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 9])
@pytest.mark.parametrize(("objective", "own"), OBJECTIVES)
def test_accumulation_is_the_whole_batch(
    objective: str, own: dict[str, Any], micro_batch_size: int
) -> None:
    bench = bench_for(objective)
    whole = bench.trainer(objective, objective_settings=own).run()
    pieces = bench.trainer(
        objective, objective_settings=own, micro_batch_size=micro_batch_size
    ).run()
    assert_close(whole, pieces)


@pytest.mark.parametrize(
    ("objective", "rna_noise"),
    [("rmu", 0.0), ("rmu", 0.1), ("npo", 0.0), ("dpo", 0.0), ("multi-layer-probe", 0.1)],
)
def test_one_pass_for_both_sides_is_two(
    monkeypatch: pytest.MonkeyPatch, objective: str, rna_noise: float
) -> None:
    bench = bench_for(objective)
    passes: list[int] = []
    real = bench.segment.forward

    def forward(boundary: Boundary, ids_BT: Any, mask_BT: Any, **given: Any) -> Any:
        passes.append(len(ids_BT))
        return real(boundary, ids_BT, mask_BT, **given)

    monkeypatch.setattr(bench.segment, "forward", forward)
    results = []
    twins = {4} if bench.twins else set()  # a pass of their own
    for share, expected in ((-1.0, {4}), (100.0, {8} | twins)):
        monkeypatch.setattr(seen, "JOINED_PADDING", share)
        passes.clear()
        results.append(bench.trainer(objective, rna_noise=rna_noise).run())
        assert set(passes) == expected
    assert_close(*results)


def assert_close(one: TrainingResult, other: TrainingResult) -> None:
    for name, weight in one.weights.items():
        assert (weight - other.weights[name]).norm() <= 1e-5 * weight.norm()
    for mine, theirs in zip(one.log, other.log, strict=True):
        assert theirs.loss == pytest.approx(mine.loss, rel=1e-5)
        assert theirs.gradient_norm == pytest.approx(mine.gradient_norm, rel=1e-4)
        assert theirs.logs.keys() == mine.logs.keys()
        for name, value in mine.logs.items():
            # A rise over the base is 0 at first, but for the rounding of float32 nats.
            least = 1e-6 if name.startswith("rise_") else 1e-12
            assert theirs.logs[name] == pytest.approx(value, rel=1e-4, abs=least)


def test_a_single_text_that_does_not_fit(
    bench: tiny.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limited(0, monkeypatch)
    with pytest.raises(ResourceError, match="single text at a time"):
        bench.trainer().run()
    assert tried == [(4, 4), (2, 2), (1, 1)]


def test_a_step_is_divided_no_further_than_its_smaller_side(
    bench: tiny.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = BoundaryStore(bench.segment, tiny.texts(1), reference=True)
    one.compute()
    alone = tiny.Bench(bench.model, bench.segment, [one], bench.retain)
    tried = limited(1, monkeypatch)
    with pytest.raises(ResourceError, match="1 forget and 4 retain texts at a time") as caught:
        alone.trainer().run()
    assert "batch_size" in caught.value.fix
    assert tried == [(1, 4)]  # halving the retain texts would change nothing


def test_another_error_is_not_taken_for_memory(bench: tiny.Bench) -> None:
    def breaks(forget: Captured, retain: Captured) -> Loss:
        raise RuntimeError("shapes do not match")

    trainer = bench.trainer()
    trainer.objective = breaks
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.run()


# ---- what a step sees


class Recorder:
    """Stands for an objective and keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Captured, Captured]] = []

    def __call__(self, forget: Captured, retain: Captured) -> Loss:
        self.seen.append((forget, retain))
        return rmu(forget, retain)


ALL = Activations(forget_reference=True)


def record(bench: tiny.Bench, **settings: Any) -> Recorder:
    recorder = Recorder()
    trainer = bench.trainer(**{"needs": ALL, **settings})
    trainer.objective = recorder
    trainer.run()
    return recorder


@pytest.mark.parametrize(
    ("first_token", "forget", "retain"),
    [("retain", False, True), ("both", True, True), ("neither", False, False)],
)
def test_whose_first_token_counts(
    bench: tiny.Bench, first_token: Any, forget: bool, retain: bool
) -> None:
    for f, r in record(bench, first_token=first_token).seen:
        assert bool((f.mask_BT[:, 0] == forget).all())
        assert bool((r.mask_BT[:, 0] == retain).all())
        assert bool(f.mask_BT[:, 1].all() and r.mask_BT[:, 1].all())


def test_references_are_the_original_and_carry_no_gradient(bench: tiny.Bench) -> None:
    first, *_, last = record(bench).seen
    for captured in first:
        # Before the first update nothing has moved.
        moved_BTD = captured.acts[2] - captured.reference[2]
        assert moved_BTD[captured.mask_BT].abs().max() <= 1e-5
    for captured in last:
        assert captured.acts[2].requires_grad and not captured.reference[2].requires_grad
        moved_BTD = captured.acts[2] - captured.reference[2]
        assert moved_BTD[captured.mask_BT].abs().max() > 1e-2


def test_noise_is_on_the_retain_reference_alone_and_new_each_step(bench: tiny.Bench) -> None:
    quiet, noisy = record(bench).seen, record(bench, rna_noise=0.5).seen
    deltas = []
    for (forget, retain), (noisy_forget, noisy_retain) in zip(quiet, noisy, strict=True):
        assert torch.equal(forget.reference[2], noisy_forget.reference[2])
        deltas.append(noisy_retain.reference[2] - retain.reference[2])
        assert float(deltas[-1].std()) == pytest.approx(0.5, rel=0.15)
    assert not torch.allclose(deltas[0][0, 0], deltas[1][0, 0])
    again = record(bench, rna_noise=0.5).seen
    assert all(
        torch.equal(a[1].reference[2], b[1].reference[2]) for a, b in zip(noisy, again, strict=True)
    )


def watch(objective: str, **settings: Any) -> list[tuple[Captured, Captured]]:
    """What an objective itself is given, step after step or piece after piece."""
    seen: list[tuple[Captured, Captured]] = []
    trainer = bench_for(objective).trainer(objective, **settings)
    own = trainer.objective

    def look(forget: Captured, retain: Captured) -> Loss:
        seen.append((forget, retain))
        return own(forget, retain)

    trainer.objective = look
    trainer.run()
    return seen


def test_only_what_is_asked_for_is_given() -> None:
    forget, retain = watch("rmu")[0]
    assert not forget.reference and not forget.directions and not forget.first_norm
    assert retain.reference.keys() == {2}
    assert forget.twin is None and forget.logprobs_BT is None
    for forget, retain in watch("npo"):
        assert forget.twin is None and retain.twin is None
        for one in (forget, retain):
            assert not one.acts and not one.reference and not one.target and not one.directions


def test_log_probabilities_leave_out_the_first_token_whatever_is_set() -> None:
    for forget, retain in watch("dpo", first_token="both"):
        assert forget.twin is not None
        for one in (forget, forget.twin, retain):
            assert not one.mask_BT[:, 0].any() and bool(one.mask_BT[:, 1].all())
            assert one.logprobs_BT is not None and one.logprobs_BT.requires_grad
            assert bool((one.logprobs_BT <= 0).all())
            assert one.reference_logprobs_BT is not None
            assert not one.reference_logprobs_BT.requires_grad


def test_log_probabilities_start_as_the_originals_and_move() -> None:
    (first, *_), *_, (last, *_) = watch("npo")
    for captured, moved in ((first, False), (last, True)):
        assert captured.logprobs_BT is not None and captured.reference_logprobs_BT is not None
        difference = (captured.logprobs_BT - captured.reference_logprobs_BT).abs().max().item()
        assert (difference > 1e-2) == moved and (difference <= 1e-4) != moved


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
def test_twins_stay_beside_their_texts(micro_batch_size: int) -> None:
    """The twin of a row is the text of the same number in the other store."""
    bench = bench_for("dpo")
    assert bench.twins is not None
    seen = iter(watch("dpo", steps=2, micro_batch_size=micro_batch_size))
    batches = bench.trainer("dpo", steps=2).batches
    for step in (0, 1):
        left = list(batches.at(step)[1])
        while left:
            forget, _ = next(seen)
            numbers = [left.pop(0) for _ in forget.mask_BT]
            for captured, store in ((forget, bench.forget[0]), (forget.twin, bench.twins)):
                assert captured is not None and captured.reference_logprobs_BT is not None
                expected = store.batch(numbers).boundary.reference[LOGPROBS].squeeze(-1)
                assert torch.equal(
                    captured.reference_logprobs_BT[:, 1:],
                    expected[:, 1:],
                )
    assert next(seen, None) is None


def test_directions_are_given_with_the_layers_read() -> None:
    for sides in watch("multi-layer-probe"):
        for captured in sides:
            assert captured.directions.keys() == captured.acts.keys() == {1, 2}
            assert captured.reference.keys() == {1, 2}
        forget, retain = sides
        # Twins come with log-probabilities alone, and without the original's.
        assert retain.twin is None and forget.twin is not None and not forget.twin.acts
        assert forget.twin.logprobs_BT is not None and forget.twin.logprobs_BT.requires_grad
        assert forget.twin.reference_logprobs_BT is None
        assert not forget.twin.mask_BT[:, 0].any() and bool(forget.twin.mask_BT[:, 1].all())
        assert forget.logprobs_BT is None and forget.twin.weight == 1


@pytest.mark.parametrize("first_token", ["retain", "both"])
def test_twins_of_pieces_weigh_as_the_whole(first_token: Any) -> None:
    settings = {"steps": 2, "first_token": first_token}
    wholes = watch("multi-layer-probe", **settings)
    pieces = watch("multi-layer-probe", **settings, micro_batch_size=1)
    for step, (whole, _) in enumerate(wholes):
        parts = [forget for forget, _ in pieces[4 * step : 4 * step + 4]]
        assert len({part.twin.weight for part in parts if part.twin}) > 1
        for one in parts:
            assert one.twin is not None and whole.twin is not None
            # A mean over its tokens, weighed by the forget tokens of its piece.
            mine = one.twin.weight * int(one.mask_BT.sum()) / int(one.twin.mask_BT.sum())
            ours = int(whole.mask_BT.sum()) / int(whole.twin.mask_BT.sum())
            assert mine == pytest.approx(ours)


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
def test_the_first_norm_is_of_the_whole_first_batch(
    bench: tiny.Bench, micro_batch_size: int
) -> None:
    whole = record(bench).seen[0][0]
    by_hand = float(whole.reference[2].norm(dim=-1)[whole.mask_BT].mean())
    for forget, _ in record(bench, micro_batch_size=micro_batch_size).seen:
        assert forget.first_norm == {2: pytest.approx(by_hand, rel=1e-6)}


def test_topics_alternate_with_targets_of_their_own() -> None:
    two = tiny.bench(topics=2)
    recorder = Recorder()
    trainer = two.trainer(steps=6, needs=ALL)
    trainer.objective = recorder
    log = trainer.run().log
    assert [entry.topic for entry in log] == [0, 1, 0, 1, 0, 1]
    targets = [forget.target[2] for forget, _ in recorder.seen]
    assert torch.equal(targets[0], targets[2]) and torch.equal(targets[1], targets[3])
    assert not torch.allclose(targets[0], targets[1])
    # Each topic goes through its own texts: an epoch is 2 batches of 4 out of 10 texts.
    for topic in (0, 1):
        used = [trainer.batches.at(step)[1] for step in (topic, topic + 2)]
        assert len(set(used[0] + used[1])) == 8
    first = [two.forget[topic].batch(trainer.batches.at(topic)[1]) for topic in (0, 1)]
    for (forget, _), batch in zip(recorder.seen, first, strict=False):
        assert torch.equal(forget.reference[2], batch.boundary.reference[2])


def test_seeds_decide(bench: tiny.Bench) -> None:
    def train(seed: int) -> torch.Tensor:
        return next(iter(bench.trainer(seed=seed).run().weights.values()))

    assert torch.equal(train(1), train(1))
    assert not torch.allclose(train(1), train(2))


def test_the_rate_falls_linearly_to_zero(bench: tiny.Bench, monkeypatch: Any) -> None:
    rates: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    bench.trainer(steps=4, lr=0.4).run()
    bench.trainer(steps=3, lr=0.4, lr_schedule="constant").run()
    bench.trainer(steps=2, whole_steps=8, lr=0.4).run()
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.4, 0.4, 0.4, 0.4, 0.35])


def test_only_trained_weights_come_back(bench: tiny.Bench) -> None:
    result = bench.trainer(steps=2).run()
    assert sorted(result.weights) == [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ]
    assert all(not weight.requires_grad for weight in result.weights.values())


# ---- trade-off


def test_fixed_weights() -> None:
    fixed = Fixed(5.0)
    assert [fixed.at(step, 4, {}) for step in range(4)] == [Dials(1.0, 5.0)] * 4


def test_exchanged_weights() -> None:
    schedule = Schedule(8.0)
    # Progress 0, 1/8, 2/8, 3/8: step / (2 · 4).
    assert [schedule.at(step, 4, {}) for step in range(4)] == [
        Dials(1.0, 0.0),
        Dials(0.875, 1.0),
        Dials(0.75, 2.0),
        Dials(0.625, 3.0),
    ]


@pytest.mark.parametrize("tradeoff", ["fixed", "schedule"])
def test_the_logged_loss_is_the_weighed_sum(bench: tiny.Bench, tradeoff: Any) -> None:
    log = bench.trainer(steps=4, retain_weight=8.0, tradeoff=tradeoff).run().log
    for entry in log:
        weights = rule(tradeoff, 8.0).at(entry.step, 4, {})
        by_hand = weights.forget * entry.forget + weights.retain * entry.retain
        assert entry.loss == pytest.approx(by_hand, rel=1e-5)
    assert log[-1].retain > 0
