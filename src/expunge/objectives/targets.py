"""Target directions u: the random unit vectors that misdirection steers toward.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TargetKind = Literal["positive", "centered", "per-token"]


@dataclass(frozen=True)
class Targets:
    """One unit vector per topic, or one per token id.

    Attributes:
        kind: ``positive``: uniform in [0, 1)^D, normalised (RMU, arXiv:2403.03218), so all
            directions share the positive orthant; ``centered``: normal, normalised;
            ``per-token``: centered, one for each token id, after TAR's random mapping (repository
            rishub-tamirisa/tamper-resistance). Each objective names its own default. A cosine
            toward a centered vector did not converge on Llama-3-8B in the circuit-breaker ablation
            (arXiv:2406.04313); in our own runs it did, and did better (LOG.md), so cosine-rmu's
            default is centered.
        seed: of the run; each topic and token id has a generator of its own derived from it.
        hidden_size: D.
    """

    kind: TargetKind
    seed: int
    hidden_size: int

    def at(self, topic: int, ids_BT: Tensor) -> Tensor:
        """Unit directions for a batch: D, or BTD for ``per-token``. On the device of ``ids_BT``."""
        if self.kind != "per-token":
            return self._unit(topic).to(ids_BT.device)
        unique, inverse_BT = torch.unique(ids_BT.cpu(), return_inverse=True)
        table_KD = torch.stack([self._unit(1_000_003 + int(token)) for token in unique])
        return table_KD[inverse_BT].to(ids_BT.device)

    def _unit(self, index: int) -> Tensor:
        # On the CPU, so that the direction is the same on every device.
        generator = torch.Generator().manual_seed(self.seed * 2_000_003 + index)
        if self.kind == "positive":
            vector_D = torch.rand(self.hidden_size, generator=generator)
        else:
            vector_D = torch.randn(self.hidden_size, generator=generator)
        unit_D: Tensor = vector_D / vector_D.norm()
        return unit_D
