"""A model whose activations are known: each token has a Gaussian vector, toxic ones are shifted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.model.structure import Structure

WIDTH, WORDS = 16, 400
PAD = 0


class _Blind(nn.Module):
    """Takes the planted direction out: what follows cannot tell the classes apart."""

    def __init__(self, direction_D: Tensor) -> None:
        super().__init__()
        self.register_buffer("direction_D", direction_D)

    def forward(self, acts_BTD: Tensor) -> Tensor:
        direction_D: Tensor = self.direction_D  # type: ignore[assignment]
        return acts_BTD - (acts_BTD @ direction_D)[..., None] * direction_D


class Planted(nn.Module):
    """Token -> vector, then two layers: 0 passes on, 1 is blind to the planted direction.

    Ids 1 to WORDS are neutral, the next WORDS toxic. The pad's vector is NaN, and so is that of
    FIRST, the id every text begins with: neither must ever count.
    """

    FIRST = 2 * WORDS + 1

    def __init__(self, shift: float, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        direction_D = torch.randn(WIDTH, generator=generator)
        self.direction_D = direction_D / direction_D.norm()
        vectors_VD = torch.randn(self.FIRST + 1, WIDTH, generator=generator)
        # The classes differ along the planted direction alone, by the shift.
        for rows, target in ((slice(1, WORDS + 1), 0.0), (slice(WORDS + 1, self.FIRST), shift)):
            mean_D = vectors_VD[rows].mean(0)
            vectors_VD[rows] += target * self.direction_D - mean_D
        vectors_VD[[PAD, self.FIRST]] = torch.nan
        self.embedding = nn.Embedding.from_pretrained(vectors_VD)
        self.layers = nn.ModuleList([nn.Identity(), _Blind(self.direction_D)])

    def forward(self, input_ids: Tensor, **_given: Any) -> Tensor:
        acts_BTD: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            acts_BTD = layer(acts_BTD)
        return acts_BTD

    def structure(self) -> Structure:
        """As `find_structure` would say it."""
        return Structure(
            backbone=self,
            layers=self.layers,
            layers_name="layers",
            projection="",
            tail=(),
            residual_input=None,
            splits_at_product=False,
            returns_tuple=False,
            final_norm=None,
            head=None,
            hidden_size=WIDTH,
        )


def texts(n: int, *, toxic: bool, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Ids of n texts of 2 to ``longest`` words of one class, after the first token."""
    generator = np.random.default_rng([seed, toxic])
    low = 1 + WORDS * toxic
    return [
        [Planted.FIRST, *generator.integers(low, low + WORDS, size).tolist()]
        for size in generator.integers(2, longest + 1, n)
    ]
