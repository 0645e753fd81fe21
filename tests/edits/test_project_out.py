"""project-out: the shift by hand, where it acts, and the probe that it comes from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_edit_contract import every_architecture, inputs, logits

from expunge.edits.project_out import ProjectOut, project_out
from expunge.errors import DataError, PatchError
from expunge.model.structure import find_structure
from expunge.probes.stream import stream
from tiny import HIDDEN, LAYERS, padded, texts, tiny_model


def last_output(model: Any) -> torch.Tensor:
    """The last layer's output, BTD."""
    seen: list[Any] = []
    layer = find_structure(model).layers[-1]
    handle = layer.register_forward_hook(
        lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    ids_BT, _ = padded(texts(3, seed=9))
    try:
        with torch.no_grad():
            model(input_ids=ids_BT)
    finally:
        handle.remove()
    found: torch.Tensor = seen[0]
    return found


@every_architecture
def test_the_shift_is_alpha_gaps_along_w(architecture: str) -> None:
    model = tiny_model(architecture)
    before_BTD = last_output(model)
    with ProjectOut(LAYERS - 1, torch.eye(HIDDEN)[5], gap=3.0, alpha=0.5).applied(model):
        shift_BTD = before_BTD - last_output(model)
    expected_BTD = torch.zeros_like(shift_BTD)
    expected_BTD[..., 5] = 1.5
    assert torch.allclose(shift_BTD, expected_BTD, atol=1e-5)


def test_alpha_one_lays_the_toxic_mean_on_the_neutral_one() -> None:
    """Along w, over the tokens of the texts that the probe was fitted on, and held-out ones."""
    given = inputs()
    found = project_out(given, allow_chance=True)
    sums, counts = [0.0, 0.0], [0, 0]
    for side, group in enumerate((given.neutral, given.toxic)):
        for part in stream(given.model, given.structure, group, [LAYERS - 1]):
            along_BT = part.acts[LAYERS - 1] @ found.direction_D
            sums[side] += float(along_BT[part.mask_BT].sum())
            counts[side] += int(part.mask_BT.sum())
    gap = sums[1] / counts[1] - sums[0] / counts[0]
    assert gap > 0
    assert found.gap == pytest.approx(gap, rel=0.3)  # four fifths of the same texts
    assert float(found.direction_D.norm()) == pytest.approx(1, abs=1e-5)
    assert found.metadata["probe"]["accuracy"] > 0.5


def test_twice_alpha_is_twice_the_shift() -> None:
    given = inputs()
    one, two = (project_out(given, alpha=a, allow_chance=True) for a in (1.0, 2.0))
    assert torch.equal(one.direction_D, two.direction_D)
    assert (two.alpha, two.gap) == (2.0, one.gap)


def test_it_takes_effect_in_a_narrow_type() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    plain = logits(model)
    with ProjectOut(LAYERS - 1, torch.eye(HIDDEN)[5], gap=3.0, alpha=1.0).applied(model):
        assert logits(model).dtype == torch.bfloat16
        assert not torch.equal(logits(model), plain)


def test_the_direction_is_a_copy() -> None:
    direction_D = torch.eye(HIDDEN)[5].clone()
    intervention = ProjectOut(LAYERS - 1, direction_D, 1.0, 1.0)
    direction_D.zero_()
    assert float(intervention.direction_D.norm()) == 1


@pytest.mark.parametrize("width", [HIDDEN, HIDDEN + 1])
def test_another_shape_is_refused(width: int) -> None:
    layer = LAYERS - 1 if width != HIDDEN else LAYERS
    intervention = ProjectOut(layer, torch.eye(width)[0], 1.0, 1.0)
    with (
        pytest.raises(PatchError, match="another shape"),
        intervention.applied(tiny_model("llama")),
    ):
        pass


def test_a_probe_at_chance_is_refused() -> None:
    mixed = [[3, *ids] for ids in texts(60, seed=3)]
    given = inputs(toxic=mixed[::2], neutral=mixed[1::2], paired=False)
    with pytest.raises(DataError, match="chance"):
        project_out(given)
    assert isinstance(project_out(given, allow_chance=True), ProjectOut)


@pytest.mark.parametrize("side", ["toxic", "neutral"])
def test_a_missing_class_is_refused(side: str) -> None:
    with pytest.raises(DataError, match=f"no {side} text"):
        project_out(inputs(**{side: [], "paired": False}))
