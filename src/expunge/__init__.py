"""expunge: remove a language function from an open-weight causal language model, with evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expunge.version import VERSION

if TYPE_CHECKING:
    from expunge.model.patch import Patch
    from expunge.recipe import Recipe
    from expunge.records import RunRecord, Score
    from expunge.run import run, unlearn

__version__ = VERSION
_HOMES = {
    "Patch": "expunge.model.patch",
    "Recipe": "expunge.recipe",
    "RunRecord": "expunge.records",
    "Score": "expunge.records",
    "run": "expunge.run",
    "unlearn": "expunge.run",
}
__all__ = ["Patch", "Recipe", "RunRecord", "Score", "__version__", "run", "unlearn"]


def __getattr__(name: str) -> Any:
    # `import expunge` stays instant: torch and transformers load with the first name used.
    if name not in _HOMES:
        raise AttributeError(f"module 'expunge' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
