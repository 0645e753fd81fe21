"""Ways to see and to change what a loaded model's forward does, for the time of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn


class _StopForwardError(Exception):
    """Leaves a model's forward once everything wanted has been seen."""


@contextmanager
def stopping() -> Iterator[None]:
    """Swallow the stop raised by a hook inside the block."""
    with suppress(_StopForwardError):
        yield


def stop() -> None:
    """Leave the running forward; to be called from a hook inside `stopping`."""
    raise _StopForwardError


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    """A hook that was registered, removed at the end."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace one module's forward; its attributes stay readable for the model around it."""
    # An own forward may be there already, set by accelerate for example.
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def entered_with(layer: nn.Module, hidden: Callable[[], Tensor]) -> Iterator[None]:
    """A decoder layer that takes ``hidden()`` for its hidden states, whatever it is called with."""

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (hidden(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden()}

    with hooked(layer.register_forward_pre_hook(enter, with_kwargs=True)):
        yield


def entering(args: Any, kwargs: Any) -> Tensor:
    """The hidden states that a decoder layer is called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
