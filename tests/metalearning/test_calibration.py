"""Calibration: the layer whose short run had most to show is read; who decides when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge import miniature, workbench
from expunge.defaults import SHALLOW, default_layer, resolve_layers
from expunge.errors import DataError
from expunge.evaluation.pareto import hypervolume
from expunge.metalearning import calibration
from expunge.metalearning.calibration import Calibration, Tried, calibrate, candidates
from expunge.metalearning.episodes import Episode
from expunge.presets import preset
from expunge.progress import Silent
from expunge.recipe import Recipe
from expunge.training.watch import Point
from expunge.workbench import Workbench


def recipe(files: dict[str, Path], **changes: Any) -> Recipe:
    return Recipe.build(
        {
            "model": str(miniature.base_directory()),
            "forget": str(files["forget.txt"]),
            "retain": str(files["retain.txt"]),
            "objective": "cosine-rmu",
            "reward": "representation",
            "steps": 4,
            "action_every": 2,
            "batch_size": 4,
            "max_texts": 40,
            "max_tokens": 32,
            "look_items": 6,
            "retain_floor": 0.5,
            **changes,
        }
    )


# ---- candidates


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(32, (6, 10, 15, 21)), (28, (5, 9, 13, 19)), (8, (3, 5, 7)), (4, (1, 2, 3)), (1, (0,))],
)
def test_candidates_by_hand(layers: int, expected: tuple[int, ...]) -> None:
    assert candidates(layers) == expected


@given(layers=st.integers(1, 120))
def test_candidates_are_layers_of_the_model(layers: int) -> None:
    found = candidates(layers)
    assert found == tuple(sorted(set(found))) and 0 <= found[0] <= found[-1] < layers
    assert layers > SHALLOW or default_layer(layers) in found


@given(layers=st.integers(1, 60), data=st.data())
def test_candidates_can_be_read_with_the_layers_that_are_trained(layers: int, data: Any) -> None:
    trained = data.draw(st.lists(st.integers(0, layers - 1), min_size=1, max_size=3))
    for layer in candidates(layers, trained):
        assert resolve_layers(layer, trained, layers) == (tuple(trained), layer)


# ---- which layer is taken


class Planted:
    """Stands for `Episodes`: each layer's short run sees what was planted for it."""

    points: dict[int, tuple[float, float]]
    recipes: list[Recipe]
    acted: list[int]
    steps, kind = 6, "representation"

    def __init__(self, _learning: Any, recipe: Recipe) -> None:
        self.recipe = recipe

    def actor(self, number: int) -> Any:
        """The first episode's keeps to the usual values."""
        return number

    def play(self, actor: Any, number: int) -> tuple[Episode, None]:
        self.recipes.append(self.recipe)
        self.acted.append(actor)
        point = Point(*self.points[int(self.recipe.layer)])
        points = {2: Point(0.01, 1.0), 4: point} if point.forget else {}
        reward = hypervolume(points.values(), self.recipe.retain_floor)
        return Episode(number, "usual", 4, (), points, reward), None


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> type[Planted]:
    monkeypatch.setattr(calibration, "Episodes", Planted)
    Planted.recipes, Planted.acted = [], []
    return Planted


LEARNING: Any = SimpleNamespace(
    checkpoint=SimpleNamespace(n_layers=32), progress=Silent(), drop_cuts=lambda: None
)
NONE = (0.0, 1.0)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({6: (0.2, 0.9), 10: (0.6, 0.9), 15: (0.4, 0.9), 21: (0.9, 0.4)}, 10),
        # Of equals the shallowest.
        ({6: (0.2, 0.9), 10: (0.6, 0.9), 15: (0.6, 0.9), 21: (0.6, 0.9)}, 10),
        # All fell through the floor, 0.5: that of largest area above 0.
        ({6: (0.9, 0.1), 10: (0.8, 0.2), 15: (0.8, 0.4), 21: (0.9, 0.3)}, 15),
        # What stayed above the floor goes before all that did not.
        ({6: (0.9, 0.45), 10: (0.9, 0.45), 15: (0.9, 0.45), 21: (0.05, 0.9)}, 21),
        # Nothing to be seen anywhere: the usual layer.
        ({6: NONE, 10: NONE, 15: NONE, 21: NONE}, 7),
    ],
)
def test_the_layer_of_largest_rank_is_taken(
    planted: type[Planted], files: dict[str, Path], points: Any, expected: int
) -> None:
    planted.points = points
    found = calibrate(LEARNING, recipe(files))
    assert found.layer == expected and found.looked_at == "representation"
    assert [one.layer for one in found.tried] == [6, 10, 15, 21]


