"""A run's folder in, its four tables out: as pandas, Arrow or a DuckDB relation, read only, from a local path or any
fsspec URL."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from xaibatch.errors import RunFolderError
from xaibatch.results.compact import Listing, list_parts, open_filesystem
from xaibatch.results.parts import RECORD, RunFolder
from xaibatch.results.schema import TABLES

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

_FORMAT = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)


@dataclass(frozen=True)
class Frame:
    """One table of one or several runs; nothing is read before one of the methods is called.

    `table` is scores, predictions, maps or failures; the columns are those of `results.schema`. `run` is the name that
    a run's folder has now, whatever it was called when the rows were written. `known`: listings that were just made.
    """

    table: str
    folders: tuple[RunFolder, ...]
    known: tuple[Listing, ...] | None = None

    @cached_property
    def listings(self) -> tuple[Listing, ...]:
        """The table's parts, one listing a folder."""
        return self.known or tuple(list_parts(folder, self.table) for folder in self.folders)

    @property
    def problems(self) -> dict[str, str]:
        """Files of the table that cannot be read as parts: path -> what is wrong."""
        return {path: problem for listing in self.listings for path, problem in listing.problems.items()}

    def dataset(self, *, for_sql: bool = False) -> ds.Dataset:
        """All readable parts as one Arrow data set; `for_sql` widens float16, which DuckDB does not know, to
        float32."""
        schema = _widened(TABLES[self.table]) if for_sql else TABLES[self.table]
        children = []
        for folder, listing in zip(self.folders, self.listings, strict=True):
            paths = list(listing.readable.values())
            if paths:
                children.append(
                    ds.FileSystemDataset.from_paths(
                        paths,
                        schema=schema,
                        format=_FORMAT,
                        filesystem=_arrow_filesystem(folder),
                        partitions=[ds.field("run") == folder.name] * len(paths),  # takes the stored column's place
                    )
                )
        return ds.dataset(children) if children else ds.dataset(schema.empty_table())

    def arrow(self, columns: list[str] | None = None) -> pa.Table:
        """All rows, parts in sorted order; strings stay dictionary-encoded."""
        try:
            return self.dataset().to_table(columns=columns).unify_dictionaries()
        except (pa.ArrowException, OSError) as error:
            raise self.unreadable(error) from error

    def damaged(self) -> dict[str, str]:
        """Files whose rows cannot be read though their footers are whole: path -> what is wrong. Reads every local
        byte."""
        return {
            path: problem
            for folder in self.folders
            for path, problem in list_parts(folder, self.table, depth="contents").problems.items()
            if path not in self.problems
        }

    def unreadable(self, error: Exception) -> RunFolderError:
        """What to say about an error that came while rows were read: names the damaged files."""
        names = "; ".join(f"{path}: {problem}" for path, problem in sorted(self.damaged().items()))
        return RunFolderError(
            f"rows of {self.table!r} cannot be read ({names or ' '.join(str(error).split())}): run the same "
            "`xaibatch evaluate` again, which makes damaged parts anew"
        )

    def pandas(self) -> "pd.DataFrame":
        """All rows as a data frame; dictionary-encoded columns become categories."""
        return self.arrow().to_pandas()

    def duckdb(self) -> "duckdb.DuckDBPyRelation":
        """All rows as a DuckDB relation (filters and column choices reach the Parquet files)."""
        import duckdb

        connection = duckdb.connect(":memory:")
        return connection.from_arrow(self.dataset(for_sql=True))


class Run:
    """One finished or unfinished run; open it with `open_run`."""

    def __init__(self, url: str, listings: Mapping[str, Listing] | None = None) -> None:
        self.folder = RunFolder(url)
        self._listings = listings or {}
        if not self.folder.exists(RECORD):
            raise RunFolderError(
                f"{url!r} holds no run: there is no {RECORD} in it. Expected a folder that `xaibatch evaluate` wrote"
            )

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The content of run.json: configuration, versions, checksums, seed, times, metrics and explainers."""
        try:
            record = self.folder.read_json(RECORD)
        except ValueError as error:
            raise RunFolderError(f"{self.folder.path(RECORD)} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise RunFolderError(f"{self.folder.path(RECORD)} holds {type(record).__name__}, expected an object")
        return record

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's full configuration."""
        config: Mapping[str, Any] = self.record.get("config", {})
        return config

    @cached_property
    def scores(self) -> Frame:
        return self._frame("scores")

    @cached_property
    def predictions(self) -> Frame:
        return self._frame("predictions")

    @cached_property
    def maps(self) -> Frame:
        return self._frame("maps")

    @cached_property
    def failures(self) -> Frame:
        return self._frame("failures")

    def _frame(self, table: str) -> Frame:
        listing = self._listings.get(table)
        return Frame(table, (self.folder,), None if listing is None else (listing,))

    def problems(self) -> dict[str, str]:
        """Files among the parts that cannot be read as such (truncated, foreign, temporary): path -> what is wrong."""
        return {path: problem for name in TABLES for path, problem in getattr(self, name).problems.items()}

    def __repr__(self) -> str:
        return f"Run({self.folder.url!r})"


def open_run(url: str, listings: Mapping[str, Listing] | None = None) -> Run:
    """Open a run's folder (a path, or a URL such as `s3://bucket/runs/a`); raises RunFolderError if it holds no run.

    `listings` of its tables that were just made, by `list_parts`, are not made again.
    """
    return Run(str(url), listings)


def open_runs(urls: Iterable[str]) -> tuple[Run, ...]:
    """Open several runs; their names (last part of the URL) must differ, since the column `run` tells them apart."""
    runs = tuple(open_run(url) for url in urls)
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RunFolderError(
            f"two runs are called {', '.join(map(repr, twice))}: rename a folder, the column `run` tells them apart"
        )
    return runs


def _arrow_filesystem(folder: RunFolder) -> pafs.FileSystem:
    return pafs.LocalFileSystem() if folder.is_local else pafs.PyFileSystem(pafs.FSSpecHandler(open_filesystem(folder)))


def _widened(schema: pa.Schema) -> pa.Schema:
    half, single = pa.list_(pa.float16()), pa.list_(pa.float32())
    return pa.schema([field.with_type(single) if field.type == half else field for field in schema])
