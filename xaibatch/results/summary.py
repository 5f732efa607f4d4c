"""A run's scores in, the study's table out, as it is printed at the end of a run: explainers × metrics, overall and
by class."""

from collections.abc import Iterator, Mapping, Sequence
from math import floor, isfinite, log10
from typing import Final

import numpy as np
import pyarrow as pa
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from xaibatch.results import study
from xaibatch.results.cube import Group as ImageGroup
from xaibatch.results.cube import (
    MetricInfo,
    Record,
    ScoreCube,
    floor_explainer,
    is_synthetic,
    not_independent,
    not_scored,
    score_cube,
    unfinished,
)
from xaibatch.results.frames import Run
from xaibatch.results.statistics import MIN_CLUSTERS, Summary
from xaibatch.results.statistics_paired import Comparison

PLAIN_WIDTH: Final = 120
"""Columns of the table where the output is not a terminal."""

_ASCII: Final = str.maketrans(
    {"↑": "^", "↓": "v", "†": "*", "‡": "**", "–": "-", "×": "x", "·": "|", "…": "...", "°": "="}
)


ALIKE: Final = (
    "nearly all scores are equal: the interval comes from the metric’s range and covers more than 95%; without a range "
    "there is none"
)
"""What the sign ° beside a mean or an interval says."""


def print_summary(run: Run, console: Console | None = None, *, medians: bool = False) -> None:
    """Print the run's table and what could not be read of it.

    Where the console is no terminal there are no lines and no colour; make it wide enough (PLAIN_WIDTH).
    """
    console = console or Console()
    plain = not console.is_terminal
    table = summary_table(
        run.scores.arrow(),
        run.record,
        width=console.width,
        plain=plain,
        encoding=console.encoding or "utf-8",
        medians=medians,
    )
    console.print(table, highlight=False)
    for path, problem in run.problems().items():
        console.print(f"left out {path}: {problem}", highlight=False, markup=False)


def summary_table(
    scores: pa.Table,
    record: Record,
    *,
    width: int = PLAIN_WIDTH,
    plain: bool = False,
    encoding: str = "utf-8",
    medians: bool = False,
) -> RenderableType:
    """The study's table as something that rich prints: mean [95% interval], scored and not scored, marks against the
    random map.

    scores: rows of `results.schema.SCORES` of one run; record: its `run.json`. Metrics that do not fit beside each
    other in `width` columns follow below. `plain` draws no lines; an `encoding` other than UTF-8 gets ASCII signs;
    `medians` adds a line of medians below each explainer's means.
    Raises RunFolderError for rows of several runs or rows that are there twice.
    """
    signs = _ASCII if not encoding.lower().startswith("utf") else {}
    if not scores.num_rows:
        return Text("nothing was scored".translate(signs))
    cube = score_cube(scores, record)
    seed = int(record.get("config", {}).get("seed", 0))
    floor_label = floor_explainer(cube.explainers, record)
    groups = [group for group in cube.groups() if group.kind in {"all", "label"}]
    if len(groups) == 2:
        groups = groups[:1]
    pairs = {group.title: study.pairwise(cube, group, seed=seed) for group in groups} if floor_label else {}
    cells = {group.title: _cells(cube, group, pairs.get(group.title, {}), floor_label, seed) for group in groups}
    titles = {label: _title(label, record, floor_label) for label in cube.explainers}
    blocks: list[RenderableType] = []
    for metrics in _blocks(cube, cells, titles, width):
        blocks.append(_block(cube, metrics, groups, cells, titles, plain, signs, medians))
        if plain:
            blocks.append(Text(""))
    lines = [*_caption(cube, record, floor_label, cells), study.too_many_tests(pairs, cube.num_patients)]
    caption = Text("\n".join(filter(None, lines)).translate(signs), style="dim")
    return Group(*blocks, caption)


def number_format(half_width: float) -> int:
    """Digits after the point that show two figures of an interval's half width.

    >>> number_format(0.034), number_format(1.2), number_format(340.0)
    (3, 1, 0)
    """
    return int(np.clip(1 - floor(log10(half_width)), 0, 5)) if half_width > 0 and isfinite(half_width) else 3


def column_digits(summaries: Sequence[Summary]) -> int:
    """Digits after the point for one metric: two figures of the middle interval, the same for all its explainers."""
    half = [
        (s.interval.high - s.interval.low) / 2 for s in summaries if s.interval and s.interval.high > s.interval.low
    ]
    if half:
        return number_format(float(np.median(half)))
    means = [abs(s.mean) for s in summaries if isfinite(s.mean) and s.mean]
    return number_format(float(np.median(means)) / 10) if means else 3


Cells = Mapping[tuple[str, str], tuple[Summary, str]]


def _cells(
    cube: ScoreCube,
    group: ImageGroup,
    pairs: Mapping[tuple[str, str, str], Comparison],
    floor_label: str | None,
    seed: int,
) -> Cells:
    found = study.summaries(cube, group, seed=seed)
    marks = study.floor_marks(pairs, floor_label)
    return {key: (summary, marks.get(key, "")) for key, summary in found.items()}


def _cell_text(summary: Summary, mark: str, digits: int, uniform: bool) -> str:
    if not summary.num_scored:
        return "–"
    text = f"{summary.mean:z,.{digits}f}{mark}"
    if summary.interval:
        text += f" [{summary.interval.low:z,.{digits}f}, {summary.interval.high:z,.{digits}f}]"
    text += "°" if summary.alike else ""
    return text if uniform else f"{text} ({summary.num_scored})"


