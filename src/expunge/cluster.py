"""Jobs on a Ray cluster: `expunge compare --ray`, with the extra ``ray``."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expunge.errors import ResourceError

# Seconds that runs under way are given to save their state.
GRACE = 60.0


class RayPool:
    """Does jobs on the Ray cluster that this machine belongs to, or on a local one.

    The cluster is that of the environment variable ``RAY_ADDRESS``; without it, one that runs on
    this machine, or else one that is started here. Its processes import expunge and must see the
    same folders. A process serves one job at a time and takes a core.

    Raises ResourceError where Ray is not installed, or its cluster cannot be reached.
    """

    def __init__(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise ResourceError(
                what="Ray is not installed",
                got=str(error),
                allowed="the extra ray",
                fix="pip install 'expunge[ray]', or leave --ray out",
            ) from error
        self.ray = ray
        self._under_way: dict[Any, Any] = {}
        try:
            if not ray.is_initialized():
                with _own_signals():
                    ray.init(include_dashboard=False, log_to_driver=False)
        except (OSError, RuntimeError, ValueError, TimeoutError) as error:
            raise ResourceError(
                what="The Ray cluster cannot be reached or started",
                got=" ".join(str(error).split())[:300] or type(error).__name__,
                allowed="the address of a running cluster in RAY_ADDRESS, or no RAY_ADDRESS",
                fix="check `ray status`, or leave --ray out",
            ) from error

    def submit(self, do: Callable[[Any], Any], job: Any) -> Future[Any]:
        """Have a job done; a process that dies is an error (BrokenExecutor), not tried again."""
        remote = self.ray.remote(num_cpus=1, max_retries=0)(_in_folder)
        reference = remote.remote(str(Path.cwd()), do, job)
        result: Future[Any] = Future()
        theirs = reference.future()
        self._under_way[theirs] = reference
        theirs.add_done_callback(lambda done: self._pass_on(done, result))
        return result

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; what runs there saves its state and stops."""
        left = list(self._under_way.values())
        for reference in left:
            self.ray.cancel(reference)
        if left and wait:
            self.ray.wait(left, num_returns=len(left), timeout=GRACE)
        self.ray.shutdown()

    def _pass_on(self, done: Future[Any], result: Future[Any]) -> None:
        """Ray's future becomes ours, with errors that callers know."""
        self._under_way.pop(done, None)
        error = done.exception()
        if error is None:
            result.set_result(done.result())
        elif isinstance(error, self.ray.exceptions.RayTaskError):
            result.set_exception(getattr(error, "cause", None) or error)
        elif isinstance(error, self.ray.exceptions.RayError):
            result.set_exception(BrokenExecutor(" ".join(str(error).split())[:300]))
        else:
            result.set_exception(error)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes signals for itself, and would end this process without a word to its runs."""
    kept = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for one, handler in kept.items():
                signal.signal(one, handler)


def _in_folder(folder: str, do: Callable[[Any], Any], job: Any) -> Any:
    """Do a job in the folder of whom it is for: paths in recipes are relative to it."""
    import torch

    os.chdir(folder)
    torch.set_num_threads(1)
    return do(job)
