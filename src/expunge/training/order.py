"""Which texts each step reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from expunge.data.tokens import training_batches

# By which rule: a run that was interrupted goes on by no other.
ORDER = "retain batches by rank"


class Batches:
    """Which forget and retain texts each step reads; topics alternate by step.

    Either side goes on epoch after epoch, with a new shuffle for each. Of an epoch's retain
    batches, each stands at a step whose forget texts rank as high in length, so that mostly both
    go through the segment in one pass with little padding.

    Args:
        forget: tokens of each text, topic by topic.
        retain: tokens of each text to keep.
        batch_size: texts of either side in a step.
        seed: of all shuffles.
    """

    def __init__(
        self,
        forget: Sequence[Sequence[int]],
        retain: Sequence[int],
        batch_size: int,
        seed: int,
    ) -> None:
        self._forget = [_Order(lengths, batch_size, seed) for lengths in forget]
        self._retain = _Order(retain, batch_size, seed + 1, beside=self._forget_width)

    def at(self, step: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Of this step (from 0): topic, forget texts of that topic, retain texts, as numbers."""
        topic, number = self._turn(step)
        return topic, self._forget[topic].batch(number), self._retain.batch(step)

    def _turn(self, step: int) -> tuple[int, int]:
        number, topic = divmod(step, len(self._forget))
        return topic, number

    def _forget_width(self, step: int) -> int:
        topic, number = self._turn(step)
        return self._forget[topic].longest(self._forget[topic].batch(number))


class _Order:
    """The batches of one set of texts.

    Args:
        beside: batch's number -> tokens of the longest text that is read beside it; None: nothing.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        beside: Callable[[int], int] | None = None,
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.beside = lengths, batch_size, seed, beside
        self._epochs: dict[int, list[tuple[int, ...]]] = {}

    def batch(self, number: int) -> tuple[int, ...]:
        per_epoch = len(self._epoch(0))
        return self._epoch(number // per_epoch)[number % per_epoch]

    def longest(self, batch: Sequence[int]) -> int:
        return max(self.lengths[index] for index in batch)

    def _epoch(self, epoch: int) -> list[tuple[int, ...]]:
        if epoch not in self._epochs:
            seed = self.seed * 100_003 + epoch
            batches = training_batches(
                len(self.lengths), batch_size=self.batch_size, seed=seed, lengths=self.lengths
            )
            if self.beside is not None:
                batches = self._by_rank(batches, epoch * len(batches), self.beside, Random(seed))
            self._epochs[epoch] = batches
        return self._epochs[epoch]

    def _by_rank(
        self,
        batches: list[tuple[int, ...]],
        first: int,
        beside: Callable[[int], int],
        random: Random,
    ) -> list[tuple[int, ...]]:
        """These batches, numbered from ``first``, the longest where ``beside`` is longest."""
        # Chance decides among places of one width: in their order, an epoch of texts that are all
        # cut at one length would read its retain texts from short to long.
        places = random.sample(range(len(batches)), len(batches))
        places.sort(key=lambda place: beside(first + place))
        ranked = zip(places, sorted(batches, key=self.longest), strict=True)
        return [batch for _, batch in sorted(ranked)]
