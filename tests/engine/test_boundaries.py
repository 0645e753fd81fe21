"""Stored boundaries: the same bits wherever they are kept and however they were batched."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from expunge.errors import ResourceError
from expunge.model import boundaries
from expunge.model.boundaries import BoundaryStore
from expunge.model.segment import Boundary, Segment


@pytest.fixture
def segment() -> Segment:
    return tiny.cut(tiny.tiny_model("qwen2"))[1]


def store(segment: Segment, **settings: Any) -> BoundaryStore:
    made = BoundaryStore(segment, tiny.texts(9), reference=True, **settings)
    made.compute()
    return made


def same(one: Boundary, other: Boundary) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def test_a_file_holds_the_same_bits_and_goes_away(segment: Segment, tmp_path: Path) -> None:
    said: list[str] = []
    in_ram = store(segment, announce=said.append)
    assert in_ram.storage == "ram" and not said
    folder = tmp_path / "spill"
    in_file = store(segment, limit_bytes=100, spill_directory=folder, announce=said.append)
    assert in_file.storage == "file"
    assert len(said) == 1 and "memory-mapped file" in said[0]
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert written == in_file.nbytes == in_ram.nbytes
    for indices in ([0, 1, 2], [8, 3], list(range(9))):
        one, other = in_ram.batch(indices), in_file.batch(indices)
        assert same(one.boundary, other.boundary)
        assert torch.equal(one.ids_BT, other.ids_BT) and torch.equal(one.mask_BT, other.mask_BT)
    in_file.close()
    assert list(folder.iterdir()) == []
    with pytest.raises(AssertionError):
        in_file.batch([0])


def test_what_is_stored_is_counted(segment: Segment) -> None:
    made = store(segment)
    tokens = sum(map(len, tiny.texts(9)))
    # Per token: the projection's input (48), the residual and one reference (32 each), 4 bytes.
    assert made.n_tokens == tokens
    assert made.nbytes == tokens * (48 + 32 + 32) * 4


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("reference", [True, False])
def test_size_is_known_before(family: str, reference: bool) -> None:
    made = BoundaryStore(tiny.cut(tiny.tiny_model(family))[1], tiny.texts(9), reference=reference)
    expected = made.expected_bytes
    made.compute()
    assert made.nbytes == expected > 0


def test_nothing_but_what_is_stored_is_kept(segment: Segment) -> None:
    """Not a view of nothing either: it would hold all of a group."""
    made = store(segment)
    assert made._template is not None
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in made._template.tensors())


def test_a_limit_that_is_just_enough_stays_in_ram(segment: Segment) -> None:
    need = store(segment).nbytes
    assert store(segment, limit_bytes=need).storage == "ram"
    spilled = store(segment, limit_bytes=need - 1)
    assert spilled.storage == "file"
    spilled.close()


def test_rows_do_not_depend_on_the_batch(segment: Segment) -> None:
    made = store(segment)
    everything = made.batch(range(9))
    for index, ids in enumerate(tiny.texts(9)):
        alone = made.batch([index])
        assert alone.ids_BT.tolist() == [ids] and bool(alone.mask_BT.all())
        for whole, single in zip(
            everything.boundary.tensors(), alone.boundary.tensors(), strict=True
        ):
            assert torch.equal(whole[index, : len(ids)], single[0])
            assert not whole[index, len(ids) :].any()


def test_rows_are_the_segments_own(segment: Segment) -> None:
    made = store(segment)
    for index, ids in enumerate(tiny.texts(9)):
        direct = segment.boundary(*tiny.padded([ids]), reference=True)
        stored = made.batch([index]).boundary
        for one, other in zip(direct.tensors(), stored.tensors(), strict=True):
            assert (one - other).abs().max() <= 1e-5


def test_progress_counts_every_token_once(segment: Segment) -> None:
    seen: list[int] = []
    made = BoundaryStore(segment, tiny.texts(9), reference=False)
    made.compute(seen.append)
    made.compute(seen.append)  # a second call does nothing
    assert sum(seen) == made.n_tokens


def test_texts_too_many_for_one_group(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = store(segment)
    monkeypatch.setitem(boundaries.GROUP_TOKENS, "cpu", 20)
    grouped = BoundaryStore(segment, tiny.texts(9), reference=True)
    seen: list[int] = []
    grouped.compute(seen.append)
    assert len(seen) > 3
    one, other = whole.batch(range(9)).boundary, grouped.batch(range(9)).boundary
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert (a - b).abs().max() <= 1e-5


def limited(segment: Segment, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let more than ``rows`` texts run out of memory; returns the sizes that were tried."""
    tried: list[int] = []
    real = segment.boundary

    def boundary(ids_BT: Any, mask_BT: Any, *, reference: bool) -> Boundary:
        tried.append(len(ids_BT))
        if len(ids_BT) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(ids_BT, mask_BT, reference=reference)

    monkeypatch.setattr(segment, "boundary", boundary)
    return tried


def test_out_of_memory_halves_the_rows(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = store(segment)
    tried = limited(segment, 2, monkeypatch)
    pieces = store(segment)
    assert tried == [9, 4, 2, 2, 2, 2, 1]
    one, other = whole.batch(range(9)).boundary, pieces.batch(range(9)).boundary
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert (a - b).abs().max() <= 1e-5


def test_the_size_that_fitted_is_kept_for_later_groups(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(boundaries.GROUP_TOKENS, "cpu", 24)
    tried = limited(segment, 2, monkeypatch)
    made = BoundaryStore(segment, [[3] * 6] * 12, reference=False)
    made.compute()
    assert tried == [4, 2, 2, *[2] * 4]  # three groups of four; only the first is tried whole


def test_a_reference_can_be_added(segment: Segment) -> None:
    made = BoundaryStore(segment, tiny.texts(9), reference=False)
    made.compute()
    made.add_reference()
    assert not made.computed
    made.compute()
    made.add_reference()
    assert made.computed  # it was there already
    assert same(store(segment).batch(range(9)).boundary, made.batch(range(9)).boundary)


def test_a_text_that_does_not_fit_says_so(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(segment, 0, monkeypatch)
    with pytest.raises(ResourceError, match="with a single text") as caught:
        store(segment)
    assert "simulated" in caught.value.got


def test_another_error_is_not_taken_for_memory(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> Boundary:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(segment, "boundary", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        store(segment)


def test_a_full_disk_is_noticed_beforehand(
    segment: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 1000))
    full = BoundaryStore(
        segment, tiny.texts(9), reference=True, limit_bytes=0, spill_directory=tmp_path
    )
    with pytest.raises(ResourceError, match="disk is too full") as caught:
        full.compute()
    assert "free" in caught.value.got
    full.close()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_computation_is_not_taken_for_whole(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(boundaries.GROUP_TOKENS, "cpu", 20)
    whole = store(segment)
    made = BoundaryStore(segment, tiny.texts(9), reference=True)

    def interrupt(_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.compute(interrupt)
    with pytest.raises(AssertionError):
        made.batch([0])
    made.compute()
    assert same(whole.batch(range(9)).boundary, made.batch(range(9)).boundary)
