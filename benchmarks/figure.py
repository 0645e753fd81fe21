"""The README's figure, from the records of a demo.

python benchmarks/figure.py results/demo.json docs/demo.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from expunge.files import replacing

PANELS = {
    "forget_accuracy": "hazard questions: accuracy\n(chance 0.25, lower is better)",
    "retain_accuracy": "benign questions: accuracy\n(higher is better)",
    "forget_nll": "hazard answers: nats/token\n(higher is better)",
    "perplexity": "benign text: perplexity\n(lower is better)",
}
COLOURS = {"base": "#666666", "cosine-rmu": "#c2410c", "oracle": "#0f766e"}
OTHER = "#64748b"


def values(demo: dict[str, Any], row: str, name: str) -> list[float]:
    """A score of the base, the oracle, or an objective's seeds."""
    if row in ("base", "oracle"):
        return [score["value"] for score in demo[row] if score["name"] == name]
    return [
        score["value"]
        for run in demo["runs"][row]
        for score in run["scores"]
        if score["name"] == name and score["model"] == "patched"
    ]


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    demo = json.loads(source.read_text(encoding="utf-8"))
    rows = ["base", *demo["runs"], "oracle"]
    labels = ["base", *demo["runs"], "retrained oracle"]
    # The same bytes for the same numbers.
    mpl.rcParams.update({"svg.hashsalt": "expunge", "font.size": 9, "font.family": "sans-serif"})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 2.9), sharey=True)
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for place, row in enumerate(rows):
            found = values(demo, row, name)
            colour = COLOURS.get(row, OTHER)
            axis.plot(found, [place] * len(found), "o", color=colour, alpha=0.45, markersize=5)
            mean = sum(found) / len(found)
            axis.plot([mean], [place], "|", color=colour, markersize=16, markeredgewidth=2.5)
            axis.annotate(
                f"{mean:.2f}", (mean, place), (0, 7), textcoords="offset points", ha="center"
            )
        if name == "forget_accuracy":
            axis.axvline(0.25, color="#999999", linewidth=0.8, linestyle="--")
        if name.endswith("accuracy"):
            axis.set_xlim(0, 1.1)
        if name == "perplexity":
            axis.set_xlim(1.5, 2.5)
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(rows)), labels)
        axis.set_ylim(len(rows) - 0.5, -0.8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:], metadata={"Date": None}, dpi=130)


if __name__ == "__main__":
    main()
