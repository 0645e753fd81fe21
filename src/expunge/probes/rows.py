"""Which texts are held out, and which rows of a pass are kept: a bounded number, drawn beforehand.

Since lengths are known, rows are drawn before the pass instead of by a reservoir during it: as
uniform, and independent of the order and the groups in which texts come.

Shapes: B texts of a group, T tokens, D hidden size, S kept rows, K kept rows of one group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Cut:
    """Places of texts within their class, in an order that only content and seed decide.

    Each is an array over classes: neutral first, then toxic.
    """

    train: tuple[Places, Places]
    held: tuple[Places, Places]


def cut(
    neutral: Sequence[Sequence[int]],
    toxic: Sequence[Sequence[int]],
    *,
    paired: bool,
    share: float,
    seed: int,
) -> Cut:
    """Hold out a share of each class by a hash of the content.

    Equal texts stay together; so do, when ``paired``, the two wordings of each pair, and all pairs
    of one toxic wording. At least one distinct text is on each side where there are two.
    """
    if paired:
        pairs = _cut(toxic, share, seed)
        return Cut((pairs[0], pairs[0]), (pairs[1], pairs[1]))
    sides = [_cut(texts, share, seed) for texts in (neutral, toxic)]
    return Cut((sides[0][0], sides[1][0]), (sides[0][1], sides[1][1]))


def distinct(texts: Sequence[Sequence[int]]) -> int:
    """How many different texts there are."""
    return len({tuple(ids) for ids in texts})


def _cut(texts: Sequence[Sequence[int]], share: float, seed: int) -> tuple[Places, Places]:
    salt = f"{seed}\0".encode()
    keys = [
        blake2b(salt + np.asarray(ids, np.int64).tobytes(), digest_size=16).digest()
        for ids in texts
    ]
    ranked = sorted(set(keys))
    held = set(ranked[: max(1, min(round(len(ranked) * share), len(ranked) - 1))])
    order = sorted(range(len(texts)), key=lambda place: (keys[place], place))
    return (
        np.array([place for place in order if keys[place] not in held], np.int64),
        np.array([place for place in order if keys[place] in held], np.int64),
    )


@dataclass(frozen=True)
class Draw:
    """Rows to keep, sorted by text: whole texts (``tokens_S`` None) or tokens of texts."""

    texts_S: Places
    tokens_S: Places | None

    @property
    def distinct_texts(self) -> Places:
        """The texts that the rows come from, ascending."""
        return np.unique(self.texts_S)


def whole(texts: Places) -> Draw:
    """One row for each of these texts."""
    return Draw(np.sort(texts), None)


def tokens(
    texts: Sequence[Places], lengths: Places, rows: int, generator: np.random.Generator
) -> Draw:
    """Up to ``rows`` tokens of each class's texts, uniformly among those that are not a first one.

    Args:
        texts: for each class, its texts.
        lengths: of all texts, first token included.
        rows: most tokens of a class.
        generator: decides.
    """
    found = []
    for own in texts:
        ends = np.cumsum(lengths[own] - 1)
        size = int(min(rows, ends[-1]))
        drawn = np.sort(generator.choice(int(ends[-1]), size, replace=False, shuffle=False))
        at = np.searchsorted(ends, drawn, side="right")
        # Counted from the text's end, so that its first token is never reached.
        found.append(np.stack([own[at], lengths[own][at] - (ends[at] - drawn)], 1))
    both = np.concatenate(found)
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    return Draw(both[:, 0], both[:, 1])


class Kept:
    """The rows of a draw, filled group by group; float32, on the CPU.

    Takes layers × rows × D × 4 bytes, however many texts pass.
    """

    def __init__(self, draw: Draw, layers: Sequence[int], width: int) -> None:
        self.draw = draw
        self.rows = {layer: torch.empty(len(draw.texts_S), width) for layer in layers}
        self._slots_K = self._owners_K = np.zeros(0, np.int64)

    def turn_to(self, indices: Sequence[int]) -> None:
        """Look up which rows of the group of texts ``indices`` are wanted."""
        low_B = np.searchsorted(self.draw.texts_S, indices, side="left")
        count_B = np.searchsorted(self.draw.texts_S, indices, side="right") - low_B
        before_B = np.cumsum(count_B) - count_B
        self._owners_K = np.repeat(np.arange(len(indices)), count_B)
        self._slots_K = np.arange(count_B.sum()) + np.repeat(low_B - before_B, count_B)

    def take(self, layer: int, acts_BTD: Tensor, means_BD: Tensor) -> None:
        """Keep the wanted rows of a layer: of the texts' means, or of their tokens."""
        if not len(self._slots_K):
            return
        owners_K = torch.from_numpy(self._owners_K).to(acts_BTD.device)
        if self.draw.tokens_S is None:
            rows_KD = means_BD[owners_K]
        else:
            places_K = torch.from_numpy(self.draw.tokens_S[self._slots_K]).to(acts_BTD.device)
            rows_KD = acts_BTD[owners_K, places_K]
        self.rows[layer][torch.from_numpy(self._slots_K)] = rows_KD.float().cpu()


class Sums:
    """Weighted sums over all texts' token sums, one row for each group of weights; float64."""

    def __init__(
        self, weights: Mapping[str, NDArray[np.float64]], layers: Sequence[int], width: int
    ) -> None:
        self.names = list(weights)
        self._weights_GN = torch.from_numpy(np.stack(list(weights.values())))
        self._totals = {
            layer: torch.zeros(len(weights), width, dtype=torch.float64) for layer in layers
        }

    def add(self, layer: int, indices: Sequence[int], sums_BD: Tensor) -> None:
        """Add a group's token sums."""
        weights_GB = self._weights_GN[:, list(indices)]
        self._totals[layer] += weights_GB @ sums_BD.cpu().double()

    def of(self, layer: int, name: str) -> NDArray[np.float64]:
        """The weighted sum D of a layer under one group of weights."""
        total: NDArray[np.float64] = self._totals[layer][self.names.index(name)].numpy()
        return total
