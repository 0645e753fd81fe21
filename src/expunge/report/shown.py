"""Text as it may be shown. What a model says, and any name in a record, is hostile input.

Escaping for HTML is the templates' own; here the characters go that a reader would not see but a
browser would obey: controls, and the format characters that turn the direction of text around.
"""

from __future__ import annotations

import unicodedata
from typing import Any

# Longest text of one field on a page, in characters.
LONGEST = 1500
# Beyond it nothing that was measured lies, and the arithmetic of axes overflows.
LARGEST = 1e100
# Cc and Cf: controls, directions, zero widths. Cs: half a surrogate pair, which no file can hold.
# Co and Cn: no agreed look. Zl and Zp: line ends that nobody sees.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Marks that may sit on one letter; more are a tower that covers other lines.
MARKS = 3


def visible(text: str, longest: int = LONGEST) -> str:
    """``text`` with every character that cannot be seen written as ``⟨U+202E⟩``.

    Line ends and tabs stay; what is longer than ``longest`` is cut, and said so.
    """
    found: list[str] = []
    marks = 0
    for character in text[:longest]:
        kind = unicodedata.category(character)
        marks = marks + 1 if kind.startswith("M") else 0
        hidden = kind in HIDDEN and character not in "\n\t"
        found.append(f"⟨U+{ord(character):04X}⟩" if hidden or marks > MARKS else character)
    left = len(text) - longest
    return "".join(found) + (f" … ({left} more characters)" if left > 0 else "")


def finite(value: Any) -> float | None:
    """``value`` if it is a number that can be drawn or printed, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= LARGEST else None


def percent(value: float | None) -> str:
    """A share as a number of per cent with one decimal; a dash where there is none."""
    return "—" if value is None else f"{100 * value:.1f}"


def interval(low: float | None, high: float | None) -> str:
    """``[93.1, 99.0]`` in per cent; nothing where there is no interval."""
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; a dash where there is none."""
    if value is None:
        return "—"
    return f"{value:.{digits}f}" if abs(value) < 10_000 else f"{value:.3g}"


def count(n: int | None) -> str:
    """``9,600``; a dash where nothing was counted."""
    return "—" if n is None else f"{n:,}"


def p_value(p: float | None) -> str:
    """A p with three decimals; one that would round to 0 is told as smaller than that."""
    return "< 0.001" if p is not None and p < 0.001 else number(p)


def duration(seconds: float | None) -> str:
    """``12 s``, ``3.4 min`` or ``5.6 h``."""
    if seconds is None:
        return "—"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def times(n: int, one: str, several: str | None = None) -> str:
    """``1 seed``, ``5 seeds``."""
    return f"{n:,} {one if n == 1 else several or one + 's'}"
