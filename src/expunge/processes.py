"""Processes that work beside this one: how they begin, are stopped, and end.

Each works on one thread. They save what they do and end when they are told to, and when the process
that began them is gone, whatever ended it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.util import Finalize
from typing import Any

import torch

# Seconds for a process to save its state and end.
GRACE = 60
# What a process calls before it ends.
at_end: list[Callable[[], None]] = []

_busy: list[bool] = []
_stopping: list[bool] = []


@contextmanager
def working() -> Iterator[None]:
    """While a process does something that is to be saved before it ends.

    Raises KeyboardInterrupt in a process that was told to stop.
    """
    if _stopping:
        raise KeyboardInterrupt
    _busy.append(True)
    try:
        yield
    finally:
        _busy.clear()


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
        _release()
        os._exit(0)
    raise KeyboardInterrupt
