"""A run's many small parts in, few large ones out, safe against a kill at any moment; which parts a listing stands for.

A compact part, `<table>/compact-<hash>.parquet`, carries in its schema's metadata (`xaibatch.parts`) the names of
the parts whose rows it holds. It is written whole before any of them is removed, and a reader ignores a part that a
compact one names. So a kill between the two leaves every row exactly once, and a resume still sees every finished cell.
"""

import hashlib
import json
import os
import posixpath
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from xaibatch.results.lock import RunLock
from xaibatch.results.parts import STAGING, RunFolder
from xaibatch.results.schema import TABLES

PREFIX: Final = "compact-"
METADATA_KEY: Final = b"xaibatch.parts"
ROWS_PER_GROUP: Final = 1_000_000
BYTES_PER_GROUP: Final = 256 * 2**20
"""A row group ends at whichever comes first; maps reach the bytes long before the rows."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The parts of one table: what to read (name -> path), what a compact part already holds (name -> path of a file
    that is still there), every finished part's name, and files that cannot be read (path -> what is wrong)."""

    readable: Mapping[str, str]
    leftover: Mapping[str, str]
    present: frozenset[str]
    problems: Mapping[str, str]


def list_parts(folder: RunFolder, table: str) -> Listing:
    """List a table's parts. Footers are read, so that a truncated or foreign file is found here and not in a query."""
    filesystem = open_filesystem(folder)
    good: dict[str, str] = {}
    held: set[str] = set()
    problems = dict(folder.problems(table))
    for name, path in folder.parts(table).items():
        problem, metadata = _footer(filesystem, path, table)
        if problem:
            problems[path] = problem
            continue
        good[name] = path
        if posixpath.basename(name).startswith(PREFIX):
            held |= set(json.loads(metadata.get(METADATA_KEY, b"[]")))
    return Listing(
        readable={name: path for name, path in good.items() if name not in held},
        leftover={name: path for name, path in good.items() if name in held},
        present=frozenset(name for name in {*good, *held} if not posixpath.basename(name).startswith(PREFIX)),
        problems=problems,
    )


def present_parts(folder: RunFolder, table: str, names: Mapping[str, str] | None = None) -> frozenset[str]:
    """Names of all finished parts, merged or not: what a resume need not do again. Only the footers of compact parts
    are read. `names` is `folder.parts(table)` where the caller has it already."""
    names = folder.parts(table) if names is None else names
    filesystem = open_filesystem(folder)
    present = set(names)
    for name, path in names.items():
        if posixpath.basename(name).startswith(PREFIX):
            present.discard(name)
            problem, metadata = _footer(filesystem, path, table)
            if not problem:
                present |= set(json.loads(metadata.get(METADATA_KEY, b"[]")))
    return frozenset(present)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compacted:
    """What `compact` did to one table; `num_bytes` is the size of the compact part."""

    table: str
    num_parts: int
    num_rows: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.table}: {self.num_parts} parts to one, {self.num_rows:,} rows, {self.num_bytes / 1e6:.1f} MB"


class CompactReport(tuple[Compacted, ...]):
    """One entry for each table that had something to merge; prints as lines for people."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing to merge"


def compact(url: str) -> CompactReport:
    """Merge the flat parts of every table into one compact part each; a second call finds nothing to merge.

    Row groups hold ROWS_PER_GROUP rows or BYTES_PER_GROUP bytes. Parts that a resumed run adds later are merged by the
    next call into a further compact part. Raises RunFolderError while a run or another compaction holds the folder.
    """
    folder = RunFolder(url)
    with RunLock(folder):
        return CompactReport(done for table in TABLES if (done := _compact_table(folder, table)) is not None)


def open_filesystem(folder: RunFolder) -> AbstractFileSystem:
    return fsspec.core.url_to_fs(folder.url)[0]


def _compact_table(folder: RunFolder, table: str) -> Compacted | None:
    filesystem = open_filesystem(folder)
    listing = list_parts(folder, table)
    _remove(filesystem, listing.leftover)
    flat = {name: path for name, path in listing.readable.items() if not posixpath.basename(name).startswith(PREFIX)}
    if len(flat) < 2:
        return None
    names = sorted(flat)
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    schema = TABLES[table].with_metadata({METADATA_KEY: json.dumps(names).encode()})
    with tempfile.TemporaryDirectory(dir=_staging(folder)) as temporary:
        merged = Path(temporary) / "merged.parquet"
        num_rows = _merge(filesystem, table, schema, [flat[name] for name in names], merged)
        num_bytes = merged.stat().st_size
        target = folder.path(table, f"{PREFIX}{digest}.parquet")
        if folder.is_local:
            with merged.open("rb") as file:
                os.fsync(file.fileno())
            merged.replace(target)
        else:
            filesystem.put_file(str(merged), target)
    _remove(filesystem, flat)
    return Compacted(table=table, num_parts=len(flat), num_rows=num_rows, num_bytes=num_bytes)


def _merge(filesystem: AbstractFileSystem, table: str, schema: pa.Schema, paths: Sequence[str], target: Path) -> int:
    num_rows = 0
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for rows in _groups(filesystem, table, paths):
            writer.write_table(rows.cast(schema), row_group_size=ROWS_PER_GROUP)
            num_rows += rows.num_rows
    return num_rows


def _groups(filesystem: AbstractFileSystem, table: str, paths: Sequence[str]) -> Iterator[pa.Table]:
    """Parts put together until a row group is full, in the order of their names."""
    waiting: list[pa.Table] = []
    for path in paths:
        with filesystem.open(path, "rb") as file:
            waiting.append(pq.read_table(file).select(TABLES[table].names).cast(TABLES[table]))
        if (
            sum(rows.num_rows for rows in waiting) >= ROWS_PER_GROUP
            or sum(rows.nbytes for rows in waiting) >= BYTES_PER_GROUP
        ):
            yield pa.concat_tables(waiting).unify_dictionaries().combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).unify_dictionaries().combine_chunks()


def _footer(filesystem: AbstractFileSystem, path: str, table: str) -> tuple[str, Mapping[bytes, bytes]]:
    """What keeps a file from being a part of the table ('' if nothing), and its schema's metadata."""
    try:
        with filesystem.open(path, "rb") as file:
            found = pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        return f"truncated or not Parquet ({str(error).splitlines()[0]})", {}
    missing = [name for name in TABLES[table].names if name not in found.names]
    problem = f"not a part of {table!r}: no column {', '.join(missing)}" if missing else ""
    return problem, found.metadata or {}


def _remove(filesystem: AbstractFileSystem, parts: Mapping[str, str]) -> None:
    for path in parts.values():
        filesystem.rm_file(path)


def _staging(folder: RunFolder) -> str | None:
    """Beside the tables, so that the rename stays within one file system; the system's own place for an object
    store."""
    if not folder.is_local:
        return None
    staging = folder.path(STAGING)
    Path(staging).mkdir(parents=True, exist_ok=True)
    return staging
