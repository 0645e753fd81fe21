"""Colours of the page, light and dark. The tests compute their contrast.

Text, and text on heat: at least 4.5 to 1 (WCAG 2.1 AA); lines and dots: at least 3 to 1.
"""

from __future__ import annotations

Theme = dict[str, str]

LIGHT: Theme = {
    "page": "#ffffff",
    "raised": "#f5f7f9",
    "ink": "#17202a",
    "muted": "#55606c",
    "line": "#d5dbe1",
    "frame": "#7d8894",
    "accent": "#0b5c8a",
    "good": "#0a6b47",
    "bad": "#a8321a",
    "warn": "#fdf1d8",
}
DARK: Theme = {
    "page": "#12171d",
    "raised": "#1b222a",
    "ink": "#e9eef3",
    "muted": "#a7b2be",
    "line": "#34404c",
    "frame": "#7b8896",
    "accent": "#7cc4f0",
    "good": "#6fd6a8",
    "bad": "#ff9d85",
    "warn": "#3a2f14",
}
# Told apart by the colour-blind by lightness, and by shape.
SERIES_LIGHT = (
    "#0072b2", "#c44e00", "#00805c", "#a8497f", "#806300", "#5b5bd6", "#5c6670", "#8a2be2",
)  # fmt: skip
SERIES_DARK = (
    "#56b4e9", "#ff9a57", "#3fcf9f", "#f0a3cf", "#e6c229", "#a9a4ff", "#b4bec8", "#d3a4ff",
)  # fmt: skip
# Ends of the heat scale: nothing, and all.
HEAT_LIGHT = ("#f7f1e8", "#5bb898")
HEAT_DARK = ("#2a2522", "#0e6b52")
HEAT_STEPS = 11


def heat(ends: tuple[str, str]) -> list[str]:
    """The scale's colours, from 0 to 1."""
    return [mix(*ends, step / (HEAT_STEPS - 1)) for step in range(HEAT_STEPS)]


def heat_step(share: float | None) -> int | None:
    """The step of a share in [0, 1]; shares beyond count as the nearest."""
    if share is None:
        return None
    return round(min(1.0, max(0.0, share)) * (HEAT_STEPS - 1))


def mix(one: str, other: str, share: float) -> str:
    """A colour between two; 0 is the first."""
    pairs = zip(channels(one), channels(other), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def channels(colour: str) -> tuple[int, int, int]:
    """Red, green and blue, each 0 to 255."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue
