"""A bench that is handed from run to run gives each the patch that a bench of its own would."""

from __future__ import annotations

import pytest
import torch
from small_world import LAYERS, write_lines

from expunge.model.patch import Patch
from expunge.model.segment import Segment
from expunge.recipe import Recipe
from expunge.run import run
from expunge.workbench import Workbench

OBJECTIVES = ("rmu", "cosine-rmu", "rmu", "rerouting")


def recipe(world, **changes):
    return Recipe.build(
        {
            "model": str(world.model),
            "forget": str(world.forget),
            "retain": str(world.retain),
            "layer": 2,
            "steps": 4,
            "lr": 0.01,
            "batch_size": 4,
            **changes,
        }
    )


def timeless(result):
    return [{**vars(entry), "seconds": 0} for entry in result.log]


def test_refusals_make_another_bench_and_another_run(world):
    plain, refusing = recipe(world), recipe(world, refusals="idk.txt")
    assert plain.bench_key != refusing.bench_key
    assert plain.fingerprint != refusing.fingerprint


def test_a_knowledge_run_on_pairs_tells_of_its_refusals(world, tmp_path):
    refusals = write_lines(tmp_path / "idk.txt", ["w1 w2 w3", "w4 w5"])
    asked = recipe(world, objective="dpo", layer="auto", refusals=str(refusals))
    record = run(asked, tmp_path / "out")
    assert str(refusals) in record.provenance["data"]
    patch = Patch.load(tmp_path / "out" / "patch.safetensors")
    assert patch.metadata["recipe"]["refusals"] == "idk.txt"
    assert patch.norm() > 0 and record.score("forget_nll", "patched") is not None
    assert run(asked, tmp_path / "out").to_dict() == record.to_dict()


def test_objectives_share_a_bench(world):
    shared = Workbench(recipe(world))
    for objective in OBJECTIVES:
        one = recipe(world, objective=objective)
        mine, mine_seen = shared.train(one)
        alone, alone_seen = Workbench(one).train(one)
        assert all(torch.equal(mine.deltas[name], alone.deltas[name]) for name in alone.deltas)
        # The log too does not tell what ran before.
        assert timeless(mine_seen) == timeless(alone_seen)


def test_originals_of_forget_texts_are_stored_when_first_needed(
    world, monkeypatch: pytest.MonkeyPatch
):
    asked: list[bool] = []
    real = Segment.boundary

    def boundary(self, ids_BT, mask_BT, *, reference):
        asked.append(reference)
        return real(self, ids_BT, mask_BT, reference=reference)

    monkeypatch.setattr(Segment, "boundary", boundary)
    bench = Workbench(recipe(world))
    for objective, expected in (
        ("rmu", [False, True]),  # forget, retain
        ("cosine-rmu", [True]),  # forget once more
        ("rmu", []),
        ("rerouting", []),
    ):
        asked.clear()
        bench.learning.cut(recipe(world, objective=objective))
        assert asked == expected
    bench = Workbench(recipe(world, layer="auto"))
    for objective, expected in (("simnpo", [False, True]), ("graddiff", []), ("npo", [True])):
        asked.clear()
        bench.learning.cut(recipe(world, layer="auto", objective=objective))
        assert asked == expected


def whole_bench(world):
    """With all layers open: a deeper cut would open the base anew, and drop the others."""
    bench = Workbench(recipe(world))
    bench.learning.opened(str(world.model), None)
    return bench


def test_boundaries_of_earlier_runs_make_room(world):
    """Where two cuts do not fit, the one used longest ago goes, and comes back the same."""
    bench = whole_bench(world)
    first = bench.learning.cut(recipe(world, layer=1))
    held = first.held_bytes
    assert held > 0 and first.retain.computed
    text = first.retain.batch([0]).boundary.input_BTI.clone()

    enough = recipe(world, layer=2)
    second = bench.learning.cut(enough)
    assert first.retain.computed and second.retain.computed

    tight = 1.5 * held / 2**30
    third = bench.learning.cut(recipe(world, layer=0, cache_gib=tight))
    assert [one.held_bytes > 0 for one in (first, second, third)] == [False, False, True]
    again = bench.learning.cut(recipe(world, layer=1, cache_gib=tight))
    assert third.held_bytes == 0
    assert torch.equal(again.retain.batch([0]).boundary.input_BTI, text)


def test_what_is_used_again_stays(world):
    bench = whole_bench(world)
    cuts = [bench.learning.cut(recipe(world, layer=layer)) for layer in (1, 2)]
    held = sum(one.held_bytes for one in cuts)
    assert bench.learning.cut(recipe(world, layer=1)) is cuts[0]
    bench.learning.cut(recipe(world, layer=0, cache_gib=1.1 * held / 2**30))
    assert [one.held_bytes > 0 for one in cuts] == [True, False]


def test_boundaries_can_be_dropped(world):
    bench = Workbench(recipe(world))
    bench.drop_boundaries()  # nothing yet, and nothing is opened for it
    assert "learning" not in vars(bench)
    cut = bench.learning.cut(recipe(world))
    bench.drop_boundaries()
    assert cut.held_bytes == 0


def test_probes_are_fitted_anew_on_what_a_run_left(world):
    asked = recipe(world)
    bench = Workbench(asked)
    patch, _ = bench.train(asked)
    probing = bench.learning.probing
    whole = bench.learning.opened(asked.model, None)
    found = probing.accuracy(asked, patch * 1000, whole)
    assert [layer for layer, _ in found["before"]] == list(range(LAYERS))
    assert [[one.layer, one.accuracy] for one in probing.probes(asked)] == found["before"]
    assert found["after"] != found["before"]
    # The base is as it was, and its probes were kept.
    assert probing.accuracy(asked, patch * 0, whole) == {
        "before": found["before"],
        "after": found["before"],
    }
