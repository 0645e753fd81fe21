"""Records made by hand, and a page as a tree."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from expunge.records import RunRecord, Sample, Score, Values
from expunge.report.page import Page

N = 20
VOID = {"meta", "link", "br", "hr", "img", "input"}


def record(
    method: str = "cosine-rmu", function: str = "knowledge", seed: int = 0, **changes: Any
) -> RunRecord:
    """A finished run: the base knows all, the patched model half of it, seeds differ a little."""
    right = {"base": N, "patched": N // 4 + 1 + seed, "oracle": N // 4}
    kept = {"base": N, "patched": N - 1 - seed % 2, "oracle": N}
    scores, values = [], []
    for name, shares in (("forget_accuracy", right), ("retain_accuracy", kept)):
        for model, n in shares.items():
            common: dict[str, Any] = {"name": name, "model": model, "split": "test"}
            low, high = max(0.0, n / N - 0.1), min(1.0, n / N + 0.1)
            scores.append(
                Score(
                    **common,
                    value=n / N,
                    ci_low=low,
                    ci_high=high,
                    n=N,
                    higher_is="worse",
                    chance=0.25,
                )
            )
            values.append(Values(**common, values=[float(at < n) for at in range(N)]))
    steps = list(range(5))
    fields: dict[str, Any] = {
        "function": function,
        "objective": method,
        "seed": seed,
        "timing": {"train": 3.0, "evaluate": 2.0},
        "peak_memory_bytes": 2**30,
        "provenance": {
            "recipe": {"function": function, "objective": method, "seed": seed, "model": "base"},
            "data": {"forget.txt": "ab" * 32},
            "packages": {"expunge": "0.1.0"},
            "commit": "c" * 40,
        },
        "scores": scores,
        "values": values,
        "asked": {
            "forget": [f"Question: what is {at}?\nAnswer:" for at in range(N)],
            "retain": [f"what stays {at}?" for at in range(N)],
        },
        "samples": [
            Sample("openings", "Ben says", {"base": "rude words", "patched": "polite words"},
                   {"base": ["tfidf"], "patched": []}),
        ],
        "training": {
            "curve": {
                "step": steps,
                "loss": [5.0, 4.0, 3.5, 3.2, 3.0],
                "forget": [4.0, 3.0, 2.0, 1.0, 0.5],
                "retain": [0.1, 0.2, 0.3, 0.3, 0.2],
                "gradient_norm": [1.0, 2.0, 1.0, 1.0, 1.0],
                "logs": {},
                "knobs": {"lr": [0.01, 0.02, 0.02, 0.01, 0.01]},
                "points": [[2, 0.4, 0.99], [5, 0.8, 0.97]],
            },
            "probe_accuracy": {"before": [[0, 0.6], [1, 0.98]], "after": [[0, 0.6], [1, 0.55]]},
            "last": {"step": 4},
            "split_reads": {"validation": 2, "test": 1},
        },
    }  # fmt: skip
    return RunRecord(**{**fields, **changes})


def matrix() -> list[RunRecord]:
    """Two methods on two functions, three seeds each."""
    return [
        record(method, function, seed)
        for function in ("knowledge", "toxicity")
        for method in ("cosine-rmu", "multi-layer-probe")
        for seed in range(3)
    ]


@dataclass
class Node:
    """An element: its attributes, its own text, what is in it."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Node] = field(default_factory=list)

    def all(self, *tags: str) -> list[Node]:
        """Elements of these kinds, in order."""
        found = [self] if self.tag in tags else []
        return found + [node for child in self.children for node in child.all(*tags)]

    @property
    def words(self) -> str:
        """All text in it."""
        return self.text + " ".join(child.words for child in self.children)


class Tree(HTMLParser):
    """A page as a tree; complains of elements that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root], f"left open: {[node.tag for node in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


@dataclass
class Made:
    """A page, its text and its tree."""

    page: Page
    text: str
    root: Node

    def section(self, name: str) -> Node:
        """The section of that anchor."""
        (found,) = [n for n in self.root.all("section") if n.attributes.get("id") == name]
        return found

    def has(self, name: str) -> bool:
        """Whether there is such a section."""
        return any(n.attributes.get("id") == name for n in self.root.all("section"))
