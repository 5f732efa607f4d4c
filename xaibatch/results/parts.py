"""A run's folder: atomic Parquet parts with deterministic names, their listing, and JSON records; local or any fsspec URL.

A part is written to a temporary name under `.staging` beside the tables, fsynced and renamed (`os.replace`); on an object
store it is one PUT of the finished bytes. So whatever bears a part's name is whole, and writing it twice changes nothing.
"""

import contextlib
import io
import json
import os
import posixpath
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from xaibatch.errors import RunFolderError
from xaibatch.results.schema import TABLES

STAGING = ".staging"
_MAGIC = b"PAR1"


class RunFolder:
    """One run's results. `url` is a local path or any fsspec URL; safe to pickle and to open on every worker."""

    def __init__(self, url: str) -> None:
        self.url = str(url)
        self._fs, self._root = fsspec.core.url_to_fs(self.url)
        self._local = isinstance(self._fs, LocalFileSystem)

    def __reduce__(self) -> tuple[type["RunFolder"], tuple[str]]:
        return (RunFolder, (self.url,))

    @property
    def name(self) -> str:
        """Last part of the URL: the `run` column of every table."""
        return posixpath.basename(self._root.rstrip("/"))

    @property
    def is_local(self) -> bool:
        return self._local

    def path(self, *parts: str) -> str:
        return posixpath.join(self._root, *parts)

    def create(self) -> None:
        """Make the folder and prove that it can be written; raise RunFolderError otherwise."""
        try:
            self._fs.makedirs(self._root, exist_ok=True)
            self.write_bytes(b"", ".writable")
            self._fs.rm_file(self.path(".writable"))
        except Exception as error:
            raise RunFolderError(f"cannot write to the output folder {self.url!r}: {error}. Choose another --output") from None

    def exists(self, *parts: str) -> bool:
        return bool(self._fs.exists(self.path(*parts)))

    # -- bytes and JSON

    def write_bytes(self, content: bytes, *parts: str) -> None:
        """Write a whole file or nothing."""
        target = self.path(*parts)
        if not self._local:
            self._fs.pipe_file(target, content)
            return
        staging = self.path(STAGING)
        os.makedirs(staging, exist_ok=True)
        os.makedirs(posixpath.dirname(target), exist_ok=True)
        temporary = posixpath.join(staging, uuid.uuid4().hex)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    def create_file(self, content: bytes, *parts: str) -> bool:
        """Write a whole file that does not exist yet; False where it does (exactly one of several callers gets True on a
        local folder and on stores with conditional writes)."""
        target = self.path(*parts)
        if self._local:
            return _create_local(content, target, self.path(STAGING))
        try:
            self._fs.pipe_file(target, content, mode="create")
        except FileExistsError:
            return False
        except (TypeError, ValueError, NotImplementedError):  # a store without conditional writes
            self._fs.invalidate_cache()
            if self._fs.exists(target):
                return False
            self._fs.pipe_file(target, content)
        return True

    def remove(self, *parts: str) -> None:
        """Remove a file; raises FileNotFoundError where there is none."""
        self._fs.rm_file(self.path(*parts))

    def read_bytes(self, *parts: str) -> bytes:
        content: bytes = self._fs.cat_file(self.path(*parts))
        return content

    def write_json(self, value: Any, *parts: str) -> None:
        self.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), *parts)

    def read_json(self, *parts: str) -> Any:
        return json.loads(self.read_bytes(*parts))

    # -- parts

    def write_part(self, table: str, part: str, rows: pa.Table) -> None:
        """Write `<table>/<part>.parquet` atomically; `rows` must have the table's schema."""
        if not rows.schema.equals(TABLES[table]):
            raise ValueError(f"rows of {table!r} have another schema:\n{rows.schema}")
        sink = io.BytesIO()
        pq.write_table(rows, sink, compression="zstd")
        self.write_bytes(sink.getvalue(), table, f"{part}.parquet")

    def parts(self, table: str) -> dict[str, str]:
        """Part name (path below the table without `.parquet`) -> full path, sorted; broken or foreign files left out."""
        return {name: path for name, path, problem in self._listing(table) if not problem}

    def problems(self, table: str) -> dict[str, str]:
        """Files in a table's folder that are not whole parts: path -> what is wrong."""
        return {path: problem for _, path, problem in self._listing(table) if problem}

    def read(self, table: str) -> pa.Table:
        """All rows of a table, parts in sorted order (an empty table of the right schema if there is none)."""
        tables = [self._read(path).select(TABLES[table].names).cast(TABLES[table]) for path in self.parts(table).values()]
        return pa.concat_tables(tables).unify_dictionaries() if tables else TABLES[table].empty_table()

    def sweep(self) -> int:
        """Remove temporary files that a killed writer left; returns how many. Call only while holding the run's lock."""
        staging = self.path(STAGING)
        if not self._local or not os.path.isdir(staging):
            return 0
        orphans = list(os.scandir(staging))
        for orphan in orphans:
            os.unlink(orphan.path)
        return len(orphans)

    def _read(self, path: str) -> pa.Table:
        with self._fs.open(path, "rb") as file:
            return pq.read_table(file)

    def _listing(self, table: str) -> Iterator[tuple[str, str, str]]:
        folder = self.path(table)
        if not self._fs.exists(folder):
            return
        for path, info in sorted(self._fs.find(folder, detail=True).items()):
            name = path[len(folder) :].strip("/")
            if not name.endswith(".parquet"):
                yield name, path, "not a Parquet part"
            elif info["size"] < 12 or (self._local and not _whole(path)):
                yield name, path, "truncated or not Parquet"
            else:
                yield name.removesuffix(".parquet"), path, ""


def _create_local(content: bytes, target: str, staging: str) -> bool:
    """Link a finished temporary file to its name, which fails where the name is taken."""
    os.makedirs(staging, exist_ok=True)
    temporary = posixpath.join(staging, uuid.uuid4().hex)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.link(temporary, target)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return True


def _whole(path: str) -> bool:
    """Both magic numbers in place (a local file that something else truncated or overwrote has not)."""
    with open(path, "rb") as file:
        head = file.read(4)
        file.seek(-4, os.SEEK_END)
        return head == _MAGIC and file.read(4) == _MAGIC
