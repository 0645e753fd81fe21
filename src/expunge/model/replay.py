"""Forwards that are made again and again while only upper layers change: the lower ones once.

What enters the first layer that may change is kept in RAM of every forward, by ids, mask,
positions, and the forwards before it that filled its key-value cache, whose rows an equal prompt
is taken to hand on alike. A forward that comes again takes it from there, and the layers below are
passed through. The same bits, for what is left out would be computed as it was. Keys and values of
the layers below, which nothing reads then, are stood in for by zeros of width 1: masks are made
from their length.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from expunge.model.hooks import entered_with, entering, forward_as, hooked
from expunge.model.structure import Structure

T = TypeVar("T")

# What of a model's call decides what enters a layer, beside weights and cache.
INPUTS = ("input_ids", "attention_mask", "position_ids")


class _UnseenError(Exception):
    """A forward that was not recorded, after others that were replayed without their cache."""


class Replay:
    """What enters one layer of a model, for the forwards that some measurement makes.

    Args:
        model: a Hugging Face causal LM; it is called by keyword.
        structure: of the same model.
        first: the lowest layer (0-based, ≥ 1) that may change. The other weights belong to the
            record, which is made anew after torch has counted a write to one of them.
        limit_bytes: what may be kept; a measurement that needs more is made in full, always.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, first: int, *, limit_bytes: int
    ) -> None:
        self.model, self.structure, self.first = model, structure, first
        self.limit_bytes = limit_bytes
        self._entered: dict[bytes, Tensor] = {}
        self._key = b""
        self._written = -1
        self._gives_up = False
        may_change = {id(p) for layer in structure.layers[first:] for p in layer.parameters()}
        self._fixed = [p for p in structure.backbone.parameters() if id(p) not in may_change]

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(tensor.nbytes for tensor in self._entered.values())

    def through(self, measure: Callable[[], T]) -> T:
        """What ``measure``, which runs the model without gradient, gives."""
        if self._entered and self._written == self._writes():
            try:
                with self._replaying():
                    return measure()
            except _UnseenError:
                # Other batches than before, for want of memory: what is kept is no help then.
                self._give_up()
        if self._gives_up:
            return measure()
        self.clear()
        self._written = self._writes()
        try:
            with self._recording():
                return measure()
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Drop what is kept; the next measurement is recorded again."""
        self._entered = {}

    def _writes(self) -> int:
        """How often the weights that stay were written to, as torch counts it."""
        return sum(parameter._version for parameter in self._fixed)

    def _give_up(self) -> None:
        self._gives_up = True
        self.clear()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        def see(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._gives_up:
                self._entered[self._key] = entering(args, kwargs).to("cpu", copy=True)
                if self.nbytes > self.limit_bytes:
                    self._give_up()

        layer = self.structure.layers[self.first]
        with self._keyed(), hooked(layer.register_forward_pre_hook(see, with_kwargs=True)):
            yield

    @contextmanager
    def _replaying(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._keyed())
            for index in range(self.first):
                stack.enter_context(forward_as(self.structure.layers[index], self._passing(index)))
            layer = self.structure.layers[self.first]
            stack.enter_context(entered_with(layer, self._recorded))
            yield

    def _recorded(self) -> Tensor:
        try:
            # A copy, also on a CPU: a layer may work in place.
            return self._entered[self._key].to(self._fixed[0].device, copy=True)
        except KeyError:
            raise _UnseenError from None

    def _passing(self, index: int) -> Callable[..., Any]:
        """A forward for a layer that is left out; its part of the cache grows as it would."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            acts_BTD = entering(args, kwargs)
            given = (*args, *kwargs.values())  # GPT-2 hands the cache over by position
            cache = next((one for one in given if isinstance(one, Cache)), None)
            if cache is not None:
                batch, tokens, _ = acts_BTD.shape
                nothing = acts_BTD.new_zeros(batch, 1, tokens, 1)
                cache.update(nothing, nothing, index)
            return self.structure.returned(acts_BTD)

        return forward

    @contextmanager
    def _keyed(self) -> Iterator[None]:
        """Know each forward of the model by what it follows from."""
        filled_by: WeakKeyDictionary[Cache, bytes] = WeakKeyDictionary()

        def see(_module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            digest = hashlib.sha256(b"" if cache is None else filled_by.get(cache, b""))
            for name in INPUTS:
                tensor: Tensor | None = kwargs.get(name)
                if tensor is not None:
                    digest.update(f"{name} {list(tensor.shape)} ".encode())
                    digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._key = digest.digest()
            if cache is not None:
                filled_by[cache] = self._key

        with hooked(self.model.register_forward_pre_hook(see, with_kwargs=True)):
            yield
