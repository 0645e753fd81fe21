"""Write a patched copy of a model directory, streaming: only the changed bytes differ."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from torch import nn

from expunge.errors import ModelError, PatchError, ResourceError
from expunge.files import disk_errors, write_json
from expunge.model.checkpoint import Checkpoint
from expunge.model.patch import BaseTensor, Patch, add, causal_lm_name, mismatch
from expunge.model.shards import (
    BLOCK_BYTES,
    FLOATS,
    INDEX,
    SINGLE,
    TensorInfo,
    dtype_name,
    raw_bytes,
)

PATCH_INFO = "expunge.json"
# Weights in other forms: some can run code, and all would carry the unpatched function along.
WEIGHT_SUFFIXES = {
    *(".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".safetensors", ".npz"),
}

Progress = Callable[[int, int], None]


def part_within(patch: Patch, model: nn.Module) -> Patch:
    """The part of a patch that touches layers which a model, opened truncated, has."""
    has = {causal_lm_name(model, name) for name, _ in model.named_parameters()}
    deltas = {name: delta for name, delta in patch.deltas.items() if name in has}
    return Patch(deltas, {name: patch.base[name] for name in deltas}, patch.metadata)


def apply_patch(
    patch: Patch,
    directory: str | Path,
    out: str | Path,
    *,
    scale: float = 1.0,
    on_progress: Progress | None = None,
) -> Path:
    """Write a copy of the base with ``scale`` × the patch added; returns ``out``.

    Only the bytes of the changed tensors differ from the base; one tensor is held in memory at
    a time. ``expunge.json`` tells what was done. Weights in other forms than the model's
    safetensors are not copied. ``out`` is complete or absent.

    Args:
        on_progress: called with bytes done and bytes in all.

    Raises PatchError (another base, or a sum that does not fit the dtype on disk), ModelError
    (unsuitable ``out`` or base), ResourceError (disk full).
    """
    if not math.isfinite(scale):
        raise PatchError(
            what="The scale of a patch is a finite number",
            got=str(scale),
            allowed="1 for the patch as trained, 0.5 for half of it, -1 to undo it",
            fix="pass a number",
        )
    checkpoint, out = Checkpoint.open(directory), Path(out)
    check_out(checkpoint.directory, out, what="The patched model")
    targets = verified_targets(checkpoint, patch)
    files = list(_copied_files(checkpoint))
    total = sum(file.stat().st_size for file in files)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _building(out, total) as work:
        done = 0
        for file in files:
            target = work / file.relative_to(checkpoint.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            for copied in _copy(file, target):
                done += copied
                if on_progress:
                    on_progress(done, total)
        for name, infos in targets.items():
            for info in infos:
                changed = add(name, info.read(), patch.deltas[name], scale)
                with (work / info.file.relative_to(checkpoint.directory)).open("r+b") as handle:
                    handle.seek(info.start)
                    handle.write(raw_bytes(changed))
                    handle.flush()
                    os.fsync(handle.fileno())
        base = {name: tensor.to_dict() for name, tensor in patch.base.items()}
        write_json(work / PATCH_INFO, {"scale": scale, "metadata": patch.metadata, "changed": base})
    return out


def check_out(base: Path, out: Path, *, what: str) -> None:
    """Raise ModelError unless ``out`` is new or empty, and outside the base."""
    real_base, real_out = base.resolve(), out.resolve()
    if real_out == real_base or real_base in real_out.parents:
        got = f"{out}, which is the base model or lies inside it"
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        got = f"{out}, which is not empty"
    else:
        return
    raise ModelError(
        what=f"{what} needs a directory of its own",
        got=got,
        allowed="a new or empty directory outside the base model",
        fix="choose another output directory (-o), or remove the old one first",
    )


def verified_targets(checkpoint: Checkpoint, patch: Patch) -> dict[str, list[TensorInfo]]:
    """Patch name -> the tensors on disk to change, after checking that they are the base's."""
    targets = {}
    for name, base in patch.base.items():
        disk_name = checkpoint.resolve(name)
        info = checkpoint.tensors[disk_name]
        if info.dtype not in FLOATS.values():
            raise ModelError(
                what=f"{name} is stored quantised",
                got=dtype_name(info.dtype),
                allowed=", ".join(dtype_name(dtype) for dtype in FLOATS.values()),
                fix="apply the patch to the model as it was before quantisation",
            )
        if BaseTensor((got := info.fingerprint()), info.dtype, info.shape) != base:
            raise mismatch(name, base, got, info.shape)
        targets[name] = [info, *_tied_copies(checkpoint, disk_name, got)]
    return targets


def _tied_copies(checkpoint: Checkpoint, name: str, expected: str) -> list[TensorInfo]:
    """Further copies on disk of an embedding that is tied to the head.

    Left as they were, they would differ from it, and transformers would then untie the two.
    """
    info = checkpoint.tensors[name]
    if any(part.isdigit() for part in name.split(".")):
        return []
    return [
        other
        for other_name, other in checkpoint.tensors.items()
        if other_name != name
        and (other.dtype, other.shape) == (info.dtype, info.shape)
        and not any(part.isdigit() for part in other_name.split("."))
        and other.fingerprint() == expected
        and _is_tied(checkpoint)
    ]


def _is_tied(checkpoint: Checkpoint) -> bool:
    from transformers import AutoConfig

    # The default differs by model type, so the raw config does not tell.
    config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    return bool(config.get_text_config().tie_word_embeddings)


def _copied_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """The shards in use, and everything else that holds no weights."""
    shards = {info.file for info in checkpoint.tensors.values()}
    is_sharded = SINGLE not in {file.name for file in shards}
    for file in sorted(checkpoint.directory.rglob("*")):
        relative = file.relative_to(checkpoint.directory)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        is_other_weights = file.suffix.lower() in WEIGHT_SUFFIXES and file not in shards
        is_other_index = file.name.endswith(".index.json") and not (
            is_sharded and str(relative) == INDEX
        )
        if file.is_file() and not (is_hidden or is_other_weights or is_other_index):
            yield file


@contextmanager
def _building(out: Path, needed: int) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place on success, else vanishes."""
    for stale in out.parent.glob(f".{out.name}.*.tmp"):
        owner = stale.name.split(".")[-2]
        if stale.is_dir() and owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(stale)  # an earlier attempt that was killed
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ResourceError(
            what=f"The disk has no room for the patched model in {out.parent}",
            got=f"{free / 1e9:.2f} GB free",
            allowed=f"{needed / 1e9:.2f} GB, the size of the base model",
            fix="free some space, or choose an output directory on another disk (-o)",
        )
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(out):
            work.mkdir()
            yield work
            if out.exists():
                out.rmdir()  # empty, as checked
            work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _copy(source: Path, target: Path) -> Iterator[int]:
    """Copy contents, yielding the bytes of each block. The mode is not copied: bases may be
    read-only."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(BLOCK_BYTES):
            writer.write(block)
            yield len(block)
        writer.flush()
        os.fsync(writer.fileno())
