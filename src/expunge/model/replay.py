"""Forwards that are made again and again while only upper layers change: the lower ones once.

What enters the first layer that may change is kept of every forward, under all that it follows
from: ids, mask, positions, and the forwards before it that its key-value cache holds. A forward
that comes again takes it from there, and the layers below are passed through. The same bits, for
what is left out would be computed as it was. Keys and values of the layers below, which nothing
reads then, are stood in for by zeros of width 1: masks are made from their length.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

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
        first: the lowest layer (0-based) that may change; the weights below belong to the record,
            which is made anew when they were written to.
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
        self._gives_up = first == 0
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        below = [*structure.layers[:first], embeddings]
        self._below = [parameter for module in below for parameter in module.parameters()]

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(tensor.nbytes for tensor in self._entered.values())

    def through(self, measure: Callable[[], T]) -> T:
        """What ``measure``, which runs the model without gradient, gives."""
        if self._gives_up:
            return measure()
        if self._entered and self._written == self._writes():
            try:
                with self._replaying():
                    return measure()
            except _UnseenError:
                # Other batches than before, for want of memory: what is kept is no help then.
                self._give_up()
                return measure()
        self._entered, self._written = {}, self._writes()
        with self._recording():
            return measure()

    def _writes(self) -> int:
        """How often the weights below were written to, as torch counts it."""
        return sum(parameter._version for parameter in self._below)

    def _give_up(self) -> None:
        self._gives_up, self._entered = True, {}

    @contextmanager
    def _recording(self) -> Iterator[None]:
        def see(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._gives_up:
                self._entered[self._key] = entering(args, kwargs)
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
            return self._entered[self._key]
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
            return (acts_BTD,) if self.structure.returns_tuple else acts_BTD

        return forward

    @contextmanager
    def _keyed(self) -> Iterator[None]:
        """Know each forward of the model by what it follows from."""

        def see(_module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            goes_on = cache is not None and cache.get_seq_length() > 0
            digest = hashlib.sha256(self._key if goes_on else b"")
            for name in INPUTS:
                tensor: Tensor | None = kwargs.get(name)
                if tensor is not None:
                    digest.update(f"{name} {list(tensor.shape)} ".encode())
                    digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._key = digest.digest()

        with hooked(self.model.register_forward_pre_hook(see, with_kwargs=True)):
            yield
