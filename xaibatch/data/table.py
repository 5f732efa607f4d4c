"""A CSV or Parquet file in, its rows as text out; blank cells are None, and so are Parquet's nulls."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

from xaibatch.data.storage import one_line, read_bytes
from xaibatch.errors import DataError

Row = dict[str, str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Column names as written, and rows by column name. `where` names the file in messages."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    where: str


def is_table(path: str) -> bool:
    """True for the suffixes `.csv` and `.parquet`."""
    return path.lower().endswith((".csv", ".parquet"))


def read_table(path: str) -> Table:
    """Read the file, local or any fsspec URL. Raises DataError where it does not exist or is no such table."""
    content, where = _content(path)
    return _parquet(content, where) if path.lower().endswith(".parquet") else _csv(content, where)


def columns_of(path: str) -> tuple[str, ...]:
    """The table's column names alone; raises DataError as `read_table` does."""
    content, where = _content(path)
    if path.lower().endswith(".parquet"):
        return _parquet(content, where).columns
    return _csv(content.partition(b"\n")[0], where).columns


def _content(path: str) -> tuple[bytes, str]:
    try:
        return read_bytes(path), path.rpartition("/")[2]
    except FileNotFoundError:
        raise DataError(f"no file at {path!r}") from None
    except OSError as error:
        raise DataError(f"cannot read {path!r}: {one_line(error)}") from None


def _csv(content: bytes, where: str) -> Table:
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        header = tuple(name.strip() for name in next(reader, []))
        rows = tuple(_csv_rows(reader, header, where))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is not a CSV file in UTF-8: {one_line(error)}") from None
    return Table(columns=tuple(filter(None, header)), rows=rows, where=where)


def _csv_rows(reader: Iterator[list[str]], header: tuple[str, ...], where: str) -> Iterator[Row]:
    for number, cells in enumerate(reader, start=2):
        if not any(cells):
            continue
        if len(cells) > len(header):
            raise DataError(
                f"{where}, row {number}: {len(cells)} cells under {len(header)} columns "
                "(a comma inside a value needs quotes)"
            )
        cells += [""] * (len(header) - len(cells))
        yield {name: cell.strip() or None for name, cell in zip(header, cells, strict=True) if name}


def _parquet(content: bytes, where: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{where} is not a Parquet file: {one_line(error)}") from None
    names = tuple(table.column_names)
    columns = [
        [None if cell is None else str(cell).strip() or None for cell in table[name].to_pylist()] for name in names
    ]
    rows = tuple(dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True))
    return Table(columns=names, rows=rows, where=where)
