"""A study's statistics in, Matplotlib figures out: intervals, distributions, critical differences, ranks, confusion.

The same figures stand in the report (as SVG) and in the export (PDF, PNG). Explainers differ by position and label,
never by colour alone; the three class colours are Okabe & Ito's and differ in lightness too. Nothing here touches
pyplot or global settings.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from xaibatch.results.cube import Group, MetricInfo, ScoreCube
from xaibatch.results.ranks import Ranking, cliques
from xaibatch.results.statistics import Summary

CLASS_COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
_INK, _PALE = "#222222", "#bbbbbb"
_COLUMNS: Final = 4
"""Metrics beside each other."""
_FEW_VALUES: Final = 4
"""Scores of so few values (hits and misses) are drawn as a bar of their mean: a box of them would hide it."""


def svg(figure: Figure) -> str:
    """The figure as an inline `<svg>` element with real text; equal figures give equal bytes."""
    target = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "xaibatch"}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = target.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def interval_figure(
    cube: ScoreCube,
    summaries: Mapping[tuple[str, str], Summary],
    marks: Mapping[tuple[str, str], str],
    floor: str | None,
    titles: Mapping[str, str],
) -> Figure:
    """Mean and 95% interval of every explainer, one panel a metric; the random map's interval is a band behind the
    others; dotted where it comes from the metric's range, as nearly all scores are equal."""
    figure, panels = _panels(len(cube.metrics), 0.27 * len(cube.explainers) + 0.95)
    for number, (axes, metric) in enumerate(zip(panels, cube.metrics, strict=True)):
        for place, explainer in enumerate(cube.explainers):
            summary = summaries[explainer, metric.label]
            if not summary.num_scored:
                continue
            is_floor = explainer == floor
            if summary.interval:
                low, high = summary.interval.low, summary.interval.high
                if is_floor:
                    axes.axvspan(low, high, color="#dddddd", lw=0, zorder=0)
                axes.plot(
                    [low, high],
                    [place, place],
                    ":" if summary.alike else "-",
                    color=_INK,
                    lw=1.6,
                    solid_capstyle="butt",
                    zorder=2,
                )
            axes.plot(summary.mean, place, "o", ms=5.5, color="white" if is_floor else _INK, mec=_INK, zorder=3)
            mark = marks.get((explainer, metric.label), "")
            if mark:
                axes.annotate(mark, (summary.mean, place), (0, 3), textcoords="offset points", ha="center", fontsize=9)
        _explainer_axis(axes, cube.explainers, titles, floor, first=number % _COLUMNS == 0)
        _metric_title(axes, metric)
    return figure


def distribution_figure(
    cube: ScoreCube, groups: Sequence[Group], titles: Mapping[str, str], floor: str | None
) -> Figure:
    """Every image's score by class: box (quartiles), whiskers (5th to 95th percentile), median; points where they are
    few."""
    means_EMI = cube.image_means()
    height = (0.2 * max(len(groups), 1) + 0.12) * len(cube.explainers) + 1.1
    figure, panels = _panels(len(cube.metrics), height)
    for number, (axes, metric) in enumerate(zip(panels, cube.metrics, strict=True)):
        m = number
        for e in range(len(cube.explainers)):
            for g, group in enumerate(groups):
                values = means_EMI[e, m, group.rows_I]
                values = values[np.isfinite(values)]
                if values.size:
                    offset = (g - (len(groups) - 1) / 2) * 0.8 / max(len(groups), 1)
                    _box(axes, values, e + offset, 0.62 / max(len(groups), 1), CLASS_COLOURS[g % len(CLASS_COLOURS)])
        _explainer_axis(axes, cube.explainers, titles, floor, first=number % _COLUMNS == 0)
        _metric_title(axes, metric)
    handles = [
        mpl.patches.Patch(
            color=CLASS_COLOURS[g % len(CLASS_COLOURS)], label=f"{group.name} ({int(group.rows_I.sum())})"
        )
        for g, group in enumerate(groups)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(groups), 4), frameon=False, fontsize=8)
    return figure


def critical_difference_figure(
    rankings: Sequence[Ranking], metrics: Mapping[str, MetricInfo], titles: Mapping[str, str]
) -> Figure:
    """Mean rank within patients on an axis, best left, one panel a metric; a bar joins explainers that Nemenyi's
    critical difference does not tell apart (Demšar 2006)."""
    rows = max((len(r.explainers) for r in rankings), default=1)
    figure, panels = _panels(len(rankings), 0.17 * rows + 1.35, columns=2, width=4.6)
    for axes, ranking in zip(panels, rankings, strict=True):
        _critical_difference(axes, ranking, titles)
        arrow = metrics[ranking.metric].arrow
        axes.set_title(f"{metrics[ranking.metric].title} {arrow}", fontsize=9, loc="left", fontweight="bold")
    return figure


def rank_figure(rankings: Sequence[Ranking], metrics: Mapping[str, MetricInfo], titles: Mapping[str, str]) -> Figure:
    """The rank of each explainer's mean under each metric with its 95% interval: rows explainers, columns metrics."""
    explainers = list(dict.fromkeys(e for ranking in rankings for e in ranking.explainers))
    figure = Figure(figsize=(1.7 + 1.25 * len(rankings), 0.36 * len(explainers) + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = mpl.colormaps["cividis"]
    for column, ranking in enumerate(rankings):
        for place, explainer in enumerate(ranking.explainers):
            row = explainers.index(explainer)
            share = (ranking.ranks[place] - 1) / max(len(ranking.explainers) - 1, 1)
            axes.add_patch(mpl.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, color=colours(1 - share), lw=0))
            low, high = ranking.rank_low[place], ranking.rank_high[place]
            text = f"{ranking.ranks[place]:g}" + (f"  ({low:g}–{high:g})" if low != high else "")
            ink = "black" if share < 0.5 else "white"
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=ink)
    axes.set_xlim(-0.5, len(rankings) - 0.5)
    axes.set_ylim(len(explainers) - 0.5, -0.5)
    axes.set_xticks(range(len(rankings)), [_wrapped(metrics[r.metric].title, 16) for r in rankings], fontsize=8)
    axes.set_yticks(range(len(explainers)), [titles[e] for e in explainers], fontsize=8)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def captioned(figure: Figure, caption: str) -> Figure:
    """The figure with the text below it, for a picture that travels without a page around it."""
    figure.supxlabel(textwrap.fill(caption, int(16 * figure.get_figwidth())), fontsize=7, x=0.01, ha="left")
    return figure


