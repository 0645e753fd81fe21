"""A random patch of equal size: its norms, its noise, what it says of itself."""

from __future__ import annotations

import pytest
import torch

from expunge.model.control import randomised
from expunge.model.patch import BaseTensor, Patch


def learned(**metadata: object) -> Patch:
    """Deltas as training leaves them: of low rank, of unlike sizes, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 1, generator=generator), torch.randn(1, 70, generator=generator)
    deltas = {"b": 3e-4 * left @ right, "a": torch.tensor([[2.0, 0.0], [0.0, -1.0]])}
    deltas["zero"] = torch.zeros(3, 2)
    base = {name: BaseTensor.of(torch.ones_like(delta)) for name, delta in deltas.items()}
    return Patch(deltas, base, dict(metadata))


def test_norms_are_equal_tensor_by_tensor() -> None:
    patch = learned()
    control = randomised(patch, seed=3)
    assert control.names == patch.names and control.base == patch.base
    for name, delta in patch.deltas.items():
        assert control.deltas[name].shape == delta.shape
        assert control.deltas[name].norm() == pytest.approx(float(delta.norm()), rel=1e-6)
    assert control.norm() == pytest.approx(patch.norm(), rel=1e-6)
    assert not control.deltas["zero"].any()


def test_nothing_of_what_was_learned_is_left() -> None:
    """Noise is across any delta, up to 1/√n, and has no direction of its own."""
    delta, noise = (p.deltas["b"] for p in (learned(), randomised(learned(), seed=3)))
    cosine = float((delta * noise).sum() / delta.norm() / noise.norm())
    assert abs(cosine) < 4 / delta.numel() ** 0.5
    sizes = torch.linalg.svdvals(delta), torch.linalg.svdvals(noise)
    # The learned one is all in one direction; the noise in forty.
    assert sizes[0][0] > 0.999 * delta.norm() and sizes[1][0] < 0.4 * noise.norm()
    entries = noise / noise.std()
    assert abs(float(entries.mean())) < 0.06 and float(entries.abs().max()) < 5


def test_a_seed_is_one_control() -> None:
    patch = learned()
    first = randomised(patch, seed=1)
    state = torch.get_rng_state()
    assert randomised(patch, seed=1) == first
    assert torch.equal(state, torch.get_rng_state())
    for name in ("a", "b"):
        assert not torch.allclose(randomised(patch, seed=2).deltas[name], first.deltas[name])


def test_it_says_what_it_is() -> None:
    origin = {"function": "knowledge", "base_model": "m", "objective": "npo", "seed": 5}
    control = randomised(learned(**origin), seed=1)
    assert control.metadata == {
        "function": "knowledge",
        "base_model": "m",
        "objective": "random-control",
        "seed": 1,
        "control_of": origin,
    }
    # A sum has no function of its own.
    total = randomised(learned(**origin) + learned(**origin), seed=1)
    assert total.metadata.keys() == {"objective", "seed", "control_of"}