def _median_text(cube: ScoreCube, metric: MetricInfo, cells: Cells, explainer: str) -> str:
    digits = column_digits([cells[e, metric.label][0] for e in cube.explainers])
    summary = cells[explainer, metric.label][0]
    return f"{summary.median:z,.{digits}f}" if summary.num_scored else "–"


def _scored(cells: Cells, explainers: Sequence[str], metric: str) -> tuple[bool, str]:
    """Whether all explainers have equally many scores of this metric, and how many as a header line."""
    counts = {(cells[e, metric][0].num_scored, cells[e, metric][0].num_not_scored) for e in explainers}
    if len(counts) > 1:
        return False, "(scored images)"
    scored, missing = counts.pop()
    return True, f"{scored} scored" + (f", {missing} not" if missing else "")


def _blocks(
    cube: ScoreCube, cells: Mapping[str, Cells], titles: Mapping[str, str], width: int
) -> Iterator[tuple[MetricInfo, ...]]:
    """Metrics that fit beside each other."""
    left = max(map(len, [*titles.values(), *(f"  {title}" for title in cells)])) + 2
    block: list[MetricInfo] = []
    used = left
    for metric in cube.metrics:
        need = _column_width(cube, metric, cells) + 3
        if block and used + need > width:
            yield tuple(block)
            block, used = [], left
        block.append(metric)
        used += need
    if block:
        yield tuple(block)


def _column_width(cube: ScoreCube, metric: MetricInfo, cells: Mapping[str, Cells]) -> int:
    texts = [text for group in cells.values() for text in _column(cube, metric, group)]
    return max(*map(len, texts), *map(len, metric.title.split()), len("00 scored, 00 not"))


def _column(cube: ScoreCube, metric: MetricInfo, cells: Cells) -> list[str]:
    digits = column_digits([cells[e, metric.label][0] for e in cube.explainers])
    uniform, _ = _scored(cells, cube.explainers, metric.label)
    return [_cell_text(*cells[e, metric.label], digits, uniform) for e in cube.explainers]


def _block(
    cube: ScoreCube,
    metrics: Sequence[MetricInfo],
    groups: Sequence[ImageGroup],
    cells: Mapping[str, Cells],
    titles: Mapping[str, str],
    plain: bool,
    signs: dict[int, str],
    medians: bool,
) -> Table:
    table = Table(
        box=None if plain else box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="" if plain else "bold"
    )
    table.add_column("")
    for metric in metrics:
        width = _column_width(cube, metric, cells)
        table.add_column(
            f"{metric.title} {metric.arrow}".strip().translate(signs), justify="right", max_width=width + 1
        )
    for group in groups:
        counts = [_scored(cells[group.title], cube.explainers, metric.label)[1] for metric in metrics]
        table.add_row(Text(group.title, style="bold"), *[Text(count, style="dim") for count in counts])
        columns = [_column(cube, metric, cells[group.title]) for metric in metrics]
        for e, explainer in enumerate(cube.explainers):
            row = [column[e].translate(signs) for column in columns]
            last = e == len(cube.explainers) - 1
            table.add_row(Text("  " + titles[explainer]), *map(Text, row), end_section=last and not medians)
            if medians:
                row = [_median_text(cube, metric, cells[group.title], explainer).translate(signs) for metric in metrics]
                table.add_row(Text("    median", style="dim"), *map(Text, row), end_section=last)
    return table


def _title(label: str, record: Record, floor_label: str | None) -> str:
    """The label; two labels of one method differ in it, where titles do not."""
    return f"{label} (floor)" if label == floor_label else label


def _caption(cube: ScoreCube, record: Record, floor_label: str | None, cells: Mapping[str, Cells]) -> Iterator[str]:
    neither = "" if all(metric.sign for metric in cube.metrics) else ", no arrow: neither is"
    yield f"mean [95% interval] of {counted(cube)}; ↑ more is better, ↓ less is better{neither}"
    yield from unfinished(record, cube)
    if is_synthetic(record):
        yield "rendered images: the intervals speak of the generator of images, not of patients"
    marks = {mark for group in cells.values() for _, mark in group.values()}
    if floor_label is None:
        yield "no random map in this run: there is no floor to compare with"
    else:
        if "†" in marks:
            yield "† not distinguishable from the random map (paired, Holm-corrected over all pairs, 5%)"
        if "‡" in marks:
            yield "‡ worse than the random map"
        if "?" in marks:
            yield "? too few images to compare with the random map"
    shown = [summary for group in cells.values() for summary, _ in group.values() if summary.num_scored]
    if any(summary.alike for summary in shown):
        yield f"° {ALIKE}"
    if dependent := not_independent(cube.metrics):
        yield dependent
    if any(not summary.interval and not summary.alike and summary.independent for summary in shown):
        yield f"no interval below {MIN_CLUSTERS} {'patients' if cube.num_patients else 'images'}"
    missing = _reasons(cube)
    if missing:
        yield f"rows not scored: {missing}"


def counted(cube: ScoreCube) -> str:
    """How many images of how many patients, and what was resampled."""
    if cube.num_patients:
        unknown = cube.clusters_I.max() + 1 - cube.num_patients
        rest = f" and {unknown} of unknown patient" if unknown else ""
        return f"{cube.num_images} images of {cube.num_patients} patients{rest}, patients resampled"
    return f"{cube.num_images} images, images resampled (patients unknown)"


def _reasons(cube: ScoreCube) -> str:
    totals: dict[str, int] = {}
    for statuses in cube.statuses.values():
        for status, number in not_scored(statuses).items():
            totals[status] = totals.get(status, 0) + number
    return ", ".join(f"{status} {number}" for status, number in sorted(totals.items(), key=lambda item: -item[1]))
