"""Boundaries of a set of texts, computed once and shared by every step, epoch, seed and repeat.

Everything is stored without padding, text after text, in one array for each kind of activation: in
RAM up to a limit, else in a memory-mapped file. Texts go through the prefix in fixed groups of
similar length, so a text's boundary does not depend on the batches it is later used in, and a
resumed run reads the same bits.

Shapes: N stored tokens, B batch, T tokens, I projection input, D hidden size.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from expunge.errors import ResourceError
from expunge.files import disk_errors
from expunge.model.memory import halving_rows
from expunge.model.segment import Boundary, Segment

# Tokens that go through the prefix together: enough to keep matrix products busy.
GROUP_TOKENS = {"cpu": 2048, "cuda": 16384}
# The process number that follows tells whether such a folder is still in use.
SPILL_PREFIX = ".expunge-boundaries-"

Storage = Literal["ram", "file"]


@dataclass(frozen=True)
class BoundaryBatch:
    """One padded batch: its boundary, token ids and mask, on the segment's device."""

    boundary: Boundary
    ids_BT: Tensor
    mask_BT: Tensor

    @property
    def size(self) -> int:
        """Tokens, padding included."""
        return self.ids_BT.numel()


def joined(one: BoundaryBatch, other: BoundaryBatch) -> BoundaryBatch:
    """The rows of both, padded to one width; the references are left out."""
    width = max(one.ids_BT.shape[1], other.ids_BT.shape[1])

    def stack(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([_widened(a, width), _widened(b, width)])

    a, b = one.boundary, other.boundary
    residual_BTD = None
    if a.residual_BTD is not None and b.residual_BTD is not None:
        residual_BTD = stack(a.residual_BTD, b.residual_BTD)
    return BoundaryBatch(
        Boundary(stack(a.input_BTI, b.input_BTI), residual_BTD, {}),
        stack(one.ids_BT, other.ids_BT),
        stack(one.mask_BT, other.mask_BT),
    )


def _widened(tensor: Tensor, width: int) -> Tensor:
    """Zeros on the right, up to ``width`` tokens."""
    missing = width - tensor.shape[1]
    if not missing:
        return tensor
    zeros = tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])
    return torch.cat([tensor, zeros], dim=1)


