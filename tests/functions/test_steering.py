"""From probes to directions: which layers, how far to move, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from expunge.errors import DataError, RecipeError
from expunge.objectives import OBJECTIVES, Activations, Logprobs
from expunge.probes.probe import Probe
from expunge.recipe import Recipe
from expunge.steering import LEAST_COSINE, check_layers, directions_for, probed_layers

UNIT_D = torch.tensor([0.6, 0.8])


def probe(layer: int, accuracy: float = 0.9, **fields: Any) -> Probe:
    made = Probe(
        layer=layer,
        kind="lda",
        pooling="token",
        direction_D=UNIT_D,
        difference_D=torch.tensor([4.0, -0.5]),
        bias=-2.0,
        neutral=1.0,
        toxic=3.0,
        spread=0.5 + layer,
        accuracy=accuracy,
        accuracy_low=accuracy - 0.05,
        accuracy_high=accuracy + 0.05,
        auroc=0.9,
        auroc_low=0.8,
        auroc_high=1.0,
        n=100,
        control=0.5,
    )
    return replace(made, **fields)


PROBES = [probe(0, 0.52), probe(1, 0.7), probe(2, 0.95), probe(3, 0.8)]


def recipe(**changes: Any) -> Recipe:
    settings = {"model": "m", "retain": "r", "function": "toxicity", "probe_threshold": 0.6}
    return Recipe.build({**settings, **changes})


def test_a_direction_by_hand() -> None:
    """w = (0.6, 0.8), d = (4, −0.5): w·d = 2, so the move is (2, −0.25) and w·move is 1."""
    found = directions_for(recipe(), "many", [probe(1)])[1]
    assert torch.equal(found.unit_D, UNIT_D)
    assert found.move_D.tolist() == pytest.approx([2, -0.25])
    assert found.gap == pytest.approx(16.25**0.5)
    assert (found.neutral, found.toxic, found.spread, found.weight) == (1, 3, 1.5, 1)


def test_many_layers_or_the_best_one() -> None:
    assert list(directions_for(recipe(), "many", PROBES[::-1])) == [1, 2, 3]
    assert list(directions_for(recipe(), "one", PROBES)) == [2]
    assert list(directions_for(recipe(probe_threshold=0.75), "many", PROBES)) == [2, 3]
    assert list(directions_for(recipe(probe_layers=[3, 1]), "many", PROBES)) == [1, 3]
    assert list(directions_for(recipe(probe_layers=[3, 1]), "one", PROBES)) == [3]


def test_weights_have_mean_one() -> None:
    found = directions_for(recipe(probe_layers=[1, 3], layer_weights=[1, 3]), "many", PROBES)
    assert {layer: one.weight for layer, one in found.items()} == {1: 0.5, 3: 1.5}


def test_weights_stay_with_the_layers_they_were_listed_for() -> None:
    found = directions_for(recipe(probe_layers=[3, 1], layer_weights=[3, 1]), "many", PROBES)
    assert {layer: one.weight for layer, one in found.items()} == {1: 0.5, 3: 1.5}
    again = recipe(probe_layers=[3, 1], layer_weights=[3, 1]).updated(steps=3)
    assert (again.probe_layers, again.layer_weights) == ((1, 3), (1.0, 3.0))


def test_a_range_of_layers() -> None:
    assert recipe(probe_layers="1-3").probe_layers == (1, 2, 3)
    assert recipe(probe_layers=2).probe_layers == (2,)


def test_a_probe_at_chance_is_used_only_on_request() -> None:
    with pytest.raises(DataError, match="at chance"):
        directions_for(recipe(probe_layers=[0]), "many", PROBES)
    allowed = recipe(probe_layers=[0], probe_allow_chance=True)
    assert list(directions_for(allowed, "many", PROBES)) == [0]


@pytest.mark.parametrize("name", ["multi-layer-probe", "npo"])
def test_a_layer_that_would_be_ignored_is_refused(name: str) -> None:
    needs = OBJECTIVES.get(name).extras["needs"]
    with pytest.raises(RecipeError, match="of no use"):
        check_layers(recipe(layer=2), needs, 4)


@pytest.mark.parametrize("weights", [[1.0], [1, 2, 3], [0, 0], [-1, 2]])
def test_weights_that_do_not_fit(weights: list[float]) -> None:
    with pytest.raises(RecipeError, match="layer weights do not fit") as told:
        directions_for(recipe(probe_layers=[1, 3], layer_weights=weights), "many", PROBES)
    assert f"weights {[float(w) for w in weights]} for layers [1, 3]" in told.value.got


def test_a_probe_at_chance_is_refused() -> None:
    with pytest.raises(DataError, match="at chance"):
        directions_for(recipe(probe_layers=[0]), "one", PROBES)
    with pytest.raises(DataError, match="well enough"):
        directions_for(recipe(), "many", PROBES[:1])


@pytest.mark.parametrize("cosine", [LEAST_COSINE / 2, 0.0, -0.5])
def test_a_direction_across_the_difference_is_refused(cosine: float) -> None:
    aside_D = torch.tensor([-0.8, 0.6])
    across_D = 7 * (cosine * UNIT_D + (1 - cosine**2) ** 0.5 * aside_D)
    with pytest.raises(DataError, match="layer 2 points away") as told:
        directions_for(recipe(), "many", [probe(1), probe(2, difference_D=across_D)])
    assert f"{cosine:.3f}" in told.value.got.replace("-0.000", "0.000")
    assert "lda" in told.value.fix
    # Just enough is enough, and moves far.
    enough = 1.01 * LEAST_COSINE
    along_D = enough * UNIT_D + (1 - enough**2) ** 0.5 * aside_D
    found = directions_for(recipe(), "many", [probe(2, difference_D=along_D)])[2]
    assert float(found.move_D.norm()) == pytest.approx(1 / enough, rel=1e-4)


def test_classes_without_a_difference_are_refused() -> None:
    with pytest.raises(DataError, match=r"cosine of 0\.000"):
        directions_for(recipe(), "many", [probe(2, difference_D=torch.zeros(2))])


# ---- before any weight is read


def test_probed_layers() -> None:
    assert probed_layers(recipe(), 3) == (0, 1, 2)
    assert probed_layers(recipe(probe_layers=[2, 0, 2]), 3) == (0, 2)
    with pytest.raises(RecipeError, match="layer 3"):
        probed_layers(recipe(probe_layers=[0, 3]), 3)


@pytest.mark.parametrize(
    ("needs", "changes"),
    [
        (Logprobs(), {"trained_layers": [4]}),
        (Activations(), {"layer": 4}),
        (Activations(), {"layer": 1, "trained_layers": [2]}),
        (Activations(probes="many"), {"probe_layers": [1, 4]}),
        (Activations(probes="many"), {"probe_layers": [1, 2], "trained_layers": [3]}),
        (Activations(probes="one"), {"trained_layers": [-1]}),
    ],
)
def test_layers_that_the_model_lacks(needs: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="layer"):
        check_layers(recipe(**changes), needs, 4)


@pytest.mark.parametrize(
    ("needs", "changes"),
    [
        (Logprobs(), {"trained_layers": [3]}),
        (Logprobs(twin=True), {}),
        (Activations(), {"layer": 3}),
        (Activations(probes="many"), {"probe_layers": [1, 3], "trained_layers": [0, 3]}),
        (Activations(probes="one"), {}),
    ],
)
def test_layers_that_fit(needs: Any, changes: dict[str, Any]) -> None:
    check_layers(recipe(**changes), needs, 4)
