"""safetensors files and directories of them: what they hold, without loading it.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape,
data_offsets; ``__metadata__`` holds strings), then the data. Nothing in it can run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from expunge.errors import ModelError
from expunge.files import replacing

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPES = FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LENGTH_BYTES = 8
# The format's own limit; a larger number means that the first bytes are not a length.
MAX_HEADER_BYTES = 100_000_000
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies on disk.

    Attributes:
        start, end: its bytes in ``file``, counted from the beginning of the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """The tensor, in its dtype on disk, on the CPU. Reads only its own bytes."""
        if self.start == self.end:
            return torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb") as handle:
            handle.seek(self.start)
            raw = bytearray(handle.read(self.end - self.start))
        return torch.frombuffer(raw, dtype=self.dtype).reshape(self.shape)

    def fingerprint(self) -> str:
        """`fingerprint` of the tensor on disk, a block at a time."""
        digest = _digest(self.dtype, self.shape)
        with self.file.open("rb") as handle:
            handle.seek(self.start)
            for at in range(self.start, self.end, BLOCK_BYTES):
                digest.update(handle.read(min(BLOCK_BYTES, self.end - at)))
        return digest.hexdigest()


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and string metadata of a safetensors file, from its header alone.

    Raises ValueError, saying what is wrong, if the file is truncated or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise ValueError(f"{size} bytes, too short for its header: truncated or no safetensors")
        raw = handle.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        data = LENGTH_BYTES + length
        tensors = {name: _entry(path, data, entry) for name, entry in header.items()}
    # A KeyError is a field that is missing; the others, JSON of another kind.
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is damaged ({type(error).__name__}: {error})") from error
    needed = max((info.end for info in tensors.values()), default=data)
    if size < needed:
        raise ValueError(f"truncated: {size} bytes of {needed}")
    return tensors, metadata


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a model directory, by name, from the headers of its shards.

    transformers, too, prefers the single file to the index. Raises ModelError if there are no
    safetensors, or shards are missing, damaged, or do not agree with their index.
    """
    single, index = path / SINGLE, path / INDEX
    if single.exists():
        return _header(single)
    if not index.exists():
        pickles = sorted(file.name for file in path.glob("*.bin"))
        raise ModelError(
            what=f"There are no safetensors weights in {path}",
            got=", ".join(pickles) or "neither " + SINGLE + " nor " + INDEX,
            allowed="safetensors; pickle files (.bin, .pt) can run code and are refused",
            fix="convert with model.save_pretrained(DIR) in a place where you trust the file",
        )
    weight_map = read_json(index, 'an index with a "weight_map"').get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}
    shards = sorted({str(shard) for shard in weight_map.values()})
    missing = [shard for shard in shards if not (path / shard).is_file()]
    outside = [shard for shard in shards if Path(shard).name != shard]
    if not shards or missing or outside:
        raise ModelError(
            what=f"The index of {path} names shards that are not there",
            got=", ".join(outside or missing) or "no shard at all",
            allowed="every shard beside its index",
            fix="download the missing files; an interrupted download leaves such a directory",
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        tensors |= _header(path / shard)
    wrong = [
        name
        for name, shard in weight_map.items()
        if name not in tensors or tensors[name].file.name != shard
    ]
    if wrong:
        raise ModelError(
            what=f"Index and shards of {path} disagree",
            got=f"{wrong[0]} is not in {weight_map[wrong[0]]} alone",
            allowed="each tensor in the shard that the index names",
            fix="download the model again; files of two revisions may be mixed",
        )
    return tensors


def read_json(path: Path, allowed: str) -> dict[str, Any]:
    """A JSON object that a model directory must have; ModelError says what was ``allowed``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (OSError, ValueError) as error:
        raise ModelError(
            what=f"{path.name} cannot be read in {path.parent}",
            got=f"{type(error).__name__}: {error}",
            allowed=allowed,
            fix="give the directory that save_pretrained wrote, or download the model again",
        ) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically. Raises ResourceError on a full disk."""
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except SafetensorError as error:
            # The library reports a full disk in words only.
            if f"os error {errno.ENOSPC}" not in str(error):
                raise
            raise OSError(errno.ENOSPC, str(error)) from error


def raw_bytes(tensor: Tensor) -> memoryview:
    """The little-endian bytes of a tensor; a copy is made only if it is not on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def fingerprint(tensor: Tensor, dtype: torch.dtype) -> str:
    """SHA-256 over dtype, shape and bytes of ``tensor`` cast to ``dtype``, the dtype on disk.

    A model read in float32 from a bfloat16 file thus has the fingerprints of the file.
    """
    digest = _digest(dtype, tuple(tensor.shape))
    digest.update(raw_bytes(tensor.detach().to(dtype)))
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(path)[0]
    except (OSError, ValueError) as error:
        raise ModelError(
            what=f"{path} is no whole safetensors file",
            got=str(error),
            allowed="a complete file; Git LFS pointers and interrupted downloads are not",
            fix="download the file again",
        ) from error


def _digest(dtype: torch.dtype, shape: tuple[int, ...]) -> hashlib._Hash:
    return hashlib.sha256(f"{dtype_name(dtype)} {list(shape)}\n".encode())


def _entry(path: Path, data: int, entry: dict[str, Any]) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is none of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(f"its header is damaged (shape {shape}, offsets {begin} to {end})")
    return TensorInfo(path, dtype, shape, data + begin, data + end)
