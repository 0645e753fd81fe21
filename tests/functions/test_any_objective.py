"""Every objective on every function: a few steps on the miniature, from the data to a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import miniature
from expunge.errors import DataError
from expunge.model.patch import Patch
from expunge.model.segment import Boundary, Segment
from expunge.objectives import OBJECTIVES, Logprobs
from expunge.recipe import Recipe
from expunge.training.tradeoff import Fixed
from expunge.workbench import Workbench

# name -> what a recipe says of the function and its data
WORLDS: dict[str, dict[str, Any]] = {
    "knowledge": {"function": "knowledge", "forget": "forget.txt"},
    "knowledge with refusals": {
        "function": "knowledge",
        "forget": "forget.txt",
        "refusals": "refusals.txt",
    },
    "toxicity": {"function": "toxicity", "pairs": "pairs.tsv"},
}
PAIRED = ("knowledge with refusals", "toxicity")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    miniature.check_data().write(folder)
    return folder


def recipe(files: Path, world: str, **changes: Any) -> Recipe:
    own = {key: str(files / v) if "." in v else v for key, v in WORLDS[world].items()}
    settings = {
        **own,
        "model": str(miniature.base_directory()),
        "retain": str(files / "retain.txt"),
        "layer": "auto",
        "calibrate": False,
        "max_texts": 32,
        "steps": 2,
        "batch_size": 16,
        # So few pairs do not show that a probe tells them apart.
        "probe_allow_chance": True,
        "probe_threshold": 0.5,
        "look_every": 0,
        "evaluate": False,
    }
    return Recipe.build({**settings, **changes})


@pytest.fixture(scope="module")
def benches(files: Path) -> dict[str, Workbench]:
    return {world: Workbench(recipe(files, world)) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_a_few_steps_leave_a_patch(
    benches: dict[str, Workbench], files: Path, world: str, name: str
) -> None:
    asked = recipe(files, world, objective=name)
    bench, needs = benches[world], OBJECTIVES.get(name).extras["needs"]
    bench.check(asked)
    if isinstance(needs, Logprobs) and needs.twin and world not in PAIRED:
        with pytest.raises(DataError, match="refusals"):
            bench.train(asked)
        return
    patch, result = bench.train(asked)
    assert isinstance(patch, Patch) and patch.norm() > 0
    assert result is not None and len(result.log) == 2
    assert (patch.metadata["function"], patch.metadata["objective"]) == (asked.function, name)


@pytest.mark.parametrize("world", PAIRED)
def test_an_edit_that_wants_pairs(benches: dict[str, Workbench], files: Path, world: str) -> None:
    patch, _ = benches[world].train(recipe(files, world, objective="profs"))
    assert isinstance(patch, Patch) and patch.norm() > 0


def test_probes_of_knowledge_tell_it_from_the_retain_texts(
    benches: dict[str, Workbench], files: Path
) -> None:
    asked = recipe(files, "knowledge", objective="multi-layer-probe")
    learning = benches["knowledge"].learning
    tokens = learning.tokens(asked)
    assert tokens.contrast is tokens.retain
    assert len(tokens.forget[0]) == len(tokens.retain) == 32
    assert max(probe.accuracy for probe in learning.probes(asked)) > 0.8
    # No wordings belong together; with refusals they do.
    assert learning.cut(asked).twins is None
    refusing = recipe(files, "knowledge with refusals", objective="multi-layer-probe")
    cut = benches["knowledge with refusals"].learning.cut(refusing)
    assert cut.twins is not None and len(cut.twins.texts) == 32


def test_originals_of_forget_texts_are_stored_where_a_setting_needs_them(files: Path) -> None:
    """And a bench that has stored them trains what does without as before."""
    plain = recipe(files, "knowledge", objective="cosine-rmu", steps=6)
    normed = plain.updated(objective_settings={"norm_weight": 0.5, "norm_target": 2.0})
    bench = Workbench(plain)

    def trained(own: Recipe) -> Patch:
        patch, _ = bench.train(own)
        assert isinstance(patch, Patch)
        return patch

    before = trained(plain)
    assert not any(store.reference for store in bench.learning.cut(plain).forget)
    other = trained(normed)
    assert all(store.reference for store in bench.learning.cut(normed).forget)
    assert (other + -before).norm() > 0.01 * before.norm()
    after = trained(plain)
    assert all(torch.equal(after.deltas[name], delta) for name, delta in before.deltas.items())


def test_forget_and_retain_texts_mostly_share_a_pass(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(
        files, "knowledge", objective="cosine-rmu", max_texts=640, steps=80, batch_size=8
    )
    bench = Workbench(asked)
    rows: list[int] = []

    class SeenError(Exception):
        """What a step would compute is of no interest."""

    def forward(_segment: Segment, _boundary: Boundary, ids_BT: torch.Tensor, *_: Any) -> Any:
        rows.append(len(ids_BT))
        raise SeenError

    trainer = bench.learning.trainer(asked, Fixed(1.0), None)
    monkeypatch.setattr(Segment, "forward", forward)
    for step in range(80):
        _, forget, retain = trainer.batches.at(step)
        with pytest.raises(SeenError):
            trainer.sight.of(0, forget, retain, torch.Generator())
    assert rows.count(16) >= 76
