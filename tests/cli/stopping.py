"""A command in a process of its own that sends itself a signal at a chosen place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

KILLED, STOPPED = -signal.SIGKILL, 130
LOOP = "expunge.training.loop"

# Sends a signal at the n-th call of a function, before or after it did its work.
CHILD = """
import importlib, os, sys
module, owner, name, number, when, signal_number = sys.argv[1:7]
sys.argv = ["expunge", *sys.argv[7:]]
place = importlib.import_module(module)
place = getattr(place, owner) if owner else place
original, calls = getattr(place, name), []

def watched(*args, **kwargs):
    calls.append(1)
    hit = len(calls) == int(number)
    if hit and when == "before":
        os.kill(os.getpid(), int(signal_number))
    result = original(*args, **kwargs)
    if hit and when == "after":
        os.kill(os.getpid(), int(signal_number))
    return result

setattr(place, name, watched)
from expunge.cli import main
main()
"""


def run_until(
    args: Sequence[str], place: Sequence[str], number: int, when: str, signal_number: int
) -> subprocess.CompletedProcess[str]:
    """Run ``expunge`` with ``args`` until the ``number``-th call of ``place``; 0: to the end.

    ``place`` is a module, a class in it or "", and a function; ``when``: before or after it.
    """
    command = [sys.executable, "-c", CHILD, *place, str(number), when, str(int(signal_number))]
    return subprocess.run(
        [*command, *args],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
