"""Edits: baselines without training. Importing the package registers all of them."""

from expunge.edits import banned_words, profs, project_out
from expunge.edits.base import (
    EDITS,
    EditInputs,
    Intervention,
    edit,
    load_intervention,
)

__all__ = [
    "EDITS",
    "EditInputs",
    "Intervention",
    "banned_words",
    "edit",
    "load_intervention",
    "profs",
    "project_out",
]
