"""Bytes in, a whole local file under its name out, or nothing: temporary file, fsync, rename."""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})

FORGOTTEN_S: Final = 3600.0
"""Age from which a temporary folder belongs to nobody."""


def replace_file(target: Path, content: bytes, staging: Path) -> None:
    """Write `target`, replacing what was there; readers see the old file or the new one. `staging` is a folder of the
    same file system for the temporary file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(content, staging) as temporary:
        temporary.replace(target)


def create_file(target: Path, content: bytes, staging: Path) -> bool:
    """Write `target` only if it does not exist; of several callers exactly one gets True.

    Whole from the start, but on file systems without hard links (exFAT, many mounts of object stores), where a reader
    may see it empty for a moment.
    """
    with _temporary(content, staging) as temporary:
        try:
            target.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_unlinked(target, content)
    return True


def sweep(staging: Path) -> int:
    """Remove files that killed writers left, and folders that nobody used for FORGOTTEN_S seconds; returns how many."""
    num_swept = 0
    for orphan in staging.iterdir() if staging.is_dir() else ():
        if not orphan.is_dir():
            orphan.unlink(missing_ok=True)
        elif time.time() - orphan.stat().st_mtime > FORGOTTEN_S:
            shutil.rmtree(orphan)
        else:
            continue
        num_swept += 1
    return num_swept


def _create_unlinked(target: Path, content: bytes) -> bool:
    try:
        with target.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


@contextmanager
def _temporary(content: bytes, staging: Path) -> Iterator[Path]:
    staging.mkdir(parents=True, exist_ok=True)
    path = staging / uuid.uuid4().hex
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)
