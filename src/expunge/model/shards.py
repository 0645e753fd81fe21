"""safetensors files, read and overwritten without loading them.

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
