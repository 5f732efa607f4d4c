"""Commands on finished runs: `query`, `report`, `summary`, `compact`, `compare`, `export`."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

Argument = typer.Argument
Option = typer.Option

Run = Annotated[str, Argument(help="run folder, local or any URL")]


class Format(StrEnum):
    """How `query` prints."""

    table = "table"
    csv = "csv"
    json = "json"


def add_to(app: typer.Typer) -> None:
    for command in (query, summary, report, compact, compare, export):
        app.command(command.__name__)(command)


def query(
    runs: Annotated[list[str], Argument(help="one or more run folders, then the SQL")],
    format_: Annotated[Format, Option("--format", help="table, csv or json (one object a line)")] = Format.table,
    max_rows: Annotated[int, Option(help="rows that the table shows")] = 100,
) -> None:
    """Run SQL on the views scores, predictions, maps and failures of one or several runs (read-only).

    xaibatch query runs/first "SELECT explainer, metric, avg(score) FROM scores GROUP BY ALL"
    """
    from xaibatch.errors import UsageError
    from xaibatch.results.query import query as run_query

    if len(runs) < 2:
        raise UsageError('give a run folder and the SQL: xaibatch query RUN "SELECT ... FROM scores"')
    found = run_query(runs[:-1], runs[-1])
    if format_ == Format.table:
        _print_table(found, max_rows)
    elif format_ == Format.csv:
        print(found.to_pandas().to_csv(index=False), end="")
    else:
        print(found.to_pandas().to_json(orient="records", lines=True), end="")


def _print_table(found: object, max_rows: int) -> None:
    import pyarrow as pa
    from rich.table import Table
    from rich.text import Text

    assert isinstance(found, pa.Table)
    console = Console()
    table = Table()
    for name in found.column_names:
        table.add_column(Text(name))
    for row in found.slice(0, max_rows).to_pylist():
        table.add_row(
            *(
                Text(f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value))
                for value in row.values()
            )
        )
    Console(width=console.width if console.is_terminal else 240).print(table)
    if found.num_rows > max_rows:
        console.print(f"{max_rows} of {found.num_rows} rows shown (--max-rows, --format csv)")


def summary(
    run: Run, median: Annotated[bool, Option("--median", help="a line of medians below each explainer's means")] = False
) -> None:
    """Print the run's table again: explainer x metric, overall and by class, with intervals and marks."""
    from xaibatch.results.frames import open_run
    from xaibatch.results.summary import print_summary

    console = Console()
    print_summary(open_run(run), Console(width=console.width if console.is_terminal else 200), medians=median)


def report(
    run: Run,
    output: Annotated[
        str | None, Option("--output", "-o", help="HTML file or URL (default: in the run folder)")
    ] = None,
    images: Annotated[int, Option(min=0, help="radiographs to embed for the browser, about 3 kB each")] = 500,
    maps: Annotated[int, Option(min=1, help="images whose maps to embed, about 0.3 kB an explainer")] = 2000,
) -> None:
    """Write one self-contained HTML file: settings, table, statistics, the figure, and a browser for all images.

    The browser lists every image with all its scores, whatever is embedded.
    """
    from xaibatch.cli.output import writing
    from xaibatch.results.report import write_report
    from xaibatch.results.report_gallery import ReportOptions

    with writing(output or run):
        print(write_report(run, output, ReportOptions(max_pixels=images, max_maps=maps)))


def compact(run: Run) -> None:
    """Merge the many small parts of a finished run into a few large ones; safe to interrupt and to repeat."""
    from xaibatch.results.compact import compact as compact_run

    print(compact_run(run))


def compare(run_a: Run, run_b: Run) -> None:
    """Compare two runs image by image (two checkpoints, two versions): settings first, then paired differences."""
    from xaibatch.results.compare import print_comparison

    console = Console()
    print_comparison(run_a, run_b, Console(width=console.width if console.is_terminal else 200))


def export(
    run: Run,
    output: Annotated[str, Option("--output", "-o", help="folder for CSV, LaTeX, Parquet, PDF and PNG")] = "export",
) -> None:
    """Write the tables as CSV, LaTeX (booktabs) and Parquet, and the figures as PDF and PNG."""
    from xaibatch.cli.output import local_folder, writing
    from xaibatch.results.export import export as export_run

    with writing(output):
        for path in export_run(run, local_folder(output)):
            print(path)