def _panels(number: int, height: float, *, columns: int = _COLUMNS, width: float = 2.35) -> tuple[Figure, list[Axes]]:
    columns = max(1, min(columns, number))
    rows = max(1, -(-number // columns))
    figure = Figure(figsize=(width * columns + 1.0, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    panels = [axes for row in grid for axes in row]
    for axes in panels[number:]:
        axes.set_visible(False)
    return figure, panels[:number]


def _explainer_axis(
    axes: Axes, explainers: Sequence[str], titles: Mapping[str, str], floor: str | None, *, first: bool
) -> None:
    axes.set_ylim(len(explainers) - 0.4, -0.6)
    labels = [titles[e] + (" (floor)" if e == floor else "") for e in explainers] if first else [""] * len(explainers)
    axes.set_yticks(range(len(explainers)), labels, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(_tick))
    axes.grid(axis="x", color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _tick(value: float, _: int | None = None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 2000 else f"{round(value, 10):g}"


def _metric_title(axes: Axes, metric: MetricInfo) -> None:
    axes.set_title(_wrapped(f"{metric.title} {metric.arrow}".strip()), fontsize=9, fontweight="bold")


def _wrapped(title: str, width: int = 24) -> str:
    """Break a title into lines of at most `width` characters.

    >>> _wrapped("Faithfulness correlation, patches", 24).splitlines()
    ['Faithfulness', 'correlation, patches']
    """
    lines = [""]
    for word in reversed(title.split()):
        joined = f"{word} {lines[0]}".strip()
        if len(joined) > width and lines[0]:
            lines.insert(0, word)
        else:
            lines[0] = joined
    return "\n".join(lines)


def _box(axes: Axes, values: NDArray[np.float64], place: float, height: float, colour: str) -> None:
    if len(np.unique(values)) <= _FEW_VALUES and values.size >= 10:
        axes.barh(place, values.mean(), height, color=colour, lw=0)
        axes.annotate(
            f"{values.mean():.2f}", (values.mean(), place), (2, 0), textcoords="offset points", va="center", size=6
        )
        return
    if values.size < 10:
        axes.plot(values, np.full(values.size, place), "|", ms=5, color=colour, mew=1.3)
        return
    low, first, middle, third, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
    axes.plot([low, high], [place, place], color=colour, lw=1, solid_capstyle="butt")
    box = mpl.patches.Rectangle((first, place - height / 2), max(third - first, 0), height, color=colour, lw=0)
    axes.add_patch(box)
    axes.plot([middle, middle], [place - height / 2, place + height / 2], color="white", lw=1.6)
    outside = values[(values < low) | (values > high)]
    if outside.size <= 40:
        axes.plot(outside, np.full(outside.size, place), ".", ms=2, color=colour)


def _critical_difference(axes: Axes, ranking: Ranking, titles: Mapping[str, str]) -> None:
    number = len(ranking.explainers)
    order = np.argsort(ranking.mean_ranks, kind="stable")
    left = order[: (number + 1) // 2]
    depth = len(left)
    joined = cliques(ranking.mean_ranks, ranking.critical_difference) if ranking.critical_difference else ()
    top = 0.75 + 0.32 * len(joined)
    axes.plot([1, number], [0, 0], color=_INK, lw=1)
    for tick in range(1, number + 1):
        axes.plot([tick, tick], [0, -0.16], color=_INK, lw=1)
        axes.text(tick, -0.26, str(tick), ha="center", va="bottom", fontsize=7.5)
    for position, k in enumerate(order):
        on_left = position < depth
        level = top + (position if on_left else number - 1 - position) * 0.62
        edge = 1 - 0.12 * number if on_left else number + 0.12 * number
        rank = ranking.mean_ranks[k]
        axes.plot([rank, rank, edge], [0, level, level], color=_INK, lw=0.9)
        name = f"{titles[ranking.explainers[k]]} {rank:.2f}"
        axes.text(
            edge + (-0.06 if on_left else 0.06), level, name, ha="right" if on_left else "left", va="center", fontsize=8
        )
    for level, members in enumerate(joined):
        ranks = [ranking.mean_ranks[k] for k in members]
        height = 0.3 + 0.32 * level
        axes.plot(
            [min(ranks) - 0.04, max(ranks) + 0.04], [height, height], color="#D55E00", lw=3.2, solid_capstyle="butt"
        )
    if ranking.critical_difference:
        axes.plot([1, 1 + min(ranking.critical_difference, number - 1)], [-1.05, -1.05], color="#D55E00", lw=1.6)
        axes.text(
            1,
            -1.2,
            f"critical difference {ranking.critical_difference:.2f}",
            fontsize=7.5,
            va="bottom",
            color="#A04000",
        )
    axes.set_xlim(1 - 0.75 * number, number + 0.75 * number)
    axes.set_ylim(top + 0.62 * depth, -1.75)
    axes.set_axis_off()
