"""A run's folder: atomic Parquet parts with deterministic names, their listing, and JSON records; local or any fsspec
URL.

A part is written to a temporary name under `.staging` beside the tables, fsynced and renamed (`os.replace`); on an
object store it is one PUT of the finished bytes. So what this package wrote under a part's name is whole, and writing
it twice changes nothing. What else lies in a table's folder (truncated, foreign, oddly named) is listed as a problem
and never read; `examine` looks into the files for copies, damage and parts of other runs (`results.seal`).

A full disk and a store that fails are waited for, with a limit (`Retries`).
"""

import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from xaibatch.errors import RunFolderError
from xaibatch.results import conditional
from xaibatch.results.atomic import create_file, replace_file, sweep
from xaibatch.results.retrying import Retries
from xaibatch.results.schema import TABLES
from xaibatch.results.seal import LENGTH_BYTES, NOT_WHOLE, Footer, SealedFile, crc32_of, footer_bytes, read_footer

RECORD: Final = "run.json"
STAGING: Final = ".staging"
DAMAGED: Final = ".damaged"
"""Ending of a file that was set aside."""

FileT = TypeVar("FileT")
FoundT = TypeVar("FoundT")

_MAGIC: Final = b"PAR1"
_TAIL_BYTES: Final = 1 << 16
"""One request's worth of a file's end: most parts whole, and the footer of nearly all others."""

_LOCAL_READERS: Final = 4
_STORE_READERS: Final = 32
_FILES_A_TASK: Final = 64
_NAMES: Final = re.compile(r"(shard-\d{5,}|compact-[0-9a-f]+)")