def length_groups(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Places of ``lengths``, sorted by length and parted into groups.

    A group, padded to its longest, holds at most ``tokens`` tokens, or a single text.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Sorted by length: the newcomer is the longest of its group.
        if not groups or (len(groups[-1]) + 1) * lengths[index] > tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


class BoundaryStore:
    """The boundaries of some texts at one cut.

    Args:
        segment: the cut model; must hold its original weights until `compute` has run.
        texts: token ids of each text, unpadded.
        reference: also store the original activations of the captured layers.
        limit_bytes: how much RAM the store may take; a larger one goes to a file.
        spill_directory: where that file is made; it is removed when the store is closed.
        announce: called with a sentence when the store goes to a file.
    """

    def __init__(
        self,
        segment: Segment,
        texts: Sequence[Sequence[int]],
        *,
        reference: bool,
        limit_bytes: int | None = None,
        spill_directory: Path | None = None,
        announce: Callable[[str], None] = lambda _message: None,
    ) -> None:
        self.segment = segment
        self.texts = [torch.tensor(list(ids), dtype=torch.long) for ids in texts]
        self.reference = reference
        self.limit_bytes, self.spill_directory = limit_bytes, spill_directory
        self.announce = announce
        self.starts = [0, *accumulate(self.lengths)]
        self.storage: Storage = "ram"
        self._arrays: list[Tensor] = []
        self._template: Boundary | None = None
        self._computed = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(ids) for ids in self.texts]

    @property
    def n_tokens(self) -> int:
        """Stored tokens."""
        return self.starts[-1]

    @property
    def computed(self) -> bool:
        """Whether `compute` has run."""
        return self._computed

    @property
    def nbytes(self) -> int:
        """Bytes that the stored activations take; 0 before `compute`."""
        return sum(array.nbytes for array in self._arrays)

    @property
    def expected_bytes(self) -> int:
        """Bytes that `compute` will take; of log-probabilities in a narrow type slightly more."""
        width = self.segment.boundary_width(reference=self.reference)
        size = next(iter(self.segment.weights.values())).element_size()
        return self.n_tokens * width * size

    def compute(self, on_progress: Callable[[int], None] = lambda _tokens: None) -> None:
        """Run the prefix over all texts; a second call does nothing.

        Args:
            on_progress: called with the number of tokens just done.
        """
        if self._computed:
            return
        fitting = 0  # tokens of a piece that fitted where a larger one did not; 0: all fitted
        for group in self.groups():
            width = len(self.texts[group[-1]])  # the longest
            first = max(1, fitting // width) if fitting else len(group)
            work = partial(self._compute_some, group, on_progress)
            size = halving_rows(len(group), work, what="the prefix", size=first)
            if size < min(first, len(group)):
                fitting = size * width
        self._computed = True

    def add_reference(self) -> None:
        """Store the original activations too: what lacks them is dropped, for `compute`."""
        if not self.reference:
            self.close()
            self.reference = True

    def batch(self, indices: Sequence[int]) -> BoundaryBatch:
        """The padded batch of these texts (right padding), on the segment's device."""
        assert self._computed and self._template is not None, "compute() comes before batch()"
        device = self.segment.device
        spans = [slice(self.starts[i], self.starts[i + 1]) for i in indices]
        padded = [
            pad_sequence([array[span] for span in spans], batch_first=True).to(device)
            for array in self._arrays
        ]
        return BoundaryBatch(self._template.with_tensors(padded), *self._tokens(indices))

    def close(self) -> None:
        """Forget the stored activations and remove their file."""
        self._arrays, self._template, self._computed = [], None, False
        self.storage = "ram"
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def groups(self) -> list[list[int]]:
        """Indices of all texts, in the groups that go through the prefix together."""
        budget = GROUP_TOKENS.get(self.segment.device.type, GROUP_TOKENS["cuda"])
        return length_groups(self.lengths, budget)

    def _tokens(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        texts = [self.texts[i] for i in indices]
        ids_BT = pad_sequence(texts, batch_first=True)
        lengths_B = torch.tensor([len(ids) for ids in texts])
        mask_BT = torch.arange(ids_BT.shape[1])[None, :] < lengths_B[:, None]
        return ids_BT.to(self.segment.device), mask_BT.to(self.segment.device)

    def _compute_some(
        self, group: Sequence[int], on_progress: Callable[[int], None], low: int, high: int
    ) -> None:
        indices = group[low:high]
        ids_BT, mask_BT = self._tokens(indices)
        boundary = self.segment.boundary(ids_BT, mask_BT, reference=self.reference)
        tensors = boundary.tensors()
        if not self._arrays:
            self._allocate(tensors)
            # A copy: a view of nothing would keep all of the group.
            self._template = boundary.map(lambda tensor: tensor[:0].clone())
        for row, index in enumerate(indices):
            length = len(self.texts[index])
            for array, tensor_BTX in zip(self._arrays, tensors, strict=True):
                span = slice(self.starts[index], self.starts[index + 1])
                array[span] = tensor_BTX[row, :length].to("cpu")
        on_progress(int(mask_BT.sum()))

    def _allocate(self, tensors: Sequence[Tensor]) -> None:
        shapes = [(self.n_tokens, tensor.shape[-1]) for tensor in tensors]
        total = sum(
            n * width * t.element_size() for (n, width), t in zip(shapes, tensors, strict=True)
        )
        if self.limit_bytes is None or total <= self.limit_bytes:
            self._arrays = [
                torch.empty(shape, dtype=tensor.dtype)
                for shape, tensor in zip(shapes, tensors, strict=True)
            ]
            return
        self.storage = "file"
        self.announce(
            f"boundary activations take {total / 2**30:.2f} GiB, above the limit of "
            f"{self.limit_bytes / 2**30:.2f} GiB: they go to a memory-mapped file"
        )
        if self.spill_directory is not None:
            self.spill_directory.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(
            prefix=f"{SPILL_PREFIX}{os.getpid()}-", dir=self.spill_directory
        )
        folder = Path(self._folder.name)
        self._check_room(folder, total)
        self._arrays = [
            self._mapped(folder / str(i), shape, tensor.dtype)
            for i, (shape, tensor) in enumerate(zip(shapes, tensors, strict=True))
        ]

    @staticmethod
    def _mapped(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        with disk_errors(path):
            flat = torch.from_file(str(path), shared=True, size=shape[0] * shape[1], dtype=dtype)
        return flat.view(shape)

    @staticmethod
    def _check_room(folder: Path, needed: int) -> None:
        # A mapped file is sparse: without this check a full disk would end in a bus error.
        import shutil

        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ResourceError(
                what="The disk is too full for the boundary activations",
                got=f"{free / 2**30:.2f} GiB free under the run's folder",
                allowed=f"at least {needed / 2**30:.2f} GiB",
                fix="raise cache_gib if there is RAM, use fewer or shorter texts, or another -o",
            )
