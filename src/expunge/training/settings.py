"""How one run trains, as the loop takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expunge.objectives.targets import TargetKind
from expunge.training.seen import FirstToken

LrSchedule = Literal["linear", "constant"]


@dataclass(frozen=True)
class TrainingSettings:
    """How one run trains.

    Attributes:
        steps: optimiser steps.
        whole_steps: of the run that these are the beginning of; None: ``steps``.
        lr: AdamW's learning rate, at the first step.
        lr_schedule: ``linear`` lowers it to zero over the whole run, which lets the retain term
            settle; ``constant`` is RMU's.
        batch_size: forget texts, and retain texts, behind one step.
        micro_batch_size: texts that go through the segment together; 0: all of the batch, halved
            when memory runs out. The gradient is accumulated, so the step stays the same.
        weight_decay: AdamW's, 0 by default: decay would move weights that no term asks to move.
        seed: of the batches' order, the targets and the noise.
        target: kind of target direction.
        rna_noise: standard deviation of the noise on the retain reference.
        first_token: whose first token counts. It is the attention sink in many models, with a
            norm far above all others and the same for every text, so steering it away would break
            retain texts as well; by default only the retain term sees it.
        master_weights: keep float32 copies of narrower weights.
        save_every: steps between saved states.
    """

    steps: int
    lr: float
    batch_size: int
    whole_steps: int | None = None
    lr_schedule: LrSchedule = "linear"
    micro_batch_size: int = 0
    weight_decay: float = 0.0
    seed: int = 0
    target: TargetKind = "positive"
    rna_noise: float = 0.0
    first_token: FirstToken = "retain"
    master_weights: bool = True
    save_every: int = 25

    def __post_init__(self) -> None:
        assert self.steps <= self.run_steps, "a beginning is no longer than the whole"

    @property
    def run_steps(self) -> int:
        """Steps of the whole run, over which the rate falls and a trade-off reckons its share."""
        return self.whole_steps or self.steps
