"""A command in a process of its own that sends itself a signal at a chosen place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

KILLED, STOPPED = -signal.SIGKILL, 130
LOOP = "expunge.training.loop"
# A terminal's width is taken when the console is made, threads when torch is imported.
SET_EARLY = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run_until(
    args: Sequence[str], place: Sequence[str], number: int, when: str, signal_number: int
) -> subprocess.CompletedProcess[str]:
    """Run ``expunge`` with ``args`` until the ``number``-th call of ``place``; 0: to the end.

    ``place`` is a module, a class in it or "", and a function; ``when``: before or after it.
    """
    zygote = _zygote()
    assert zygote.stdin is not None and zygote.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        out.touch()
        err.touch()
        request = {
            "args": list(args),
            "watch": [*place, number, when, int(signal_number)],
            "env": {**os.environ, **SET_EARLY},
            "cwd": str(Path.cwd()),
            "stdout": str(out),
            "stderr": str(err),
        }
        zygote.stdin.write(json.dumps(request) + "\n")
        zygote.stdin.flush()
        code = int(zygote.stdout.readline())
        return subprocess.CompletedProcess(list(args), code, out.read_text(), err.read_text())


@cache
def _zygote() -> subprocess.Popen[str]:
    """Of this test process; it ends with it, when there is nothing more to read."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("zygote.py"))],
        env={**os.environ, **SET_EARLY},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
