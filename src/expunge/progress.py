"""How long work tells how far it is: silently for a library, with bars for the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

Advance = Callable[..., None]


class Progress(Protocol):
    """Told what is going on."""

    def say(self, message: str) -> None:
        """One sentence worth knowing."""

    def phase(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A step of known length. Yields ``advance(amount, note="", total=None)``."""


class Silent:
    """Says nothing."""

    def say(self, message: str) -> None:
        """Ignore the message."""

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Advance]:
        """A step that shows nothing."""
        yield lambda amount, note="", total=None: None


class Bars:
    """Bars with the time left, on a rich console (standard error for the command line)."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, message: str) -> None:
        """Print the message, with no markup read from it: it may hold file names or data."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Advance]:
        """A bar that stays visible once the step is done, with the time it took."""
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with RichProgress(*columns, console=self.console) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda amount, note="", total=None: bar.update(
                task, advance=amount, note=note, total=total
            )


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block takes to those already under ``name``."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