class RunFolder:
    """One run's results. `url` is a local path or any fsspec URL; safe to pickle and to open on every worker.

    Methods raise RunFolderError when `retries` are used up, and what the file system raises where waiting cannot help
    (FileNotFoundError, PermissionError).
    """

    def __init__(self, url: str, *, retries: Retries | None = None) -> None:
        self.url = str(url)
        self.retries = retries or Retries()
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise RunFolderError(f"cannot use the run folder {self.url!r}: {' '.join(str(error).split())}") from None
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
        try:
            return bool(self._retry(lambda: self._fs.exists(self.path(*parts)), f"look for {parts[-1]!r}"))
        except OSError as error:
            raise RunFolderError(f"cannot look for {self.path(*parts)!r}: {error}") from error

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
            try:
                return create_file(Path(target), content, self._staging)
            except OSError as error:
                raise RunFolderError(f"cannot write {target!r}: {error}") from error
        return bool(self._retry(lambda: conditional.create(self._fs, content, target), f"write {target!r}"))

    def tag(self, *parts: str) -> str:
        """What `replace_tagged` asks for: an S3 object's ETag; empty on other stores and local folders. Raises
        FileNotFoundError where S3 has no such object."""
        if self._local or not conditional.has_tags(self._fs):
            return ""
        target = self.path(*parts)
        return str(self._retry(lambda: conditional.tag(self._fs, target), f"look for {target!r}"))

    def replace_tagged(self, content: bytes, tag: str, *parts: str) -> bool:
        """Write an S3 object only while its ETag is `tag`; False where it is another, or the object is gone."""
        target = self.path(*parts)
        return bool(self._retry(lambda: conditional.replace(self._fs, content, tag, target), f"write {target!r}"))

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

    def write_part(self, table: str, part: str, rows: pa.Table, *, run_id: str = "") -> None:
        """Write `<table>/<part>.parquet` atomically, sealed as that part of the run `run_id`; `rows` must have the
        table's schema."""
        self.write_bytes(part_bytes(table, part, rows, run_id=run_id), table, f"{part}.parquet")

    def parts(self, table: str) -> dict[str, str]:
        """Part name (path below the table without `.parquet`) -> full path, sorted; broken or foreign files left
        out."""
        return self.listing(table)[0]

    def problems(self, table: str) -> dict[str, str]:
        """Files in a table's folder that are not whole parts: path -> what is wrong."""
        return self.listing(table)[1]

    def listing(self, table: str, *, whole: bool = True) -> tuple[dict[str, str], dict[str, str]]:
        """`parts` and `problems` from one listing. Without `whole`, for whoever has `examine` look into the files next,
        no local file is opened to see whether it is one."""
        files = list(self._files(table))
        parts = {name: path for name, path, problem in files if not problem}
        problems = {path: problem for _, path, problem in files if problem}
        if whole and self._local:
            fine = self._of_each(list(parts.values()), _whole)
            problems |= {path: NOT_WHOLE for path, is_fine in zip(parts.values(), fine, strict=True) if not is_fine}
            parts = {name: path for name, path in parts.items() if path not in problems}
        return parts, problems

    def run_id(self) -> str:
        """The id that the run's record gives its parts; empty where there is no record, or none that has one."""
        try:
            record = self.read_json(RECORD)
        except (FileNotFoundError, ValueError):
            return ""
        return str(record.get("id", "")) if isinstance(record, dict) else ""

    def examine(
        self, table: str, parts: Mapping[str, str], *, run_id: str, contents: bool = False
    ) -> dict[str, Footer]:
        """Part name -> footer of each of `parts` (name -> path), with what keeps the file from being that part of the
        run `run_id`.

        One read of 64 KiB a file, many at a time; a file that fits in it is checked to its last byte. `contents` reads
        larger local files whole as well. Those of an object store are not read whole for this: stores check what they
        keep, and whoever reads the rows finds damage by the pages' checksums.
        """

        def look(part: tuple[str, str]) -> Footer:
            return self._footer(part[1], table, part[0], run_id, contents)

        return dict(zip(parts, self._of_each(list(parts.items()), look), strict=True))

    def set_aside(self, path: str) -> None:
        """Rename a file of a table so that it is no longer taken for a part."""
        self._retry(lambda: self._fs.mv(path, path + DAMAGED), f"rename {path!r}")

    def read(self, table: str) -> pa.Table:
        """All rows of a table, parts in sorted order (an empty table of the right schema if there is none); the column
        `run` is the folder's name."""
        schema = TABLES[table]
        tables = [
            self._named(self._read(path).select(schema.names).cast(schema)) for path in self.parts(table).values()
        ]
        return pa.concat_tables(tables).unify_dictionaries() if tables else schema.empty_table()

    def sweep(self) -> int:
        """Remove temporary files that a killed writer left; returns how many. Call only while holding the run's lock.

        Folders in there belong to a compaction, which another holder of the lock may have thought dead: only forgotten
        ones are removed.
        """
        return sweep(self._staging) if self._local else 0

    @property
    def _staging(self) -> Path:
        return Path(self.path(STAGING))

    def _read(self, path: str) -> pa.Table:
        def read() -> pa.Table:
            with self._fs.open(path, "rb") as file:
                return pq.read_table(file, page_checksum_verification=True)

        try:
            return self._retry(read, f"read {path!r}")
        except (pa.ArrowException, OSError) as error:
            raise RunFolderError(
                f"{path!r} cannot be read as a part ({' '.join(str(error).split())}): "
                "remove it and run the same command again"
            ) from None

    def _named(self, rows: pa.Table) -> pa.Table:
        codes = pa.array([0] * rows.num_rows, pa.int32())
        return rows.set_column(
            rows.schema.get_field_index("run"),
            rows.schema.field("run"),
            pa.DictionaryArray.from_arrays(codes, [self.name]),
        )

    def _of_each(self, files: Sequence[FileT], look: Callable[[FileT], FoundT]) -> list[FoundT]:
        """What `look` finds in each of many files, in their order, several at a time."""
        tasks = [files[start : start + _FILES_A_TASK] for start in range(0, len(files), _FILES_A_TASK)]
        with ThreadPoolExecutor(_LOCAL_READERS if self._local else _STORE_READERS) as pool:
            return [found for chunk in pool.map(lambda task: [look(file) for file in task], tasks) for found in chunk]

    def _footer(self, path: str, table: str, part: str, run_id: str, contents: bool) -> Footer:
        def look() -> Footer:
            tail = self._tail(path, _TAIL_BYTES)
            if footer_bytes(tail) > len(tail) == _TAIL_BYTES:
                tail = self._tail(path, footer_bytes(tail))
            is_whole = len(tail) < _TAIL_BYTES
            footer = read_footer(tail, is_whole=is_whole, table=table, part=part, run_id=run_id)
            if footer.problem or footer.num_bytes < 0 or is_whole or not (contents and self._local):
                return footer
            with open(path, "rb") as file:
                problem = footer.problem_of(crc32_of(file.read, footer.num_bytes))
            return replace(footer, problem=problem)

        try:
            found: Footer = self._retry(look, f"read {path!r}")
            return found
        except OSError as error:
            return Footer(problem=f"cannot be read ({' '.join(str(error).split())})", metadata={})

    def _tail(self, path: str, num_bytes: int) -> bytes:
        """The file's last bytes, or all of it where it is smaller; nothing of a local file that does not begin as
        Parquet does."""
        if not self._local:
            tail: bytes = self._fs.cat_file(path, start=-num_bytes)
            return tail
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return b""
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            return file.read()

    def _files(self, table: str) -> Iterator[tuple[str, str, str]]:
        """Name, path and problem (empty if there is none) of every file of a table, by what a listing says of it."""
        folder = self.path(table)
        found: dict[str, Any] = self._retry(lambda: self._find(folder), f"list {folder!r}")
        for path, info in sorted(found.items()):
            name = path[len(folder) :].strip("/")
            part, dot, suffix = name.rpartition(".")
            if dot + suffix != ".parquet":
                yield name, path, "set aside: it was damaged" if name.endswith(DAMAGED) else "not a Parquet part"
            elif not _NAMES.fullmatch(posixpath.basename(part)):
                yield name, path, "a foreign name: no part is called so"
            elif info["size"] < 2 * LENGTH_BYTES:
                yield name, path, NOT_WHOLE
            else:
                yield part, path, ""

    def _find(self, folder: str) -> dict[str, Any]:
        self._fs.invalidate_cache()
        if not self._fs.exists(folder):
            return {}
        found: dict[str, Any] = self._fs.find(folder, detail=True)
        return found


def part_bytes(table: str, part: str, rows: pa.Table, *, run_id: str = "") -> bytes:
    """A part as a sealed Parquet file; `rows` must have the table's schema."""
    if not rows.schema.equals(TABLES[table]):
        raise ValueError(f"rows of {table!r} have another schema:\n{rows.schema}")
    sink = io.BytesIO()
    with SealedFile(sink, rows.schema, table=table, part=part, run_id=run_id) as file:
        file.write(rows)
    return sink.getvalue()


def _opened(url: str, retries: Retries) -> RunFolder:
    return RunFolder(url, retries=retries)


def _whole(path: str) -> bool:
    """Both magic numbers in place and a footer that fits (a file that something else truncated or overwrote has
    not)."""
    with open(path, "rb") as file:
        head = file.read(len(_MAGIC))
        size = file.seek(0, os.SEEK_END)
        file.seek(-LENGTH_BYTES, os.SEEK_END)
        tail = head + file.read(LENGTH_BYTES)
    return head == _MAGIC and 0 < footer_bytes(tail) <= size - len(_MAGIC)
