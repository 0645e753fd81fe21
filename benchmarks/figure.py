"""The README's figure, from the record of a demo.

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

# (part, score, scorer's kind) -> what the axis says
PANELS = {
    ("knowledge", "forget_accuracy", None): "hazard questions: accuracy\n(chance 0.25)",
    ("knowledge", "retain_accuracy", None): "benign questions: accuracy\n(higher is better)",
    ("knowledge", "perplexity", None): "benign text: perplexity\n(lower is better)",
    ("toxicity", "toxicity_rate", "words"): "rude continuations, by words\n(lower is better)",
    ("toxicity", "toxicity_rate", "tfidf"): "rude continuations, by TF-IDF\n(lower is better)",
    ("toxicity", "neutral_nll", None): "polite wording: nats/token\n(lower is better)",
}
COLOURS = {"base": "#666666", "cosine-rmu": "#c2410c", "oracle": "#0f766e"}
COLOURS |= {"multi-layer-probe": "#1d4ed8", "knowledge + toxicity": "#7e22ce"}
OTHER = "#64748b"
ROWS = ("cosine-rmu", "rmu", "adaptive-rmu", "multi-layer-probe", "knowledge + toxicity")


def values(part: dict[str, Any], row: str, name: str, scorer: str | None) -> list[float]:
    """A score of the base, the oracle, or a kind of run's seeds; empty if it was not measured.

    Of several sets of prompts the first counts.
    """

    def first(scores: list[dict[str, Any]], model: str) -> list[float]:
        return [
            score["value"]
            for score in scores
            if (score["name"], score["model"]) == (name, model)
            and (scorer is None or str(score["scorer"]).startswith(scorer))
        ][:1]

    if row in ("base", "oracle"):
        return first(part[row], row)
    return [one for run in part["runs"].get(row, []) for one in first(run["scores"], "patched")]


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    demo = json.loads(source.read_text(encoding="utf-8"))
    rows = ["base", *ROWS, "oracle"]
    labels = ["base", *ROWS, "retrained oracle"]
    # The same bytes for the same numbers.
    mpl.rcParams.update({"svg.hashsalt": "expunge", "font.size": 9, "font.family": "sans-serif"})
    figure, axes = plt.subplots(2, 3, figsize=(10, 6.2), sharey=True)
    for axis, ((part, name, scorer), title) in zip(axes.flat, PANELS.items(), strict=True):
        for place, row in enumerate(rows):
            found = values(demo[part], row, name, scorer)
            if not found:
                continue
            colour = COLOURS.get(row, OTHER)
            axis.plot(found, [place] * len(found), "o", color=colour, alpha=0.45, markersize=5)
            mean = sum(found) / len(found)
            axis.plot([mean], [place], "|", color=colour, markersize=14, markeredgewidth=2.5)
            axis.annotate(
                f"{mean:.2f}", (mean, place), (0, 7), textcoords="offset points", ha="center"
            )
        if name == "forget_accuracy":
            axis.axvline(0.25, color="#999999", linewidth=0.8, linestyle="--")
        if name.endswith("accuracy"):
            axis.set_xlim(0, 1.08)
        elif name == "toxicity_rate":
            axis.set_xlim(-0.04, 0.6)
        elif name == "perplexity":
            axis.set_xlim(1.5, 2.5)
        else:
            axis.set_xlim(0.2, 0.34)
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(rows)), labels)
        axis.set_ylim(len(rows) - 0.5, -0.8)
        axis.grid(axis="x", color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:], metadata={"Date": None}, dpi=130)


if __name__ == "__main__":
    main()
