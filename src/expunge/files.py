"""Files are written under a temporary name, then renamed: a reader never sees half a file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expunge.errors import ResourceError

# EDQUOT is missing on some platforms.
DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk that is full or not writable into a ResourceError that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in NOT_WRITABLE:
            raise ResourceError(
                what=f"{path} cannot be written",
                got=str(error),
                allowed="a place where the user running expunge may create files and folders",
                fix="choose another output folder (-o), or mend its permissions",
            ) from error
        if error.errno not in DISK_FULL:
            raise
        raise ResourceError(
            what=f"The disk is full while writing {path.name}",
            got=str(error),
            allowed="enough free space for the file; nothing half-written is left behind",
            fix=f"free some space under {path.parent}, or choose another output folder (-o)",
        ) from error


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path``.

    On any exception the temporary file is removed and ``path`` stays as it was. The bytes
    reach the disk before the rename, so a power cut leaves the old file or the new one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def local_path(name: str | Path) -> Path:
    """``name`` as a path, with ``~`` as the home folder; that of an unknown user stays."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
