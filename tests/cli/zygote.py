"""A process that has imported everything, and forks a copy of itself for each command it is told.

To import torch takes longer than most of the commands that tests stop. A copy is as fresh as an
interpreter that has just imported: nothing has begun a thread or a process before it. Copies of
such a process are safe on Linux alone; elsewhere the command is given on the command line, and this
process is it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import expunge.cli
import expunge.preloaded

LONGEST, AFTER = 120, 60  # seconds that a command may take, and those that it leaves behind
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def take_over(request: dict[str, Any]) -> None:
    """Become the process that was asked for: its environment, folder and streams."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        path, flags = request.get(name, os.devnull), os.O_WRONLY if number else os.O_RDONLY
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = ["expunge", *request["args"]]
    signal.alarm(LONGEST)


def watch(module: str, owner: str, name: str, number: int, when: str, signal_number: int) -> None:
    """Send this process a signal at the n-th call of a function, before or after it."""
    place: Any = importlib.import_module(module)
    place = getattr(place, owner) if owner else place
    original, calls = getattr(place, name), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        hit = len(calls) == number
        if hit and when == "before":
            os.kill(os.getpid(), signal_number)
        result = original(*args, **kwargs)
        if hit and when == "after":
            os.kill(os.getpid(), signal_number)
        return result

    setattr(place, name, watched)


def asked() -> dict[str, Any] | None:
    """In a copy, what it is to do; None once there is nothing more to be told."""
    libc = ctypes.CDLL(None)
    # Those that a command leaves behind become this process's children.
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests; this ends with them
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            return dict(json.loads(line))
        _, status = os.waitpid(child, 0)
        outlived = not ended(child)
        print(json.dumps([os.waitstatus_to_exitcode(status), outlived]), flush=True)
    return None


def ended(group: int) -> bool:
    """Wait for all that a command began to end; False: they had to be killed."""

    def kill(*_: Any) -> None:
        killed.append(group)
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)

    killed: list[int] = []
    signal.signal(signal.SIGALRM, kill)
    signal.alarm(AFTER)
    try:
        while True:
            os.waitpid(-group, 0)
    except ChildProcessError:
        return not killed
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


if __name__ == "__main__":
    told = json.loads(Path(sys.argv[1]).read_text()) if sys.argv[1:] else asked()
    if told is not None:
        take_over(told)
        watch(*told["watch"])
        expunge.cli.main()
