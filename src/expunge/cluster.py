"""Jobs on a Ray cluster: `expunge compare --ray`, with the extra ``ray``."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from expunge.errors import ResourceError


class RayPool:
    """Does jobs on the Ray cluster that this machine belongs to, or on a local one.

    The cluster is that of the environment variable ``RAY_ADDRESS``; without it, one is started
    here. Its processes import expunge and must see the same folders. A process serves one job at a
    time and takes a core.

    Raises ResourceError where Ray is not installed.
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
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)

    def submit(self, do: Callable[[Any], Any], job: Any) -> Future[Any]:
        """Have a job done; a process that dies is an error, not tried again."""
        remote = self.ray.remote(num_cpus=1, max_retries=0)(_one_thread)
        future: Future[Any] = remote.remote(do, job).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; what runs there is stopped."""
        self.ray.shutdown()


def _one_thread(do: Callable[[Any], Any], job: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    return do(job)
