"""Memory: how much was used, and going on with smaller batches when it runs out."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from expunge.errors import ResourceError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def peak_bytes() -> int:
    """Largest resident memory of this process so far, plus the peak of CUDA memory."""
    return _peak_resident() + (
        torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    )


def _peak_resident() -> int:
    # Linux's ru_maxrss starts at the parent's size in a child process; VmHWM is this program's.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def halving_rows(rows: int, work: Callable[[int, int], None], *, what: str, size: int = 0) -> int:
    """Do ``work(low, high)`` over ``rows`` in pieces, halving them when memory runs out.

    Args:
        rows: how many rows there are.
        work: called with a half-open range; must be repeatable for a range that failed.
        what: named in the error.
        size: first size of a piece; 0: all rows.

    Returns:
        The size of pieces that fitted in the end.

    Raises:
        ResourceError: a single row does not fit.
    """
    size, low = min(size or rows, rows), 0
    while low < rows:
        try:
            work(low, min(low + size, rows))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise ResourceError(
                    what=f"Out of memory in {what}, with a single text",
                    got=str(error).splitlines()[0],
                    allowed="a text that fits",
                    fix="lower max_tokens, use dtype bfloat16, or a machine with more memory",
                ) from error
            size = max(1, size // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        low += size
    return size
