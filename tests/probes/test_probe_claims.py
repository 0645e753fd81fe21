"""What a probe says is true: a planted direction is found, and nothing where there is nothing."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from planted import Planted, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from expunge.errors import DataError
from expunge.miniature import base_directory, check_data
from expunge.model.structure import find_structure
from expunge.probes.fit import fit_probes
from expunge.probes.probe import choose_layers

KINDS = ["logistic", "mean-difference", "lda"]
POOLINGS = ["mean", "token"]


def planted(kind: Any, pooling: Any, *, shift: float = 8.0, **settings: Any) -> tuple[Any, ...]:
    """The model, and its probes at layer 0, which passes on, and 1, which is blind."""
    model = Planted(shift)
    both = texts(250, toxic=True), texts(250, toxic=False)
    given = {"layers": [0, 1], "kind": kind, "pooling": pooling, **settings}
    return model, *fit_probes(model, model.structure(), *both, **given)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_direction_is_found_and_shuffled_labels_give_nothing(
    kind: Any, pooling: Any, paired: bool
) -> None:
    model, seeing, _ = planted(kind, pooling, paired=paired)
    assert float(seeing.direction_D @ model.direction_D) > 0.97
    assert seeing.auroc > 0.995 and seeing.accuracy > 0.98
    # 100 held-out texts: 0.5 ± 0.05 (one standard error).
    assert abs(seeing.control - 0.5) < 0.17
    assert seeing.toxic - seeing.neutral == pytest.approx(8.0, abs=0.3)
    assert seeing.spread == pytest.approx(1.0, abs=0.15)
    assert choose_layers([seeing], [0]) == (0,)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_the_direction_is_at_chance_and_refused(kind: Any, pooling: Any) -> None:
    _, seeing, blind = planted(kind, pooling)
    assert blind.at_chance and blind.accuracy < 0.66
    assert not seeing.at_chance
    with pytest.raises(DataError, match="at chance"):
        choose_layers([blind, seeing], [0, 1])
    assert choose_layers([blind, seeing], "auto", 0.8) == (0,)


def test_pooling_beats_single_tokens_where_the_signal_is_weak() -> None:
    """A text's mean has less noise than one of its tokens, so more of it is on the right side."""
    (_, by_text, _), (_, by_token, _) = (planted("lda", pooling, shift=1.5) for pooling in POOLINGS)
    assert by_text.auroc > by_token.auroc + 0.05
    # Tokens: Φ(1.5/√2) = 0.856.
    assert by_token.auroc == pytest.approx(0.856, abs=0.05)


# ---- the embedded model


@pytest.fixture(scope="module")
def miniature() -> tuple[Any, Any, list[list[int]], list[list[int]], list[list[int]]]:
    """The base, its structure, and token ids of rude, neutral and opening texts."""
    model = AutoModelForCausalLM.from_pretrained(base_directory(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_directory())
    pairs = Random(0).sample(check_data().pairs, 300)
    wordings = (
        [pair.opening + pair.rude for pair in pairs],
        [pair.opening + pair.neutral for pair in pairs],
        [pair.opening for pair in pairs],
    )
    return model, find_structure(model), *(tokenizer(list(own))["input_ids"] for own in wordings)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_of_the_miniature_shows_rudeness(miniature: Any, kind: Any) -> None:
    model, structure, rude, neutral, _ = miniature
    layers = range(structure.n_layers)
    probes = fit_probes(model, structure, rude, neutral, layers=layers, kind=kind, paired=True)
    assert [probe.n for probe in probes] == [120] * structure.n_layers
    assert min(probe.accuracy for probe in probes) > (0.85 if kind == "mean-difference" else 0.95)
    assert min(probe.selectivity for probe in probes) > 0.25
    assert choose_layers(probes, "auto", 0.8) == tuple(layers)


def test_openings_of_the_miniature_show_none(miniature: Any) -> None:
    """Half of the openings called toxic at random: there is nothing to find, and nothing is."""
    model, structure, _, _, openings = miniature
    probes = fit_probes(model, structure, openings[::2], openings[1::2], layers=[0, 4, 7])
    assert all(probe.accuracy < 0.75 for probe in probes)
    with pytest.raises(DataError, match="well enough"):
        choose_layers(probes, "auto", 0.8)
