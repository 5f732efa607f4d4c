"""Measured lines in, a Markdown table for people and plain records for a JSON file out."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xaibatch.benchmark.timing import Spread, Work

Cell = Spread | float | int | str | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row: a name, values by column, and a remark (`not installed`, an error, what the stock tool was)."""

    name: str
    cells: Mapping[str, Cell] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One table. `notes` say how it was measured; `profiled` holds our own work for `--profile`."""

    name: str
    title: str
    lines: Sequence[Line]
    notes: Sequence[str] = ()
    profiled: Mapping[str, Work] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The part as plain data; a spread becomes {median, low, high}."""
        return {
            "name": self.name,
            "title": self.title,
            "notes": list(self.notes),
            "lines": [
                {
                    "name": line.name,
                    "remark": line.remark,
                    **{column: _plain(cell) for column, cell in line.cells.items()},
                }
                for line in self.lines
            ],
        }

    def table(self) -> str:
        """Heading, Markdown table with aligned columns, notes."""
        columns = list(dict.fromkeys(column for line in self.lines for column in line.cells))
        remarks = any(line.remark for line in self.lines)
        rows = [["", *columns, *(["remark"] if remarks else [])]]
        for line in self.lines:
            rows.append(
                [
                    line.name,
                    *(text_of(line.cells.get(column)) for column in columns),
                    *([line.remark] if remarks else []),
                ]
            )
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"### {self.title}\n\n{aligned(rows)}\n{notes}\n" if notes else f"### {self.title}\n\n{aligned(rows)}\n"


def text_of(cell: Cell) -> str:
    """A number with three significant digits; a spread as its median and, where they differ, its ends.

    >>> text_of(1234.5), text_of(0.01234), text_of(None), text_of("eager")
    ('1234', '0.0123', '–', 'eager')
    >>> text_of(Spread(median=2.0, low=1.9, high=2.14))
    '2.00 (1.90–2.14)'
    """
    if cell is None:
        return "–"
    if isinstance(cell, Spread):
        median, low, high = (_digits(value) for value in (cell.median, cell.low, cell.high))
        return median if low == high else f"{median} ({low}–{high})"
    return cell if isinstance(cell, str) else str(cell) if isinstance(cell, int) else _digits(cell)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    line: Callable[[Sequence[str]], str] = lambda row: (  # noqa: E731
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
    )
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def megabytes(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / 2**20


def _digits(value: float) -> str:
    if value != value or abs(value) == float("inf"):
        return str(value)
    if value == 0:
        return "0"
    exponent = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if exponent:
        return f"{value:.{max(0, 3 - exponent)}f}"
    return f"{value:.3g}"


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Spread):
        return {"median": cell.median, "low": cell.low, "high": cell.high}
    return cell


def announce(what: str) -> None:
    """Say on the error stream what is measured now; the output stream is for tables."""
    print(f"measuring {what}", file=sys.stderr, flush=True)
