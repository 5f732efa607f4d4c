"""SQL over runs in, an Arrow table out; DuckDB sees the four tables and nothing else, and can change nothing."""

import logging
from collections.abc import Iterable, Sequence

import duckdb
import pyarrow as pa

from xaibatch.errors import UsageError
from xaibatch.results.frames import Frame, open_runs
from xaibatch.results.schema import TABLES

_LOG = logging.getLogger(__name__)

_LOCK = (
    "SET enable_external_access = false",
    "SET python_enable_replacements = false",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET lock_configuration = true",
)
_READING = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN}


def query(runs: str | Sequence[str], sql: str, *, threads: int | None = None) -> pa.Table:
    """Run one SELECT over the views `scores`, `predictions`, `maps` and `failures` of one or several runs.

    runs: paths or URLs; the column `run` (last part of the path) tells them apart. The parts reach DuckDB as Arrow
    data sets, so it never opens a file itself: other files, extensions, COPY and ATTACH are refused, and the
    configuration is locked. Files that are not whole parts are left out and named in a warning of the log; one whose
    damage shows only when its rows are read ends the query (RunFolderError names it). Raises UsageError for anything
    that is not one SELECT (also EXPLAIN), and for SQL that DuckDB does not accept, with its own message.
    """
    opened = open_runs([runs] if isinstance(runs, str) else runs)
    folders = tuple(run.folder for run in opened)
    with duckdb.connect(":memory:", config={"threads": threads} if threads else {}) as connection:
        _check_statement(connection, sql)
        frames = [Frame(table, folders) for table in _mentioned(sql, TABLES)]
        for frame in frames:
            for path, problem in frame.problems.items():
                _LOG.warning("left out %s: %s", path, problem)
            connection.register(frame.table, frame.dataset(for_sql=True))
        for setting in _LOCK:
            connection.execute(setting)
        try:
            return connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            if "reading the stream" in str(error):  # the rows, not the SQL
                raise next((f for f in frames if f.damaged()), frames[0]).unreadable(error) from None
            raise UsageError(f"the query failed: {error}") from None


def _check_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise UsageError(f"this is not SQL that DuckDB understands: {error}") from None
    if len(statements) != 1 or statements[0].type not in _READING:
        kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
        raise UsageError(f"a query is one SELECT over {', '.join(TABLES)}; received {kinds}")


def _mentioned(sql: str, tables: Iterable[str]) -> list[str]:
    """Tables whose name occurs in the text: the parts of others need not be listed."""
    lowered = sql.lower()
    return [table for table in tables if table in lowered]
