"""Probes as values: file, choice of layers, figure."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from expunge.errors import DataError, ExpungeError, ModelError, RecipeError
from expunge.model.structure import find_structure
from expunge.probes.figure import probe_figure
from expunge.probes.probe import (
    TENSORS,
    Probe,
    check_fit,
    choose_layers,
    load_probes,
    save_probes,
)


def probe(layer: int = 0, accuracy: float = 0.8, *, half: float = 0.05, **fields: Any) -> Probe:
    given = {
        "layer": layer,
        "kind": "logistic",
        "pooling": "mean",
        "direction_D": torch.eye(4)[layer % 4],
        "bias": 1 / 3,
        "neutral": -1.0,
        "toxic": 2.0,
        "spread": 0.5,
        "accuracy": accuracy,
        "accuracy_low": accuracy - half,
        "accuracy_high": accuracy + half,
        "auroc": 0.9,
        "auroc_low": 0.85,
        "auroc_high": 0.95,
        "n": 200,
        "control": 0.52,
    }
    given |= fields
    return Probe(**{"difference_D": 3 * given["direction_D"], **given})


# ---- the value


def test_a_probe_is_a_value() -> None:
    assert probe() == probe() and probe() != probe(1) and probe() != "probe"
    assert probe() != probe(direction_D=torch.eye(4)[1])
    assert probe() != probe(difference_D=torch.eye(4)[0])
    with pytest.raises(AttributeError):
        probe().bias = 0.0  # type: ignore[misc]
    assert "tensor" not in repr(probe())


def test_score_and_selectivity_by_hand() -> None:
    one = probe(direction_D=torch.tensor([0.6, 0.8]), bias=-1.0)
    acts_BTD = torch.tensor([[[5.0, 0.0], [0.0, 1.0]]], dtype=torch.bfloat16)
    torch.testing.assert_close(one.score(acts_BTD), torch.tensor([[2.0, -0.2]]))
    assert one.selectivity == pytest.approx(0.28)


@pytest.mark.parametrize("low", [0.4, 0.5])
def test_at_chance(low: float) -> None:
    assert probe(accuracy_low=low).at_chance
    assert not probe(accuracy_low=0.501).at_chance


@pytest.mark.parametrize(
    "direction", [torch.ones(4), torch.zeros(4), torch.tensor([torch.nan, 1.0]), torch.eye(2)]
)
def test_only_unit_vectors(direction: torch.Tensor) -> None:
    with pytest.raises(DataError, match="no unit vector"):
        probe(direction_D=direction)


@pytest.mark.parametrize(
    "difference", [torch.ones(3), torch.ones(1, 4), torch.full((4,), torch.inf)]
)
def test_a_difference_fits_its_direction(difference: torch.Tensor) -> None:
    with pytest.raises(DataError, match="class difference of the probe at layer 0"):
        probe(difference_D=difference)


# ---- the file


def test_round_trip(tmp_path: Path) -> None:
    other = {"kind": "lda", "pooling": "token", "difference_D": torch.tensor([1, -2, 0.5, 1 / 3])}
    probes = (probe(3, 0.1 + 0.2), probe(0), probe(0, **other))
    metadata = {"base": "a model", "texts": 12, "note": "é"}
    path = save_probes(tmp_path / "new" / "probes.safetensors", probes, metadata)
    found, known = load_probes(path)
    assert found == probes and known == metadata
    assert load_probes(save_probes(path, probes[:1])) == (probes[:1], {})


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no probes to save"):
        save_probes(tmp_path / "a.safetensors", ())


def test_metadata_without_a_json_form(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no JSON form"):
        save_probes(tmp_path / "a.safetensors", [probe()], {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


def broken(path: Path, how: str) -> None:
    header = {"format": "expunge-probes", "version": "1", "metadata": "{}", "probes": "[{}]"}
    changed = {
        "another format": {"format": "expunge-patch"},
        "a later version": {"version": "2"},
        "no list": {"probes": "{"},
        "metadata": {"probes": "[]", "metadata": "[]"},
    }
    if how == "garbage":
        path.write_bytes(b"not a file of tensors at all")
    elif how == "pickle":
        torch.save({"a": torch.ones(2)}, path)
    elif how in ("truncated", "unknown kind", "word for number", "no tensor", "no difference"):
        save_probes(path, [probe()])
        content = path.read_bytes()
        words = {
            "unknown kind": (b"logistic", b"magistic"),
            "word for number": (b'\\"n\\": 200', b'\\"n\\": "2"'.replace(b'"2"', b"[2]")),
            "no tensor": (b"0.direction", b"9.direction"),
            "no difference": (b"0.difference", b"9.difference"),
        }
        path.write_bytes(content[:-5] if how == "truncated" else content.replace(*words[how]))
    elif how != "missing":
        tensors = {f"0.{name}": torch.eye(4)[0].clone() for name in TENSORS}
        save_file(tensors, path, {**header, **changed.get(how, {})})


@pytest.mark.parametrize(
    "how",
    [
        *("missing", "garbage", "pickle", "truncated", "another format", "a later version"),
        *("no list", "fields", "metadata", "unknown kind", "word for number", "no tensor"),
        "no difference",
    ],
)
def test_unreadable_files(how: str, tmp_path: Path) -> None:
    path = tmp_path / "probes.safetensors"
    broken(path, how)
    with pytest.raises(DataError, match="holds no readable probes"):
        load_probes(path)


# ---- which layers

PROBES = [probe(0, 0.55, half=0.1), probe(1, 0.62), probe(2, 0.9), probe(3, 0.7)]


def test_auto_takes_what_passes_the_threshold() -> None:
    assert choose_layers(PROBES[::-1], "auto", 0.65) == (2, 3)
    assert choose_layers(PROBES, "auto", 0.62) == (1, 2, 3)
    # A low threshold does not let a probe at chance in.
    assert choose_layers(PROBES, "auto", 0.0) == (1, 2, 3)
    assert choose_layers(PROBES, "auto", 0.0, allow_chance=True) == (0, 1, 2, 3)


def test_auto_without_a_layer_that_passes() -> None:
    with pytest.raises(DataError, match=r"layer 0: 0\.55 \[0\.45, 0\.65\], n 200; layer 1"):
        choose_layers(PROBES, "auto", 0.95)


def test_a_list_of_layers() -> None:
    assert choose_layers(PROBES, [3, 1, 3], 0.99) == (1, 3)


def test_a_listed_probe_at_chance_is_refused() -> None:
    with pytest.raises(DataError, match="at chance") as told:
        choose_layers(PROBES, [0, 2])
    assert "layer 0: 0.55" in told.value.got and "layer 2" not in told.value.got
    assert choose_layers(PROBES, [0, 2], allow_chance=True) == (0, 2)


@pytest.mark.parametrize("layers", [[], [7], [-1, 2]])
def test_layers_without_a_probe(layers: list[int]) -> None:
    with pytest.raises(RecipeError, match="0, 1, 2, 3"):
        choose_layers(PROBES, layers)


def test_probes_of_another_model() -> None:
    structure = find_structure(tiny.tiny_model("llama"))
    unit_D = torch.eye(tiny.HIDDEN)[0]
    check_fit([probe(3, direction_D=unit_D)], structure)
    for wrong in (probe(4, direction_D=unit_D), probe(0)):
        with pytest.raises(ModelError, match="32 dimensions"):
            check_fit([wrong], structure)


# ---- the figure


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_figure_repeats(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    probes = [*PROBES, *(replace(one, kind="lda") for one in PROBES)]
    one = probe_figure(probes, tmp_path / f"one{suffix}").read_bytes()
    other = probe_figure(probes[::-1], tmp_path / f"other{suffix}").read_bytes()
    assert one == other and len(one) > 1000


def test_a_figure_of_one_probe(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert probe_figure([probe()], tmp_path / "one.svg").exists()


def test_no_figure_of_nothing_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to draw"):
        probe_figure([], tmp_path / "a.svg")
    with pytest.raises(RecipeError, match=r"\.svg or \.png"):
        probe_figure([probe()], tmp_path / "a.pdf")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ExpungeError, match=r"expunge\[figures\]"):
        probe_figure([probe()], tmp_path / "a.svg")
