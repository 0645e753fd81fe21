"""ProFS: which weights change, and that the planted direction is gone from them.

Shapes: N pairs, D hidden size, I projection input, K rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_edit_contract import every_architecture, inputs
from torch import Tensor
from transformers import AutoModel

from expunge.edits.profs import profs, toxic_basis, without
from expunge.errors import DataError
from expunge.model.patch import Patch, causal_lm_name
from expunge.model.structure import find_structure
from tiny import LAYERS, tiny_model

D = 6


def unit(place: int) -> Tensor:
    return torch.eye(D)[place]


def planted(n: int = 40) -> tuple[Tensor, Tensor]:
    """Neutral embeddings around 5·e0; toxic ones go 3 further along e1, and some along e0."""
    generator = torch.Generator().manual_seed(0)
    noise_ND = torch.randn(n, D, generator=generator)
    noise_ND[:, 0] = 0
    noise_ND[:, 1:] -= noise_ND[:, 1:].mean(0)  # the mean is then exactly e0's
    neutral_ND = 5 * unit(0) + noise_ND
    small_ND = 0.01 * torch.randn(n, D, generator=generator)
    return neutral_ND + 3 * unit(1) + 8 * unit(0) + small_ND, neutral_ND


def test_the_planted_direction_is_found() -> None:
    toxic_ND, neutral_ND = planted()
    basis_DK = toxic_basis(toxic_ND, neutral_ND, 1)
    assert basis_DK is not None and basis_DK.shape == (D, 1)
    assert abs(float(basis_DK[:, 0] @ unit(1))) > 0.9999
    # The larger gap lies along the neutral mean, what all texts share, and is left alone.
    assert abs(float(basis_DK[:, 0] @ unit(0))) < 1e-5


def test_the_projected_matrix_by_hand() -> None:
    # P = v vᵀ with v = (3, 4)/5, so I − P = [[16, −12], [−12, 9]]/25.
    basis_DK = torch.tensor([[0.6], [0.8]])
    weight_DI = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]])
    expected_DI = torch.tensor([[0.64, -0.48, 0.8], [-0.48, 0.36, -0.6]])
    assert torch.allclose(without(weight_DI, basis_DK), expected_DI, atol=1e-6)


def test_the_planted_direction_leaves_the_product_and_another_stays() -> None:
    weight_DI = torch.randn(D, 9, generator=torch.Generator().manual_seed(1))
    basis_DK = toxic_basis(*planted(), 1)
    assert basis_DK is not None
    edited_DI = without(weight_DI, basis_DK)
    assert float((unit(1) @ weight_DI).norm()) > 1  # the control: it was there
    assert float((unit(1) @ edited_DI).norm()) < 0.02
    assert torch.allclose(unit(0) @ edited_DI, unit(0) @ weight_DI, atol=1e-4)
    assert torch.allclose(without(edited_DI, basis_DK), edited_DI, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_differences_of_too_low_a_rank_have_no_basis(rank: int) -> None:
    same_ND = torch.randn(8, D, generator=torch.Generator().manual_seed(2))
    assert toxic_basis(same_ND, same_ND, rank) is None
    assert toxic_basis(same_ND[: rank - 1] + 1, same_ND[: rank - 1], rank) is None
    along_the_mean = same_ND + 2 * same_ND.mean(0)
    assert toxic_basis(along_the_mean, same_ND, rank) is None


# ---- on models


def projections(model: Any, layers: range) -> set[str]:
    structure = find_structure(model)
    return {structure.weight_name(layer) for layer in layers}


@every_architecture
@pytest.mark.parametrize("first", [-1, 0, LAYERS - 1])
def test_exactly_the_chosen_projections_change(architecture: str, first: int) -> None:
    given = inputs(architecture)
    new = profs(given, first_layer=first)
    start = LAYERS // 2 if first == -1 else first
    assert set(new) == projections(given.model, range(start, LAYERS))
    for name, weight in new.items():
        old = given.model.get_parameter(name)
        assert weight.shape == old.shape
        assert weight.is_contiguous() and not torch.equal(weight, old)


def added_by(model: Any, layer: int, ids: list[int]) -> Tensor:
    """What the projection, with its tail, adds to the residual stream: TD."""
    structure = find_structure(model)
    module = structure.projection_of(layer)
    last = structure.layers[layer].get_submodule(structure.tail[-1]) if structure.tail else module
    seen: list[Tensor] = []
    handle = last.register_forward_hook(lambda _m, _i, out: seen.append(out))
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    finally:
        handle.remove()
    return seen[0][0]


def load(model: Any, new: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in new.items():
            model.get_parameter(name).copy_(weight)


@every_architecture
def test_the_subspace_leaves_what_the_layer_adds(architecture: str) -> None:
    """Rank 2 leaves what a layer adds with two dimensions fewer, a norm behind it or not."""
    given = inputs(architecture)
    layer, ids = LAYERS - 1, list(range(3, 60))
    bias = getattr(given.structure.projection_of(layer), "bias", None)
    if bias is not None:  # biases stay by design; here they would hide the missing dimensions
        torch.nn.init.zeros_(bias)
    assert torch.linalg.matrix_rank(added_by(given.model, layer, ids)) == 32
    load(given.model, dict(profs(given, rank=2, first_layer=layer)))
    assert torch.linalg.matrix_rank(added_by(given.model, layer, ids), rtol=1e-4) == 30


def test_a_transposed_weight_is_edited_alike() -> None:
    """GPT-2 and a copy of it whose Conv1D holds the same matrix as a Linear agree."""
    given = inputs("gpt2")
    copy = tiny_model("gpt2")
    for block in copy.transformer.h:
        conv = block.mlp.c_proj
        linear = torch.nn.Linear(conv.weight.shape[0], conv.nf)
        with torch.no_grad():
            linear.weight.copy_(conv.weight.T)
            linear.bias.copy_(conv.bias)
        block.mlp.c_proj = linear
    turned = profs(inputs("gpt2", model=copy))
    for name, weight in profs(given).items():
        assert torch.allclose(weight, turned[name].T, atol=1e-5)


def test_a_model_without_head_gives_the_same_under_its_own_names(tmp_path: Any) -> None:
    whole = tiny_model("llama")
    whole.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path).eval()
    from_whole, from_body = profs(inputs(model=whole)), profs(inputs(model=body))
    named = {causal_lm_name(body, name): weight for name, weight in from_body.items()}
    assert named.keys() == from_whole.keys()
    for name, weight in named.items():
        assert torch.allclose(weight, from_whole[name], atol=1e-6)


def test_the_weights_make_a_patch() -> None:
    given = inputs()
    new = profs(given)
    before = {name: given.model.get_parameter(name).detach().clone() for name in new}
    patch = Patch.between(before, new)
    assert set(patch.names) == set(new)
    with patch.applied(given.model):
        for name, weight in new.items():
            assert torch.allclose(given.model.get_parameter(name), weight, atol=1e-6)


def test_pairs_are_capped_evenly() -> None:
    given = inputs()
    half = inputs(toxic=given.toxic[::2], neutral=given.neutral[::2])
    capped, expected = profs(given, pairs=12), profs(half)
    assert all(torch.allclose(capped[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"paired": False},
        {"neutral": [[3, 4]]},
        {"toxic": [], "neutral": []},
        {"toxic": [[3, 4, 5]] * 5, "neutral": [[3, 4, 5]] * 5},
        {"toxic": [[3, 40, 5]], "neutral": [[3, 4, 5]]},
    ],
    ids=["unpaired", "a side short", "empty", "equal sides", "one pair for two directions"],
)
def test_texts_that_are_no_pairs_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        profs(inputs(**changes))
    assert caught.value.fix
