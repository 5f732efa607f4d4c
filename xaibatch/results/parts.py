"""A run's folder: atomic Parquet parts with deterministic names, their listing, and JSON records; local or any fsspec
URL.

A part is written to a temporary name under `.staging` beside the tables, fsynced and renamed (`os.replace`); on an
object store it is one PUT of the finished bytes. So whatever bears a part's name is whole, and writing it twice changes
nothing. What else lies in a table's folder (truncated, foreign, oddly named) is listed as a problem and never read.

A full disk and a store that fails are waited for, with a limit (`Retries`).
"""

import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from xaibatch.errors import RunFolderError
from xaibatch.results.atomic import create_file, replace_file, sweep
from xaibatch.results.retrying import Retries
from xaibatch.results.schema import TABLES

STAGING: Final = ".staging"

_MAGIC: Final = b"PAR1"
_FOOTER_BYTES: Final = 8
_NAMES: Final = re.compile(r"(shard-\d{5,}|compact-[0-9a-f]+)")


class RunFolder:
    """One run's results. `url` is a local path or any fsspec URL; safe to pickle and to open on every worker.

    Methods raise RunFolderError when `retries` are used up, and what the file system raises where waiting cannot help
    (FileNotFoundError, PermissionError).
    """

    def __init__(self, url: str, *, retries: Retries | None = None) -> None:
        self.url = str(url)
        self.retries = retries or Retries()
        self._fs, self._root = fsspec.core.url_to_fs(self.url)
        self._local = isinstance(self._fs, LocalFileSystem)

    def __reduce__(self) -> tuple[Callable[..., "RunFolder"], tuple[str, Retries]]:
        # a relative path means something else where a worker runs
        return (_opened, (self._root if self._local else self.url, self.retries))

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
            raise RunFolderError(
                f"cannot write to the output folder {self.url!r}: {error}. Choose another --output"
            ) from None

    def exists(self, *parts: str) -> bool:
        return bool(self._retry(lambda: self._fs.exists(self.path(*parts)), f"look for {parts[-1]!r}"))

    # -- bytes and JSON

    def write_bytes(self, content: bytes, *parts: str) -> None:
        """Write a whole file or nothing."""
        target = self.path(*parts)
        try:
            if self._local:
                self._retry(lambda: replace_file(Path(target), content, self._staging), f"write {target!r}")
            else:
                self._retry(lambda: self._fs.pipe_file(target, content), f"write {target!r}")
        except OSError as error:
            raise RunFolderError(f"cannot write {target!r}: {error}") from error

    def impatient(self) -> "RunFolder":
        """The same folder for things that can wait for another time: nothing is tried twice."""
        return RunFolder(self.url, retries=Retries(attempts=1))

    def _retry(self, operation: Callable[[], Any], what: str) -> Any:
        return self.retries.call(operation, what=what, local=self._local)

    def create_file(self, content: bytes, *parts: str) -> bool:
        """Write a whole file that does not exist yet; False where it does (exactly one of several callers gets True on
        a local folder and on stores with conditional writes)."""
        target = self.path(*parts)
        if self._local:
            return create_file(Path(target), content, self._staging)
        return bool(self._retry(lambda: _create_remote(self._fs, content, target), f"write {target!r}"))

    def remove(self, *parts: str) -> None:
        """Remove a file; raises FileNotFoundError where there is none."""
        self._fs.rm_file(self.path(*parts))

    def read_bytes(self, *parts: str) -> bytes:
        target = self.path(*parts)
        content: bytes = self._retry(lambda: self._fs.cat_file(target), f"read {target!r}")
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
        """Part name (path below the table without `.parquet`) -> full path, sorted; broken or foreign files left
        out."""
        return self.listing(table)[0]

    def problems(self, table: str) -> dict[str, str]:
        """Files in a table's folder that are not whole parts: path -> what is wrong."""
        return self.listing(table)[1]

    def listing(self, table: str) -> tuple[dict[str, str], dict[str, str]]:
        """`parts` and `problems` from one listing."""
        files = list(self._files(table))
        return (
            {name: path for name, path, problem in files if not problem},
            {path: problem for _, path, problem in files if problem},
        )

    def read(self, table: str) -> pa.Table:
        """All rows of a table, parts in sorted order (an empty table of the right schema if there is none)."""
        schema = TABLES[table]
        tables = [self._read(path).select(schema.names).cast(schema) for path in self.parts(table).values()]
        return pa.concat_tables(tables).unify_dictionaries() if tables else schema.empty_table()

    def sweep(self) -> int:
        """Remove temporary files that a killed writer left; returns how many. Call only while holding the run's lock.

        Folders in there belong to a compaction, which needs no lock: only forgotten ones are removed.
        """
        return sweep(self._staging) if self._local else 0

    @property
    def _staging(self) -> Path:
        return Path(self.path(STAGING))

    def _read(self, path: str) -> pa.Table:
        def read() -> pa.Table:
            with self._fs.open(path, "rb") as file:
                return pq.read_table(file)

        try:
            return self._retry(read, f"read {path!r}")
        except (pa.ArrowException, OSError) as error:
            raise RunFolderError(
                f"{path!r} cannot be read as a part ({' '.join(str(error).split())}): "
                "remove it and run the same command again"
            ) from None

    def _files(self, table: str) -> Iterator[tuple[str, str, str]]:
        """Name, path and problem (empty if there is none) of every file of a table."""
        folder = self.path(table)
        found: dict[str, Any] = self._retry(lambda: self._find(folder), f"list {folder!r}")
        for path, info in sorted(found.items()):
            name = path[len(folder) :].strip("/")
            part, dot, suffix = name.rpartition(".")
            if dot + suffix != ".parquet":
                yield name, path, "not a Parquet part"
            elif not _NAMES.fullmatch(posixpath.basename(part)):
                yield name, path, "a foreign name: no part is called so"
            elif info["size"] < 2 * _FOOTER_BYTES or (self._local and not _whole(path)):
                yield name, path, "truncated or not Parquet"
            else:
                yield part, path, ""

    def _find(self, folder: str) -> dict[str, Any]:
        self._fs.invalidate_cache()
        if not self._fs.exists(folder):
            return {}
        found: dict[str, Any] = self._fs.find(folder, detail=True)
        return found


def _opened(url: str, retries: Retries) -> RunFolder:
    return RunFolder(url, retries=retries)


def _create_remote(filesystem: Any, content: bytes, target: str) -> bool:
    """A conditional write where the store has one, else a look before the write."""
    try:
        filesystem.pipe_file(target, content, mode="create")
    except FileExistsError:
        return False
    except (TypeError, ValueError, NotImplementedError):
        filesystem.invalidate_cache()
        if filesystem.exists(target):
            return False
        filesystem.pipe_file(target, content)
    return True


def _whole(path: str) -> bool:
    """Both magic numbers in place and a footer that fits (a file that something else truncated or overwrote has
    not)."""
    with open(path, "rb") as file:
        head = file.read(len(_MAGIC))
        size = file.seek(0, os.SEEK_END)
        file.seek(-_FOOTER_BYTES, os.SEEK_END)
        footer = file.read(_FOOTER_BYTES)
    length = int.from_bytes(footer[:4], "little")
    return head == footer[4:] == _MAGIC and length + _FOOTER_BYTES + len(_MAGIC) <= size
