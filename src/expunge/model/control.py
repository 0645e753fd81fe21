"""A control for patches: a random change of equal size.

control = randomised(patch, seed=0)   # the same tensors, the same norms, nothing learned
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.model.patch import Patch

CONTROL = "random-control"


def randomised(patch: Patch, seed: int) -> Patch:
    """A patch with Gaussian noise in place of each delta, of the same Frobenius norm.

    Whatever a learned patch does that this one does too comes from the size of the change alone.
    Noise, and not a permutation of the delta's entries: a permutation keeps their distribution, and
    with it some of what was learned where few entries are large. All directions of one length are
    equally likely here.

    Norms are equal tensor by tensor, and nothing else is: a learned delta has few large singular
    values, noise has many alike, so its largest is smaller and it moves activations less.

    Args:
        patch: what the control is for.
        seed: another one gives other noise; the same one the same, tensor by tensor in the order
            of their names.

    Returns:
        A patch of the same base. Its metadata names the objective ``random-control``, the seed,
        and under ``control_of`` what it is a control of.
    """
    generator = torch.Generator().manual_seed(seed)
    deltas = {name: _noise_like(delta, generator) for name, delta in patch.deltas.items()}
    origin = patch.metadata
    metadata = {"objective": CONTROL, "seed": seed, "control_of": origin}
    metadata |= {key: origin[key] for key in origin if key in ("function", "base_model")}
    return Patch(deltas, patch.base, metadata)


def _noise_like(delta: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(delta.shape, generator=generator)
    # Summed in double: millions of squares in float32 would be off in the fourth digit.
    size, length = float(delta.double().norm()), float(noise.double().norm())
    return noise * (size / length) if length else noise
