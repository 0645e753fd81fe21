"""Looks on a bench: what is below the trained layers runs once, and the numbers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expunge import miniature
from expunge.evaluation.looks import LOOK_KINDS, LookKind, OutputLook, RepresentationLook
from expunge.metalearning.looking import kind_of, look_at, texts_beside
from expunge.recipe import Recipe
from expunge.workbench import Workbench


def recipe(files: dict[str, Path], **changes: Any) -> Recipe:
    return Recipe.build(
        {
            "model": str(miniature.base_directory()),
            "forget": str(files["forget.txt"]),
            "retain": str(files["retain.txt"]),
            "questions": str(files["questions.jsonl"]),
            "retain_questions": str(files["retain_questions.jsonl"]),
            "objective": "rmu",
            "tradeoff": "learned",
            "trained_layers": (5, 6),
            "layer": 6,
            "steps": 3,
            "batch_size": 4,
            "max_texts": 40,
            "max_tokens": 32,
            "look_items": 6,
            **changes,
        }
    )


def test_looks_are_by_likelihood_unless_asked_otherwise(files: dict[str, Path]) -> None:
    own = recipe(files)
    assert own.questions and kind_of(own) == "likelihood"
    assert [kind_of(own.updated(reward=kind)) for kind in LOOK_KINDS] == list(LOOK_KINDS)


def test_there_are_a_quarter_as_many_texts_beside_questions(files: dict[str, Path]) -> None:
    own = recipe(files)
    learning = Workbench(own).learning

    def sizes(own: Recipe, **given: Any) -> dict[str, int]:
        look = look_at(learning, own, "likelihood", **given)
        assert isinstance(look, OutputLook)
        return {name: len(part.prepared.groups) for name, part in look.parts.items()}

    sides = {"forget_questions": 6, "retain_questions": 6}
    assert sizes(own) == sides | {"retain_texts": 2}
    assert sizes(own, most_texts=1) == sides | {"retain_texts": 1}
    assert sizes(own, most_texts=100) == sizes(own)
    assert sizes(own, texts_only=True) == {"forget_texts": 6, "retain_texts": 6}
    assert sizes(own.updated(look_items=1)) == dict.fromkeys([*sides, "retain_texts"], 1)


def test_a_few_questions_take_no_texts_away() -> None:
    assert [texts_beside(32, asked) for asked in (0, 7, 8, 32, 500)] == [32, 32, 8, 8, 8]
    assert [texts_beside(items, items) for items in (1, 2, 5, 256)] == [1, 1, 2, 64]


def test_a_look_at_activations_reads_so_many_texts_at_most(files: dict[str, Path]) -> None:
    own = recipe(files)
    learning = Workbench(own).learning
    for given, count in (({}, 6), ({"most_texts": 2}, 2), ({"most_texts": 9}, 6)):
        look = look_at(learning, own, "representation", **given)
        assert isinstance(look, RepresentationLook)
        assert (len(look.forget.texts), len(look.retain.texts)) == (count, count)


@pytest.mark.parametrize("kind", ["accuracy", "likelihood"])
def test_layers_below_the_trained_ones_run_in_the_first_look_alone(
    files: dict[str, Path], kind: LookKind
) -> None:
    bench = Workbench(recipe(files))
    learning, own = bench.learning, bench.recipe
    look = look_at(learning, own, kind)
    assert isinstance(look, OutputLook) and look.replay is not None
    model = learning.opened(own.model, None).model
    assert tuple(look()) == (0.0, 1.0)
    patch, _ = learning.train(own.updated(tradeoff="fixed", lr=0.2))
    ran: list[None] = []
    model.model.layers[4].mlp.register_forward_hook(lambda *_args: ran.append(None))
    with patch.applied(model):
        replayed = look()
        assert not ran and replayed != (0.0, 1.0)
        look.replay = None
        assert look() == replayed
        assert ran


def test_a_record_is_of_the_lowest_trained_layer(files: dict[str, Path]) -> None:
    bench = Workbench(recipe(files))
    learning, own = bench.learning, bench.recipe

    def replay(**changes: Any) -> Any:
        look = look_at(learning, own.updated(**changes), "likelihood")
        assert isinstance(look, OutputLook)
        return look.replay

    first = replay()
    assert first.first == 5 and replay() is first
    assert replay(trained_layers=(6, 5)) is first
    assert replay(trained_layers=(6,)).first == 6
    assert replay(trained_layers=None) is None  # a shallow model trains all below
    look_at(learning, own, "likelihood")()
    kept = replay().nbytes
    assert kept > 0
    assert replay(look_items=4).limit_bytes == first.limit_bytes - kept
    learning.drop_cuts()
    assert replay().nbytes == 0


def test_an_edit_may_change_all_layers(files: dict[str, Path]) -> None:
    bench = Workbench(recipe(files))
    look = look_at(bench.learning, bench.recipe.updated(objective="profs"), "likelihood")
    assert isinstance(look, OutputLook) and look.replay is None
