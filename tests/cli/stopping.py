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
from typing import Any

KILLED, STOPPED = -signal.SIGKILL, 130
LOOP = "expunge.training.loop"
# A terminal's width is taken when the console is made, threads when torch is imported.
SET_EARLY = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
COMMAND = [sys.executable, str(Path(__file__).with_name("zygote.py"))]


def run_until(
    args: Sequence[str], place: Sequence[str], number: int, when: str, signal_number: int
) -> subprocess.CompletedProcess[str]:
    """Run ``expunge`` with ``args`` until the ``number``-th call of ``place``; 0: to the end.

    On Linux, returns when all that it began has ended too; a minute later that is a failure.

    Args:
        place: a module, a class in it or "", and a function.
        when: before or after it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        streams = {stream: folder / stream for stream in ("stdout", "stderr")}
        for path in streams.values():
            path.touch()
        request = {
            "args": list(args),
            "watch": [*place, number, when, int(signal_number)],
            "env": {**os.environ, **SET_EARLY},
            "cwd": str(Path.cwd()),
            **{stream: str(path) for stream, path in streams.items()},
        }
        code, outlived = _copied(request) if sys.platform == "linux" else _anew(request, folder)
        assert not outlived, "processes of the command outlived it"
        said = {stream: path.read_text() for stream, path in streams.items()}
        return subprocess.CompletedProcess(list(args), code, **said)


def _copied(request: dict[str, Any]) -> tuple[int, bool]:
    zygote = _zygote()
    assert zygote.stdin is not None and zygote.stdout is not None
    try:
        zygote.stdin.write(json.dumps(request) + "\n")
        zygote.stdin.flush()
        code, outlived = json.loads(zygote.stdout.readline())
    except BaseException:
        # What it says next would be of this command, which ends with it.
        zygote.kill()
        zygote.communicate()
        _zygote.cache_clear()
        raise
    assert code != -signal.SIGALRM, "the command took too long"
    return code, outlived


def _anew(request: dict[str, Any], folder: Path) -> tuple[int, bool]:
    told = folder / "request.json"
    told.write_text(json.dumps(request))
    return subprocess.run([*COMMAND, str(told)], env=request["env"], check=False).returncode, False


@cache
def _zygote() -> subprocess.Popen[str]:
    """Of this test process; it ends with it, when there is nothing more to read."""
    return subprocess.Popen(
        COMMAND,
        env={**os.environ, **SET_EARLY},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
