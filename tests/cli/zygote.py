"""A process that has imported everything, and forks a copy of itself for each command it is told.

To import torch takes longer than most of the commands that tests stop. A copy is as fresh as an
interpreter that has just imported: nothing has begun a thread or a process before it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import expunge.cli
import expunge.preloaded


def take_over(request: dict[str, Any]) -> None:
    """Become the process that was asked for: its environment, folder and streams."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, (path, flags) in enumerate(
        [
            (os.devnull, os.O_RDONLY),
            (request["stdout"], os.O_WRONLY),
            (request["stderr"], os.O_WRONLY),
        ]
    ):
        os.dup2(os.open(path, flags), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv = ["expunge", *request["args"]]


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
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return dict(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__" and (request := asked()) is not None:
    take_over(request)
    watch(*request["watch"])
    expunge.cli.main()
