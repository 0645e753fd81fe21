"""Processes that work beside this one: how they begin, are stopped, and end.

Each works on one thread. They save what they do and end when they are told to, and when the process
that began them is gone, whatever ended it. Errors of theirs that are told to users travel back.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from expunge import errors
from expunge.errors import ExpungeError, RecipeError, ResourceError

Given = ParamSpec("Given")
Result = TypeVar("Result")
# Seconds for a process to save its state and end.
GRACE = 60
# What a process calls before it ends.
at_end: list[Callable[[], None]] = []

_busy: list[bool] = []
_stopping: list[bool] = []


@contextmanager
def working() -> Iterator[None]:
    """While a process does something that is to be saved before it ends.

    A process that was told to stop meanwhile ends here. Raises KeyboardInterrupt in one that was
    told before.
    """
    if _stopping:
        raise KeyboardInterrupt
    _busy.append(True)
    try:
        yield
    finally:
        _busy.clear()
        if _stopping:
            # Nobody waits for what it found. Back at the queue it might wait forever itself: one
            # that was stopped while it waited there has the queue's lock for good.
            _end()


@contextmanager
def one_thread(really: bool = True) -> Iterator[None]:
    """Work as the processes of a pool do, beside them or to the same bits; or ``really`` not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if really else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def process_pool(count: int) -> ProcessPoolExecutor:
    """Processes for work of a thread each, that end with this one, whatever ends it.

    On Linux they are copies of one that has imported all and done nothing, so that they share it;
    it keeps the environment variables of its start. Elsewhere copies are not safe with the
    system's own libraries.
    """
    context: Any = multiprocessing.get_context("spawn")
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["expunge.preloaded"])
    return ProcessPoolExecutor(count, mp_context=context, initializer=prepare_process)


class Stoppable(Protocol):
    """What has others work: an executor of `concurrent.futures`, or what looks like one."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Start no more."""


def stop_processes(pool: Stoppable, others: Collection[BaseProcess]) -> None:
    """End a pool's processes: what is under way is saved, what waits never starts.

    Args:
        others: children of this process that do not belong to the pool.
    """
    pool.shutdown(wait=False, cancel_futures=True)
    processes = {*multiprocessing.active_children()}.difference(others)
    for process in processes:
        process.terminate()
    try:
        latest = time.monotonic() + GRACE
        for process in processes:
            process.join(max(0.0, latest - time.monotonic()))
    finally:  # a second Ctrl-C waits no longer
        # One that died while it sent a result leaves the others waiting for it forever.
        for process in processes:
            if process.is_alive():
                process.kill()


@dataclass(frozen=True)
class Failure:
    """An error on its way to the parent: one with keyword arguments does not travel by itself."""

    kind: str
    parts: dict[str, str]

    @property
    def error(self) -> ExpungeError:
        """The error again."""
        made: ExpungeError = getattr(errors, self.kind)(**self.parts)
        return made


def attempt(
    do: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs
) -> Result | Failure:
    """What a process was asked to do, or how that failed."""
    try:
        with working():
            return do(*args, **kwargs)
    except ExpungeError as error:
        parts = {name: getattr(error, name) for name in ("what", "got", "allowed", "fix")}
        return Failure(type(error).__name__, parts)


def check_importable() -> None:
    """Raise RecipeError in a process that is being begun and imports a script that does work."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RecipeError(
            what="This script was imported by a process that it asked for, and would begin again",
            got="work outside of `if __name__ == '__main__':`",
            allowed="a script that does nothing when it is imported",
            fix="put its work under `if __name__ == '__main__':`, or ask for one process",
        )


def killed_error(what: str, memory: str, got: str = "") -> ResourceError:
    """The error of a process that ended without a word, as when the system runs out of memory.

    Args:
        what: it did, as in "did some of the runs".
        memory: what there must be room for.
        got: what is known of its end.
    """
    return ResourceError(
        what=f"A process that {what} was killed",
        got=got or "it ended without a word, as when the system runs out of memory",
        allowed=f"memory for {memory}",
        fix="the same command goes on where it stopped; free some memory or use fewer workers",
    )


def prepare_process() -> None:
    """Make a fresh process one of several that do jobs."""
    # The processes are the parallelism; more threads than cores make each of them wait.
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes of a terminal; here the parent decides, and says so by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    # A parent that is killed cannot say so: without it, jobs would go on and processes stay.
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # These processes end without what Python does at the end of others.
    Finalize(None, _release, exitpriority=0)


def _release() -> None:
    for release in at_end:
        release()


def _end_with(parent: Any) -> None:
    """End this process when its parent is gone.

    What it does is stopped and saved before, but on Windows, where it is cut short.
    """
    parent.join()
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        latest = time.monotonic() + GRACE
        while _busy and time.monotonic() < latest:
            time.sleep(0.1)
    if not _busy:
        _release()
    # Idle, it would wait for its next job forever: it holds both ends of the queue itself.
    os._exit(1)


def _interrupt(_signal: int, _frame: Any) -> None:
    # Once is enough: a second one, as when another process of the pool is gone, must not break
    # into the saving of a state. What was queued for this process never starts.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _stopping.append(True)
    if not _busy:
        _end()
    raise KeyboardInterrupt


def _end() -> None:
    _release()
    os._exit(0)
