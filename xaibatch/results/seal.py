"""A part's rows in, a Parquet file out that says which part of which run it is; a file's last bytes in, what keeps it
from being that part out.

The seal is one JSON value in the footer's key-value metadata, which any reader of Parquet shows: run id, table, part,
and CRC-32 and length of everything before the footer. Each page carries Parquet's own checksum beside it, so that
damage is also found by whoever reads rows and no seals.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq

from xaibatch.results.schema import TABLES

SEAL: Final = b"xaibatch.seal"
LENGTH_BYTES: Final = 8
"""What follows the footer: its length (4 bytes) and the magic number."""

_MAGIC: Final = b"PAR1"
NOT_WHOLE: Final = "truncated or not Parquet"


class SealedFile:
    """Context manager that writes row groups to `file` and seals them on leaving; nothing is sealed after an error."""

    def __init__(self, file: IO[bytes], schema: pa.Schema, *, table: str, part: str, run_id: str) -> None:
        self._sink = _Summed(file)
        self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd", write_page_checksum=True)
        self._names = {"run": run_id, "table": table, "part": part}

    def write(self, rows: pa.Table, row_group_size: int | None = None) -> None:
        self._writer.write_table(rows, row_group_size=row_group_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            seal = {**self._names, "bytes": self._sink.num_bytes, "crc32": self._sink.crc32}
            self._writer.add_key_value_metadata({SEAL.decode(): json.dumps(seal)})
        self._writer.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Footer:
    """A file's footer. `problem`: why it is not the part that its name says, empty where it is; `num_bytes` and `crc32`
    of the rows' pages as sealed (-1 where there is no seal)."""

    problem: str
    metadata: Mapping[bytes, bytes]
    num_bytes: int = -1
    crc32: int = -1

    def problem_of(self, crc32: int) -> str:
        """What is wrong with pages of this checksum."""
        return "" if self.crc32 in (-1, crc32) else "damaged: its content is not what was written"


def footer_bytes(tail: bytes) -> int:
    """How many bytes at the end of the file the footer takes, by a file's last bytes; 0 where it is no Parquet."""
    if len(tail) < LENGTH_BYTES + len(_MAGIC) or tail[-len(_MAGIC) :] != _MAGIC:
        return 0
    return int.from_bytes(tail[-LENGTH_BYTES : -len(_MAGIC)], "little") + LENGTH_BYTES


def read_footer(tail: bytes, *, is_whole: bool, table: str, part: str, run_id: str) -> Footer:
    """The footer in a file's last bytes, at least `footer_bytes` of them; `is_whole` where they are all of them.

    An empty `run_id` (a run of an earlier version) accepts every run's parts, and files without a seal.
    """
    length = footer_bytes(tail)
    if not length or length > len(tail):
        return Footer(problem=NOT_WHOLE, metadata={})
    try:
        found = pq.read_metadata(pa.BufferReader(tail))
        metadata: Mapping[bytes, bytes] = found.metadata or {}
        seal: Any = json.loads(metadata.get(SEAL, b"{}"))
        if not seal:
            return Footer(problem=_unsealed(found, table, run_id), metadata=metadata)
        num_bytes, crc32 = int(seal["bytes"]), int(seal["crc32"])
        problem = _other(seal, table, part, run_id)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        return Footer(problem=f"{NOT_WHOLE} ({str(error).splitlines()[0]})", metadata={})
    if is_whole and not problem:
        problem = NOT_WHOLE if len(tail) != num_bytes + length else ""
    footer = Footer(problem=problem, metadata=metadata, num_bytes=num_bytes, crc32=crc32)
    if is_whole and not problem:
        problem = footer.problem_of(zlib.crc32(memoryview(tail)[:num_bytes]))
    return Footer(problem=problem, metadata=metadata, num_bytes=num_bytes, crc32=crc32)


def crc32_of(read: Callable[[int], bytes], num_bytes: int, block_bytes: int = 1 << 20) -> int:
    """CRC-32 of the next `num_bytes` that `read` gives."""
    total = 0
    while num_bytes > 0 and (block := read(min(num_bytes, block_bytes))):
        total, num_bytes = zlib.crc32(block, total), num_bytes - len(block)
    return total


def _other(seal: Mapping[str, Any], table: str, part: str, run_id: str) -> str:
    if seal["table"] != table:
        return f"a part of the table {seal['table']!r}"
    if seal["part"] != part:
        return f"a copy of the part {seal['part']!r}"
    return "a part of another run" if run_id and seal["run"] != run_id else ""


def _unsealed(found: Any, table: str, run_id: str) -> str:
    names = found.schema.to_arrow_schema().names
    missing = [name for name in TABLES[table].names if name not in names]
    if missing:
        return f"not a part of {table!r}: no column {', '.join(missing)}"
    return "no part of this run: it bears no seal" if run_id else ""


class _Summed:
    """A binary file that counts and sums what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes = self.crc32 = 0
        self.closed = False

    def write(self, content: bytes) -> int:
        self.crc32 = zlib.crc32(content, self.crc32)
        self.num_bytes += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The file is its opener's to close."""
