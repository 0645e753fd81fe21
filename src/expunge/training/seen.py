"""What an objective sees of a step: texts by their numbers, run through the segment.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.model.boundaries import BoundaryBatch, BoundaryStore, joined
from expunge.model.segment import LOGPROBS, Segment
from expunge.objectives.base import Activations, Captured, Direction, Logprobs, Needs
from expunge.objectives.retain import add_noise
from expunge.objectives.targets import Targets

# Forget and retain texts go through the segment in one pass, which keeps its products larger,
# unless padding them to one width would add more than this share of tokens.
JOINED_PADDING = 0.1

FirstToken = Literal["retain", "both", "neither"]


@dataclass
class Sight:
    """Turns texts' numbers into what an objective sees.

    Attributes:
        segment: the cut model.
        forget: one computed store for each topic.
        retain: a computed store that holds the reference.
        needs: what the objective is given; forget stores must hold references that it asks for.
        targets: target directions.
        first_token: whose first token counts.
        rna_noise: standard deviation of the noise on the retain reference.
        twins: a computed store of the forget texts' other wordings, index by index, for an
            objective that asks for them.
        directions: layer -> what its probe found.
        first_norm: layer -> mean norm of the original activations of the first forget batch.
    """

    segment: Segment
    forget: Sequence[BoundaryStore]
    retain: BoundaryStore
    needs: Needs
    targets: Targets
    first_token: FirstToken
    rna_noise: float
    twins: BoundaryStore | None = None
    directions: Mapping[int, Direction] = field(default_factory=dict)
    first_norm: dict[int, float] = field(default_factory=dict)

    def of(
        self,
        topic: int,
        forget: Sequence[int],
        retain: Sequence[int],
        noise: torch.Generator,
        *,
        whole: Sequence[int] = (),
    ) -> tuple[Captured, Captured]:
        """These forget texts of a topic, and these retain texts, with gradient.

        ``whole``: all forget texts of the step, where these are a piece of them.
        """
        forget_batch, retain_batch = self.forget[topic].batch(forget), self.retain.batch(retain)
        forget_acts, retain_acts = self.forward(forget_batch, retain_batch)
        return (
            self._forget(topic, forget, forget_batch, forget_acts, whole or forget),
            self._retain(retain_batch, retain_acts, noise),
        )

    def count(self, topic: int | None, indices: Sequence[int]) -> int:
        """Tokens that count in these texts of a topic, or with None of the retain texts."""
        store, role = (self.retain, "retain") if topic is None else (self.forget[topic], "forget")
        return sum(len(store.texts[i]) - self._drops_first(role) for i in indices)

    def forget_share(self, captured: Captured, topic: int, whole: Sequence[int]) -> float:
        """How much a piece of a forget batch weighs in the mean over the whole of it."""
        if isinstance(self.needs, Logprobs):
            return len(captured.mask_BT) / len(whole)
        return int(captured.mask_BT.sum()) / self.count(topic, whole)

    def remember_norms(self, topic: int, indices: Sequence[int]) -> None:
        """Set ``first_norm``: the mean over all counted tokens of a forget batch."""
        if isinstance(self.needs, Logprobs) or not self.needs.forget_reference:
            return
        sums: dict[int, float] = {}
        # Text by text: the batch need not fit on the device at once.
        for index in indices:
            batch = self.forget[topic].batch([index])
            mask_BT = self._mask(batch, "forget")
            for layer, h0_BTD in batch.boundary.reference.items():
                norm = float(h0_BTD.float().norm(dim=-1)[mask_BT].sum())
                sums[layer] = sums.get(layer, 0.0) + norm
        count = self.count(topic, indices)
        self.first_norm = {layer: total / count for layer, total in sums.items()}

    def forward(
        self, forget: BoundaryBatch, retain: BoundaryBatch
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Activations of both batches, layer -> BTD each, with gradient."""
        both = [forget, retain]
        rows = [len(batch.ids_BT) for batch in both]
        widths = [batch.ids_BT.shape[1] for batch in both]
        if sum(rows) * max(widths) > (1 + JOINED_PADDING) * (forget.size + retain.size):
            apart = [self.segment.forward(b.boundary, b.ids_BT, b.mask_BT) for b in both]
            return apart[0], apart[1]
        batch = joined(forget, retain)
        acts = self.segment.forward(batch.boundary, batch.ids_BT, batch.mask_BT)
        parts = {layer: torch.split(h_BTD, rows) for layer, h_BTD in acts.items()}
        forget_acts, retain_acts = (
            {layer: part[side][:, : widths[side]] for layer, part in parts.items()}
            for side in (0, 1)
        )
        return forget_acts, retain_acts

    def _forget(
        self,
        topic: int,
        indices: Sequence[int],
        batch: BoundaryBatch,
        acts: dict[int, Tensor],
        whole: Sequence[int],
    ) -> Captured:
        # A store may hold more than is asked for: it is shared with other objectives.
        reference = dict(batch.boundary.reference) if self.needs.forget_reference else {}
        more: dict[str, Any] = {}
        if self.twins is not None:
            more["twin"] = self._twin(indices, self._twin_weight(topic, indices, whole))
        if isinstance(self.needs, Activations):
            target = self.targets.at(topic, batch.ids_BT)
            more |= {"target": dict.fromkeys(acts, target), "first_norm": self.first_norm}
        return self._captured(acts, reference, self._mask(batch, "forget"), **more)

    def _retain(
        self, batch: BoundaryBatch, acts: dict[int, Tensor], noise: torch.Generator
    ) -> Captured:
        reference = dict(batch.boundary.reference)
        if isinstance(self.needs, Activations):
            reference = add_noise(reference, std=self.rna_noise, generator=noise)
        return self._captured(acts, reference, self._mask(batch, "retain"))

    def _twin(self, indices: Sequence[int], weight: float) -> Captured:
        assert self.twins is not None
        batch = self.twins.batch(indices)
        acts = self.segment.forward(batch.boundary, batch.ids_BT, batch.mask_BT, logprobs=True)
        mask_BT = batch.mask_BT.clone()
        mask_BT[:, 0] = False  # nothing predicts the first token
        reference_BT1 = batch.boundary.reference.get(LOGPROBS)
        return Captured(
            {},
            {},
            mask_BT,
            logprobs_BT=acts[LOGPROBS].squeeze(-1),
            reference_logprobs_BT=None if reference_BT1 is None else reference_BT1.squeeze(-1),
            weight=weight,
        )

    def _twin_weight(self, topic: int, indices: Sequence[int], whole: Sequence[int]) -> float:
        """Share of these among the twins' tokens of the whole, over that of the forget tokens."""
        assert self.twins is not None
        here, all_ = (
            sum(len(self.twins.texts[i]) - 1 for i in some) / self.count(topic, some)
            for some in (indices, whole)
        )
        return here / all_

    def _captured(
        self, acts: dict[int, Tensor], reference: dict[int, Tensor], mask_BT: Tensor, **more: Any
    ) -> Captured:
        if isinstance(self.needs, Activations):
            return Captured(acts, reference, mask_BT, directions=self.directions, **more)
        now_BT, then_BT1 = acts[LOGPROBS].squeeze(-1), reference.get(LOGPROBS)
        then_BT = None if then_BT1 is None else then_BT1.squeeze(-1)
        return Captured({}, {}, mask_BT, logprobs_BT=now_BT, reference_logprobs_BT=then_BT, **more)

    def _drops_first(self, role: str) -> bool:
        if isinstance(self.needs, Logprobs):
            return True  # nothing predicts it
        first = self.first_token
        return first == "neither" or (first == "retain" and role == "forget")

    def _mask(self, batch: BoundaryBatch, role: str) -> Tensor:
        mask_BT = batch.mask_BT.clone()
        if self._drops_first(role):
            mask_BT[:, 0] = False
        return mask_BT


def share(indices: Sequence[int], piece: int, pieces: int) -> Sequence[int]:
    """The piece-th of ``pieces`` nearly equal parts; none is empty when pieces <= len."""
    n = len(indices)
    return indices[piece * n // pieces : (piece + 1) * n // pieces]
