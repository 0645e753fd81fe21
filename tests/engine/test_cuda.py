"""The engine on a GPU does what it does on the CPU."""

from __future__ import annotations

import pytest
import torch

from expunge.training.seen import Sight
from tiny import bench

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_same_matrices_as_on_the_cpu(name: str) -> None:
    on_cpu = bench(name).trainer("cosine-rmu").run().weights
    on_gpu = bench(name, device="cuda").trainer("cosine-rmu").run().weights
    for key, weight in on_cpu.items():
        assert (on_gpu[key].cpu() - weight).norm() <= 1e-3 * weight.norm()


def test_bfloat16_with_masters_learns() -> None:
    world = bench(dtype=torch.bfloat16, device="cuda")
    log = world.trainer("cosine-rmu", steps=20).run().log
    assert log[-1].loss < log[0].loss


def test_out_of_memory_halves_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    world = bench(device="cuda")
    forward = Sight.forward

    def limited(self, forget, retain):
        if len(forget.ids_BT) > 2:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return forward(self, forget, retain)

    monkeypatch.setattr(Sight, "forward", limited)
    result = world.trainer("rmu").run()
    assert result.micro_batch_size == 2
