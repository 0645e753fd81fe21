"""The stream: the model's own hidden states, each text once, nothing held."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import tiny
from expunge.errors import DataError, ModelError, RecipeError, ResourceError
from expunge.model.boundaries import GROUP_TOKENS, length_groups
from expunge.model.structure import find_structure
from expunge.probes import stream as room
from expunge.probes.stream import stream

ALL = range(tiny.LAYERS)


def opened(name: str = "llama") -> tuple[Any, Any]:
    model = tiny.tiny_model(name)
    return model, find_structure(model)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_equals_the_models_own_hidden_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUP_TOKENS, "cpu", 40)
    model, structure = opened(name)
    texts, seen = tiny.texts(12), []
    for passed in stream(model, structure, texts, ALL):
        for row, index in enumerate(passed.indices):
            ids = texts[index]
            with torch.no_grad():
                states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            # The last of them has the final norm on it.
            for layer in range(tiny.LAYERS - 1):
                torch.testing.assert_close(
                    passed.acts[layer][row, : len(ids)],
                    states[layer + 1][0],
                    atol=1e-4,
                    rtol=1e-4,
                )
            counted = passed.mask_BT[row].tolist()
            assert counted == [0 < place < len(ids) for place in range(len(counted))]
            seen.append(index)
    assert sorted(seen) == list(range(12))


def test_stops_after_the_deepest_layer() -> None:
    model, structure = opened()
    ran: list[int] = []
    for index, layer in enumerate(structure.layers):
        layer.register_forward_hook(lambda _m, _a, _o, index=index: ran.append(index))
    (passed,) = stream(model, structure, tiny.texts(3), [1, 0, 1])
    assert ran == [0, 1] and sorted(passed.acts) == [0, 1]


def test_leaves_the_model_as_it_was() -> None:
    model, structure = opened()
    model.train()
    for passed in stream(model, structure, tiny.texts(3), ALL):
        assert not any(acts_BTD.requires_grad for acts_BTD in passed.acts.values())
    assert model.training
    assert not any(layer._forward_hooks for layer in structure.layers)


def test_progress_counts_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUP_TOKENS, "cpu", 30)
    model, structure = opened()
    done: list[int] = []
    assert len(list(stream(model, structure, tiny.texts(10), [0], on_progress=done.append))) > 2
    assert sum(done) == 10


def test_no_group_outlives_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUP_TOKENS, "cpu", 30)
    model, structure = opened()
    held: list[weakref.ref[torch.Tensor]] = []
    for passed in stream(model, structure, tiny.texts(30), ALL):
        held += [weakref.ref(acts_BTD) for acts_BTD in passed.acts.values()]
        del passed
        gc.collect()
        assert sum(ref() is not None for ref in held) <= tiny.LAYERS
    assert len(held) > 4 * tiny.LAYERS


def test_groups_are_of_similar_length_and_within_the_budget() -> None:
    lengths = [9, 2, 5, 5, 30, 3, 2]
    groups = length_groups(lengths, 12)
    assert groups == [[1, 6, 5], [2, 3], [0], [4]]  # the text beyond the budget goes alone


def test_out_of_memory_halves_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model, structure = opened()
    whole = next(iter(stream(model, structure, tiny.texts(8), [1])))
    real, most = room._forward, 3

    def narrow(model: Any, structure: Any, texts: Any, *rest: Any) -> Any:
        if len(texts) > most:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, structure, texts, *rest)

    monkeypatch.setattr(room, "_forward", narrow)
    pieces = list(stream(model, structure, tiny.texts(8), [1]))
    assert [len(piece.indices) for piece in pieces] == [2, 2, 2, 2]
    assert sum((piece.indices for piece in pieces), ()) == whole.indices
    most = 0
    with pytest.raises(ResourceError, match="single text"):
        list(stream(model, structure, tiny.texts(8), [1]))


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, structure = opened()

    def broken(*_args: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(room, "_forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(stream(model, structure, tiny.texts(3), [1]))


@pytest.mark.parametrize("layers", [[], [4], [-1], [0, 9]])
def test_layers_out_of_range(layers: list[int]) -> None:
    model, structure = opened()
    with pytest.raises(RecipeError, match="0 to 3"):
        stream(model, structure, tiny.texts(3), layers)


def test_a_text_without_a_token_that_counts() -> None:
    model, structure = opened()
    with pytest.raises(DataError, match="text 1 with 1 tokens"):
        stream(model, structure, [[5, 6], [5]], [0])


def test_no_texts_give_no_groups() -> None:
    model, structure = opened()
    assert list(stream(model, structure, [], [0])) == []


def test_a_layer_that_never_runs() -> None:
    model, structure = opened()
    structure.backbone.layers = torch.nn.ModuleList(list(structure.layers)[:2])
    structure.backbone.config.num_hidden_layers = 2
    with pytest.raises(ModelError, match="no activations after layer 3"):
        list(stream(model, structure, tiny.texts(3), [0, 3]))
