"""`tradeoff: search` of an edit: the choice worth most on validation, by looks planted by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from expunge import editing
from expunge.editing import search_edit
from expunge.errors import DataError
from expunge.recipe import Recipe
from expunge.training.watch import Point
from said import Said

# rank -> first_layer -> (forget, retain)
Seen = Mapping[tuple[int, int], tuple[float, float]]
RANKS, LAYERS = (1, 2, 4), (-1, 0)


class Planted:
    """Stands for a bench: an edit's only trace is which settings are applied while it is looked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seen: Seen, bad: Mapping[Any, str]) -> None:
        self.seen, self.bad = seen, bad
        self.now: tuple[int, int] | None = None
        self.made: list[tuple[Any, Any]] = []
        self.progress = Said()
        monkeypatch.setattr(editing, "make_edit", self.make)
        monkeypatch.setattr(editing, "look_at", lambda *_args: self.look)
        monkeypatch.setattr(editing, "kind_of", lambda *_args: "likelihood")
        entry = SimpleNamespace(extras={"choices": {"rank": RANKS, "first_layer": LAYERS}})
        monkeypatch.setattr(editing, "EDITS", SimpleNamespace(get=lambda _name: entry))

    def opened(self, _name: str, _depth: None) -> Any:
        return SimpleNamespace(model=None)

    def make(self, _learning: Any, recipe: Recipe) -> Any:
        own = (recipe.objective_settings["rank"], recipe.objective_settings["first_layer"])
        self.made.append(own)
        if own in self.bad:
            raise DataError(what=self.bad[own], got="little", allowed="more", fix="give more")
        return Made(self, own, {"training": {"settings": {**recipe.objective_settings}}})

    def look(self) -> Point:
        assert self.now is not None, "looked at the base"
        return Point(*self.seen[self.now])


@dataclass(frozen=True)
class Made:
    """What an edit made: while it is applied, the bench knows with which settings."""

    bench: Planted
    own: tuple[int, int]
    metadata: Mapping[str, Any]

    @contextmanager
    def applied(self, _model: Any) -> Iterator[None]:
        self.bench.now = self.own
        yield
        self.bench.now = None


SEEN: Seen = {
    (1, -1): (0.2, 1.0),
    (1, 0): (0.3, 0.95),
    (2, -1): (0.5, 0.96),
    (2, 0): (0.9, 0.85),
    (4, -1): (0.95, 0.5),
    (4, 0): (0.6, 0.94),
}


def found(
    monkeypatch: pytest.MonkeyPatch, seen: Seen = SEEN, bad: Mapping[Any, str] | None = None
) -> tuple[dict[str, Any], Planted]:
    bench = Planted(monkeypatch, seen, bad or {})
    recipe = Recipe.build(
        {
            "model": "m",
            "retain": "r",
            "pairs": "p",
            "function": "toxicity",
            "objective": "profs",
            "objective_settings": {"pairs": 7},
            "tradeoff": "search",
            "retain_floor": 0.9,
        }
    )
    learning: Any = bench
    made = search_edit(learning, recipe)
    return dict(made.metadata["training"]), bench


def test_the_choice_worth_most_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worth by hand, forget · retain above .9: .2, .285, .48, 0, 0, .564."""
    training, bench = found(monkeypatch)
    facts = training["tradeoff"]
    worths = [one["worth"] for one in facts["tried"]]
    assert worths == pytest.approx([0.2, 0.285, 0.48, 0, 0, 0.564])
    assert facts["chosen"] == facts["tried"][5]
    assert facts["chosen"]["settings"] == {"rank": 4, "first_layer": 0}
    # Every combination once, the recipe's other settings with each, all of them looked at.
    assert bench.made == [(rank, layer) for rank in RANKS for layer in LAYERS]
    assert training["settings"] == {"pairs": 7, "rank": 4, "first_layer": 0}
    assert (training["looks"], facts["inner_steps"], facts["kind"]) == (6, 0, "search")
    assert bench.progress.notes == []


def test_below_the_floor_the_largest_area_above_nothing_counts(monkeypatch: Any) -> None:
    seen = {own: (forget, retain - 0.3) for own, (forget, retain) in SEEN.items()}
    facts = found(monkeypatch, seen)[0]["tradeoff"]
    assert {one["worth"] for one in facts["tried"]} == {0.0}
    # .9 · .55 is the largest product.
    assert facts["chosen"]["settings"] == {"rank": 2, "first_layer": 0}


def test_of_equals_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = found(monkeypatch, dict.fromkeys(SEEN, (0.5, 0.95)))[0]["tradeoff"]
    assert facts["chosen"]["settings"] == {"rank": 1, "first_layer": -1}


def test_what_cannot_be_made_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    training, bench = found(monkeypatch, bad={(2, -1): "Too few pairs", (4, 0): "Too wide"})
    facts = training["tradeoff"]
    assert len(facts["tried"]) == training["looks"] == 4
    assert facts["chosen"]["settings"] == {"rank": 1, "first_layer": 0}
    assert len(bench.progress.notes) == 2
    for note, words in zip(bench.progress.notes, ("Too few pairs", "Too wide"), strict=True):
        assert words in note and "little" in note and "left out" in note


def test_an_edit_that_cannot_be_made_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="No pairs"):
        found(monkeypatch, bad=dict.fromkeys(SEEN, "No pairs"))
