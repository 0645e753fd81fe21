"""A bench that is handed from run to run gives each the patch that a bench of its own would."""

from __future__ import annotations

import pytest
import torch
from small_world import LAYERS, write_lines

from expunge import benches
from expunge.metalearning.looking import look_at
from expunge.model.patch import Patch
from expunge.model.segment import Segment
from expunge.recipe import Recipe
from expunge.run import run
from expunge.workbench import Workbench

OBJECTIVES = ("rmu", "cosine-rmu", "adaptive-rmu", "rmu", "rerouting")


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
        ("cosine-rmu", []),
        ("adaptive-rmu", [True]),  # forget once more
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
    first, second = (bench.learning.cut(recipe(world, layer=layer)) for layer in (1, 2))
    held = first.held_bytes
    assert held > 0 and second.held_bytes > 0
    text = first.retain.batch([0]).boundary.input_BTI.clone()
    for layer in (2, 1):
        assert bench.learning.cut(recipe(world, layer=layer)) in (first, second)

    tight = 2.2 * held / 2**30
    bench.learning.cut(recipe(world, layer=0, cache_gib=tight))
    assert bench.learning.cut(recipe(world, layer=1, cache_gib=tight)) is first
    assert bench.learning.cut(recipe(world, layer=2, cache_gib=tight)) is not second
    # What was dropped is still whole for those that work with it.
    assert torch.equal(first.retain.batch([0]).boundary.input_BTI, text)

    tighter = 1.1 * held / 2**30
    bench.learning.cut(recipe(world, layer=2, cache_gib=tighter))
    again = bench.learning.cut(recipe(world, layer=1, cache_gib=tighter))
    assert again is not first
    assert torch.equal(again.retain.batch([0]).boundary.input_BTI, text)


def test_files_need_not_make_room(world, tmp_path):
    bench = whole_bench(world)
    bench.learning.spill_directory = tmp_path
    in_files = bench.learning.cut(recipe(world, layer=2, cache_gib=0))
    assert in_files.held_bytes == 0 and in_files.retain.storage == "file"
    in_ram = bench.learning.cut(recipe(world, layer=1))
    tight = 1.1 * in_ram.held_bytes / 2**30
    bench.learning.cut(recipe(world, layer=0, cache_gib=tight))
    assert bench.learning.cut(recipe(world, layer=2, cache_gib=tight)) is in_files
    assert bench.learning.cut(recipe(world, layer=1, cache_gib=tight)) is not in_ram
    # But of what lies in files one is enough: disks have an end too.
    also = bench.learning.cut(recipe(world, layer=0, cache_gib=0))
    assert bench.learning.cut(recipe(world, layer=0, cache_gib=0)) is also and also.in_files
    assert bench.learning.cut(recipe(world, layer=2, cache_gib=0)) is not in_files


def test_originals_that_come_later_keep_to_the_limit(world, tmp_path):
    bench = whole_bench(world)
    bench.learning.spill_directory = tmp_path
    cut = bench.learning.cut(recipe(world, objective="rmu"))
    held = cut.held_bytes
    more = recipe(world, objective="adaptive-rmu", cache_gib=1.01 * held / 2**30)
    assert bench.learning.cut(more) is cut
    assert cut.forget[0].storage == "file" and cut.retain.storage == "ram"
    assert 0 < cut.held_bytes <= 1.01 * held
    cut.close()


def test_a_limit_is_used_up_store_by_store(world, tmp_path):
    bench = whole_bench(world)
    bench.learning.spill_directory = tmp_path
    whole = bench.learning.cut(recipe(world, layer=1))
    sizes = {store: store.nbytes for store in whole.stores()}
    assert whole.limit(sum(sizes.values())) == sum(sizes.values()) == whole.held_bytes
    bench.drop_boundaries()
    limit = max(sizes.values())
    assert 0 < whole.limit(limit) <= limit
    for store in sizes:
        store.compute()
    assert {store.storage for store in sizes} == {"ram", "file"}
    assert 0 < whole.held_bytes <= limit
    whole.close()


def test_boundaries_can_be_dropped(world):
    bench = Workbench(recipe(world))
    bench.drop_boundaries()  # nothing yet, and nothing is opened for it
    assert "learning" not in vars(bench)
    cut = bench.learning.cut(recipe(world))
    assert cut.held_bytes > 0
    bench.drop_boundaries()
    assert cut.held_bytes == 0


def test_a_process_keeps_the_boundaries_of_one_bench(world, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benches, "_kept", {})
    first = benches.kept_bench(recipe(world))
    cut = first.learning.cut(recipe(world))
    assert cut.held_bytes > 0 and benches.kept_bench(recipe(world)) is first and cut.held_bytes > 0
    benches.kept_bench(recipe(world, max_tokens=20))
    assert cut.held_bytes == 0
    assert benches.kept_bench(recipe(world)) is first


def test_the_base_is_looked_at_once(world):
    asked = recipe(world, reward="likelihood")
    bench = whole_bench(world)
    first = look_at(bench.learning, asked, "likelihood")
    first()
    again = look_at(bench.learning, asked.updated(seed=1), "likelihood")
    assert again.base is first.base and first.raw and not again.raw
    fewer = look_at(bench.learning, asked.updated(look_items=1), "likelihood")
    assert fewer.base != first.base
    # Of a model that is opened anew nothing is known.
    bench.learning.release()
    anew = look_at(bench.learning, asked, "likelihood")
    assert anew.model is not first.model
    assert anew.base is not first.base and anew.base == first.base


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
