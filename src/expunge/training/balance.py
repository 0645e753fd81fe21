"""Gradients of several losses brought to one size, so that their units do not decide.

AdamW is indifferent to the scale of a loss, so the scale of an objective that was tuned alone says
nothing. In a plain sum the loss with the larger numbers would take all: on the miniature the
probes' gradient is 300 times the cosine's at the first step.

Each loss's gradient is divided by the root mean square of its norms so far, its own the last: what
AdamW would do to it alone, for all matrices together. Source: our own; of the family of GradNorm
(arXiv:1711.02257), without its learned weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from expunge.training.log import StepLog

NORM = "gradient_norm"


class Balance:
    """The norms of each loss's gradient so far.

    Attributes:
        steps: counted.
        squares: of each loss, the sum of its squared norms.
    """

    def __init__(self, losses: int) -> None:
        self.steps, self.squares = 0, [0.0] * losses

    def add_up(
        self, gradients: Sequence[Mapping[str, Tensor]], norms: Sequence[float]
    ) -> dict[str, Tensor]:
        """The sum of all losses' gradients at one size; counts the step.

        Args:
            gradients: of each loss, weight's name -> gradient; one may lack a weight.
            norms: of each loss, over all weights together.
        """
        self._count(norms)
        total: dict[str, Tensor] = {}
        for square, found in zip(self.squares, gradients, strict=True):
            size = math.sqrt(square / self.steps)
            for name, gradient in found.items() if size else ():
                scaled = gradient / size
                total[name] = total[name] + scaled if name in total else scaled
        return total

    def resume(self, log: Sequence[StepLog]) -> None:
        """Take up what an interrupted run had counted."""
        for entry in log:
            self._count([entry.logs[f"{n}/{NORM}"] for n in range(1, len(self.squares) + 1)])

    def _count(self, norms: Sequence[float]) -> None:
        self.steps += 1
        self.squares = [a + norm * norm for a, norm in zip(self.squares, norms, strict=True)]


@torch.no_grad()
def take_gradients(weights: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The gradients of the weights, which have none afterwards."""
    found = {name: p.grad for name, p in weights.items() if p.grad is not None}
    for parameter in weights.values():
        parameter.grad = None
    return found
