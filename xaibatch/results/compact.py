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
from typing import Final, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from xaibatch.errors import RunFolderError
from xaibatch.results.lock import RunLock
from xaibatch.results.parts import RECORD, STAGING, RunFolder
from xaibatch.results.schema import TABLES
from xaibatch.results.seal import SealedFile

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


Depth = Literal["names", "footers", "contents"]
"""How far a listing looks into files: not at all (but for compact parts' footers), at every footer (which tells copies
and parts of other runs), or at every byte of local files."""


def list_parts(folder: RunFolder, table: str, *, depth: Depth = "footers", run_id: str | None = None) -> Listing:
    """List a table's parts; a file that is not the part its name says is found here and not in a query. `run_id`: whose
    parts they must be, by default that of the folder's record."""
    names, problems = folder.listing(table, whole=depth == "names")
    looked_at = names if depth != "names" else {name: path for name, path in names.items() if is_compact(name)}
    footers = folder.examine(
        table, looked_at, run_id=folder.run_id() if run_id is None else run_id, contents=depth == "contents"
    )
    problems |= {names[name]: footer.problem for name, footer in footers.items() if footer.problem}
    good = {name: path for name, path in names.items() if path not in problems}
    held: set[str] = set()
    for name in filter(is_compact, good):
        held |= set(json.loads(footers[name].metadata.get(METADATA_KEY, b"[]")))
    return Listing(
        readable={name: path for name, path in good.items() if name not in held},
        leftover={name: path for name, path in good.items() if name in held},
        present=frozenset(name for name in {*good, *held} if not is_compact(name)),
        problems=problems,
    )


def is_compact(name: str) -> bool:
    """Whether a part, by its name or path, holds other parts' rows."""
    return posixpath.basename(name).startswith(PREFIX)


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
    next call into a further compact part. Raises RunFolderError for a folder that holds no run, while a run or another
    compaction holds it, and where a file cannot be read, written or removed (full disk): every row is still there once.
    """
    folder = RunFolder(url)
    if not folder.exists(RECORD):
        raise RunFolderError(
            f"{url!r} holds no run: there is no {RECORD} in it. Expected a folder that `xaibatch evaluate` wrote"
        )
    with RunLock(folder):
        return CompactReport(done for table in TABLES if (done := _try_to_compact(folder, table)) is not None)


def open_filesystem(folder: RunFolder) -> AbstractFileSystem:
    return fsspec.core.url_to_fs(folder.url)[0]


def _try_to_compact(folder: RunFolder, table: str) -> Compacted | None:
    try:
        return _compact_table(folder, table)
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(
            f"cannot merge the parts of {table!r} in {folder.url!r}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}. Every row is still there once. Mend the cause (a merge needs as much "
            "free space as the table has) and run `xaibatch compact` again"
        ) from error


def _compact_table(folder: RunFolder, table: str) -> Compacted | None:
    filesystem, run_id = open_filesystem(folder), folder.run_id()
    listing = list_parts(folder, table, depth="contents", run_id=run_id)
    _remove(filesystem, listing.leftover)
    flat = {name: path for name, path in listing.readable.items() if not is_compact(name)}
    if len(flat) < 2:
        return None
    names = sorted(flat)
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    schema = TABLES[table].with_metadata({METADATA_KEY: json.dumps(names).encode()})
    with tempfile.TemporaryDirectory(dir=_staging(folder)) as temporary:
        merged = Path(temporary) / "merged.parquet"
        with (
            merged.open("wb") as file,
            SealedFile(file, schema, table=table, part=f"{PREFIX}{digest}", run_id=run_id) as sealed,
        ):
            num_rows = _merge(filesystem, table, schema, [flat[name] for name in names], sealed)
        num_bytes = merged.stat().st_size
        target = folder.path(table, f"{PREFIX}{digest}.parquet")
        if folder.is_local:
            with merged.open("rb") as written:
                os.fsync(written.fileno())
            merged.replace(target)
        else:
            folder.retries.call(lambda: filesystem.put_file(str(merged), target), what=f"write {target!r}", local=False)
    _remove(filesystem, flat)
    return Compacted(table=table, num_parts=len(flat), num_rows=num_rows, num_bytes=num_bytes)


def _merge(
    filesystem: AbstractFileSystem, table: str, schema: pa.Schema, paths: Sequence[str], target: SealedFile
) -> int:
    num_rows = 0
    for rows in _groups(filesystem, table, paths):
        target.write(rows.cast(schema), ROWS_PER_GROUP)
        num_rows += rows.num_rows
    return num_rows


def _groups(filesystem: AbstractFileSystem, table: str, paths: Sequence[str]) -> Iterator[pa.Table]:
    """Parts put together until a row group is full, in the order of their names."""
    waiting: list[pa.Table] = []
    num_rows = num_bytes = 0
    for path in paths:
        with filesystem.open(path, "rb") as file:
            rows = pq.read_table(file, page_checksum_verification=True)
            waiting.append(rows.select(TABLES[table].names).cast(TABLES[table]))
        num_rows, num_bytes = num_rows + waiting[-1].num_rows, num_bytes + waiting[-1].nbytes
        if num_rows >= ROWS_PER_GROUP or num_bytes >= BYTES_PER_GROUP:
            yield pa.concat_tables(waiting).unify_dictionaries().combine_chunks()
            waiting, num_rows, num_bytes = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting).unify_dictionaries().combine_chunks()


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
