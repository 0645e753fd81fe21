"""From a page's value to its file: one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import base64
import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from expunge.errors import DataError
from expunge.files import write_text
from expunge.report import palette, plot, shown
from expunge.report.answers import answers
from expunge.report.flips import LISTED
from expunge.report.page import Page
from expunge.version import VERSION

# By this a page is known as one that may be replaced.
GENERATOR = "expunge report"
_TAG = re.compile(r'<meta name="generator" content="' + GENERATOR)
# And by this a figure.
_FIGURE = re.compile(f"<!-- {GENERATOR} figure -->")


def html(page: Page) -> str:
    """The page."""
    made = _environment()
    style = made.get_template("style.css").render()
    digest = base64.b64encode(sha256(style.encode()).digest()).decode()
    return made.get_template("page.html").render(
        page=page, style=made_safe(style), style_hash=digest, version=VERSION
    )


def svg(figure: plot.Plot) -> str:
    """A figure by itself, with its own style."""
    return _environment().get_template("figure.svg").render(plot=figure)


def save_page(page: Page, path: Path, figures: Path | None = None) -> list[Path]:
    """Write the page, and its figures as SVG files if a folder is named; what was written.

    Raises:
        DataError: there is a file of one of the names that expunge did not write.
        ResourceError: a file cannot be written.
    """
    plots = () if figures is None else page.plots
    drawn = {Path(figures or "") / f"{figure.name}.svg": figure for figure in plots}
    check_own(path)
    for place in drawn:
        _check_own(place, _FIGURE, "an earlier figure", "choose another folder for --figures")
    write_text(path, html(page))
    for place, figure in drawn.items():
        write_text(place, svg(figure))
    return [path, *drawn]


def check_own(path: Path) -> None:
    """Refuse to replace anything but a report."""
    _check_own(path, _TAG, "an earlier report", "choose another -o")


def _check_own(path: Path, known_by: re.Pattern[str], earlier: str, fix: str) -> None:
    if not path.exists():
        return
    head = "" if path.is_dir() else path.read_bytes()[:4096].decode("utf-8", "replace")
    if not known_by.search(head):
        raise DataError(
            what="There is something else of that name",
            got=str(path),
            allowed=f"a new name, or that of {earlier}",
            fix=fix,
        )


def made_safe(style: str) -> Any:
    """The style sheet as it is: the package's own text."""
    from markupsafe import Markup

    return Markup(style)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("expunge.report"),
        autoescape=True,
        finalize=_seen,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": shown.percent,
        "number": shown.number,
        "count": shown.count,
        "p_value": shown.p_value,
        "answers": answers,
        "duration": shown.duration,
        "times": shown.times,
        "heat": palette.heat_step,
    }
    made.globals |= {
        "interval": shown.interval,
        "glyph": plot.glyph,
        "palette": palette,
        "gib": 2**30,
        "listed": LISTED,
    }
    return made


def _seen(value: Any) -> Any:
    """Applied to all that a template prints: no text reaches the page with hidden characters."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return shown.visible(value)
    return value
