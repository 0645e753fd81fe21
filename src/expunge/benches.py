"""The benches that a process keeps, so that the next run of one model and data set finds its own.

What a bench has opened and stored is dropped when others are worked on, and when the process ends.
"""

from __future__ import annotations

from expunge.processes import at_end
from expunge.recipe import Recipe
from expunge.workbench import Workbench

# One for each function of a batch; what a bench holds is a model and some boundaries.
MOST = 2

_kept: dict[str, Workbench] = {}


def kept_bench(recipe: Recipe) -> Workbench:
    """This process's bench for a recipe: one that was used lately, or a new one."""
    key = recipe.bench_key
    bench = _kept.pop(key, None) or Workbench(recipe)
    for other in _kept.values():
        other.drop_boundaries()  # the most of what a bench holds
    _kept[key] = bench  # the last in the order is the latest used
    while len(_kept) > MOST:
        _kept.pop(next(iter(_kept)))
    return bench


def release() -> None:
    """Remove the files that benches have made."""
    for bench in _kept.values():
        bench.drop_boundaries()


at_end.append(release)