@pytest.mark.parametrize(("given", "short"), [("auto", 80), (6, 6)])
def test_candidates_are_tried_on_equal_terms(
    planted: type[Planted], files: Any, given: Any, short: int
) -> None:
    """Runs of seed 0, a fifth of the steps long unless set, whatever the recipe's seed and rule."""
    planted.points = dict.fromkeys((6, 10, 15, 21), (0.5, 0.9))
    asked = {"seed": 5, "tradeoff": "schedule", "steps": 400, "episode_steps": given}
    calibrate(LEARNING, recipe(files, action_every="auto", **asked))
    assert len(planted.recipes) == 4
    for one in planted.recipes:
        assert (one.seed, one.tradeoff) == (0, "learned")
        assert (one.steps, one.episode_steps, one.action_every) == (short, short, short // 2)


def test_candidates_are_looked_at_as_often_as_asked(planted: type[Planted], files: Any) -> None:
    planted.points = dict.fromkeys((6, 10, 15, 21), (0.5, 0.9))
    calibrate(LEARNING, recipe(files, steps=400, action_every=3))
    assert {one.action_every for one in planted.recipes} == {3}


def test_rank_by_hand() -> None:
    def tried(layer: int, above: float, worth: float) -> Tried:
        return Tried(layer, {}, above, worth, 0.0)

    ranked = [tried(3, 0.1, 0.2), tried(1, 0.1, 0.2), tried(0, 0.1, 0.3), tried(9, 0.2, 0.2)]
    assert sorted(ranked[::-1], key=lambda one: one.rank) == ranked


def test_on_a_real_model(files: dict[str, Path]) -> None:
    """Each layer of the miniature is tried, and seeds agree on what is taken."""
    bench = Workbench(recipe(files))
    settled, facts = bench.settled(bench.recipe)
    tried = facts["calibration"]["tried"]
    assert [one["layer"] for one in tried] == [3, 5, 7]
    assert all(len(one["points"]) == 2 and one["hypervolume"] > 0 for one in tried)
    best = max(tried, key=lambda one: (one["hypervolume"], one["worth"], -one["layer"]))
    assert settled.layer == facts["calibration"]["layer"] == best["layer"]
    assert settled == bench.recipe.updated(layer=best["layer"])
    # The second time nothing is tried, for another seed neither.
    other, again = bench.settled(bench.recipe.updated(seed=3))
    assert len(bench._calibrations) == 1
    assert (other.layer, other.seed, again) == (best["layer"], 3, facts)


def test_what_other_code_found_is_found_anew(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted run left is loaded, unless texts would now be read in another order."""
    own = recipe(files)
    _, facts = Workbench(own).settled(own, tmp_path)
    path = tmp_path / calibration.CALIBRATION_NAME
    path.write_text(
        path.read_text().replace(f'"layer": {facts["calibration"]["layer"]}', '"layer": 1', 1)
    )
    assert Workbench(own).settled(own, tmp_path)[0].layer == 1
    monkeypatch.setitem(workbench.CODE, "order", "another")
    assert Workbench(own).settled(own, tmp_path)[0].layer == facts["calibration"]["layer"]


def test_weights_rest_on_the_order_of_texts(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(recipe(files, layer=3))
    before = bench.context(bench.recipe)
    assert bench.context(bench.recipe) == before
    monkeypatch.setitem(workbench.CODE, "order", "another")
    assert bench.context(bench.recipe) != before


@pytest.mark.parametrize(("tradeoff", "rests"), [("learned", True), ("fixed", False)])
def test_learned_weights_rest_on_the_knobs_ranges(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tradeoff: str, rests: bool
) -> None:
    bench = Workbench(recipe(files, layer=3, tradeoff=tradeoff))
    before = bench.context(bench.recipe)
    monkeypatch.setattr(workbench, "knob_ranges", lambda _recipe: {"lr": [0.1, 9.0, "log", True]})
    assert (bench.context(bench.recipe) != before) is rests


def test_the_usual_values_are_tried_whatever_a_policy_learned(
    planted: type[Planted], files: dict[str, Path]
) -> None:
    planted.points = dict.fromkeys((6, 10, 15, 21), (0.5, 0.9))
    calibrate(
        LEARNING, recipe(files, tradeoff="learned", policy_from=str(files["forget.txt"].parent))
    )
    assert planted.acted == [0] * 4 and not any(one.policy_from for one in planted.recipes)


def test_with_layers_to_train_deeper_ones_are_tried(files: dict[str, Path]) -> None:
    bench = Workbench(recipe(files, trained_layers=(6,)))
    _, facts = bench.settled(bench.recipe)
    assert [one["layer"] for one in facts["calibration"]["tried"]] == [7]


# ---- who decides


def with_config(bench: Workbench, config: Any) -> Workbench:
    """A bench whose base says it is of another shape."""
    vars(bench)["checkpoint"] = replace(bench.checkpoint, config=dict(config))
    return bench


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Calibration takes layer 5, and says for which recipes it was asked."""
    asked: list[Recipe] = []

    def found(_learning: Any, recipe: Recipe) -> Calibration:
        asked.append(recipe)
        return Calibration(5, "representation", ())

    monkeypatch.setattr(workbench, "calibrate", found)
    return asked


ZEPHYR = preset("mistral-7b")


def test_a_preset_decides_for_a_base_of_its_shape(files: Any, calls: list[Recipe]) -> None:
    bench = with_config(Workbench(recipe(files)), ZEPHYR.config)
    settled, facts = bench.settled(bench.recipe)
    assert facts == {"preset": "mistral-7b"} and not calls
    assert (settled.layer, settled.trained_layers) == (7, (5, 6, 7))
    # The layer alone: rate and weights of the recipe stay.
    assert settled == bench.recipe.updated(layer=7, trained_layers=(5, 6, 7))


def test_trained_layers_that_are_given_stay(files: Any, calls: list[Recipe]) -> None:
    bench = with_config(Workbench(recipe(files, trained_layers=(4, 5))), ZEPHYR.config)
    settled, _ = bench.settled(bench.recipe)
    assert (settled.layer, settled.trained_layers) == (7, (4, 5)) and not calls


def test_a_layer_that_is_given_wins(files: Any, calls: list[Recipe]) -> None:
    for config in (ZEPHYR.config, {"model_type": "unknown"}):
        bench = with_config(Workbench(recipe(files, layer=3)), config)
        assert bench.settled(bench.recipe) == (bench.recipe, {})
    assert not calls


def test_without_a_preset_it_is_calibrated_unless_told_not_to(
    files: Any, calls: list[Recipe]
) -> None:
    bench = Workbench(recipe(files))
    settled, facts = bench.settled(bench.recipe)
    assert settled.layer == 5 and facts["calibration"]["layer"] == 5 and len(calls) == 1
    plain = bench.recipe.updated(calibrate=False)
    assert bench.settled(plain) == (plain, {}) and len(calls) == 1


def test_a_preset_wins_over_calibrate_false(files: Any, calls: list[Recipe]) -> None:
    bench = with_config(Workbench(recipe(files, calibrate=False)), ZEPHYR.config)
    assert bench.settled(bench.recipe)[0].layer == 7


@pytest.mark.parametrize("objective", ["npo", "multi-layer-probe"])
def test_an_objective_that_reads_no_single_layer_is_left_alone(
    files: Any, calls: list[Recipe], objective: str
) -> None:
    bench = Workbench(recipe(files, objective=objective))
    assert bench.settled(bench.recipe) == (bench.recipe, {}) and not calls


def test_nothing_to_look_at_leaves_the_usual_layer_and_says_so(
    files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def found(_learning: Any, _recipe: Recipe) -> Calibration:
        asked.append(1)
        raise DataError(what="There is nothing to look at", got="nothing", allowed="", fix="")

    said: list[str] = []
    monkeypatch.setattr(workbench, "calibrate", found)
    bench = Workbench(recipe(files))
    monkeypatch.setattr(bench.progress, "say", said.append)
    for _ in range(2):
        assert bench.settled(bench.recipe) == (bench.recipe, {})
    told = [text for text in said if "the usual layer" in text]
    assert asked == [1]
    assert told == ["note: the usual layer is read: There is nothing to look at (nothing)"]
