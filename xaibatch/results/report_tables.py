"""A study in, the rows of the report's tables out: scores, pairs, matrices, noise, the model's sanity; text and sort
keys only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from xaibatch.results.cube import Group, MetricInfo, ScoreCube, not_scored
from xaibatch.results.ranks import Agreement
from xaibatch.results.statistics import Method, Summary, summarise
from xaibatch.results.statistics_paired import Comparison
from xaibatch.results.statistics_repeats import NoiseShare
from xaibatch.results.study import TURNED
from xaibatch.results.summary import column_digits

WORDS = {
    "better": "▲ better",
    "worse": "▼ worse",
    "higher": "higher",
    "lower": "lower",
    "undecided": "undecided",
    "too few": "too few images",
    "dependent": "not tested",
}


METHODS: Mapping[Method, str] = {
    "studentised": "the farther ends of Student’s t and the studentised bootstrap",
    "edgeworth": "the farther ends of Student’s t and its expansion for skewed scores",
    "wilson": "Wilson’s interval of a share",
    "bounded": "interval from the metric’s range, as nearly all scores are equal",
}
"""How an interval was made, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell: what is read, what it is sorted by (None sorts last), a class for its looks, and a longer text on
    hovering."""

    text: str
    key: float | str | None = None
    look: str = ""
    hint: str = ""
    below: str = ""
    """A second, smaller line."""


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table ready for a template or for CSV and LaTeX: header texts, rows of cells, and what a reader must know."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def number(value: float, digits: int) -> str:
    """A number with thousands separators and a true minus sign; an en dash where there is none.

    >>> number(-1234.5, 1), number(float("nan"), 2)
    ('−1,234.5', '–')
    """
    return f"{value:z,.{digits}f}".replace("-", "−") if np.isfinite(value) else "–"


def score_table(
    cube: ScoreCube,
    group: Group,
    summaries: Mapping[tuple[str, str], Summary],
    marks: Mapping[tuple[str, str], str],
    titles: Mapping[str, str],
) -> TextTable:
    """Explainers × metrics of one group of images."""
    digits = {m.label: column_digits([summaries[e, m.label] for e in cube.explainers]) for m in cube.metrics}
    rows = []
    for explainer in cube.explainers:
        cells = [Cell(text=titles[explainer], key=titles[explainer], look="name", hint=explainer)]
        for metric in cube.metrics:
            summary = summaries[explainer, metric.label]
            cells.append(_score_cell(summary, marks.get((explainer, metric.label), ""), digits[metric.label]))
        rows.append(tuple(cells))
    header = ("explainer", *(f"{m.title} {m.arrow}".strip() for m in cube.metrics))
    return TextTable(title=group.title, header=header, rows=tuple(rows), note=f"{int(group.rows_I.sum())} images")


def _score_cell(summary: Summary, mark: str, digits: int) -> Cell:
    if not summary.num_scored:
        return Cell(text=f"not scored ({summary.num_not_scored})", look="none")
    text = number(summary.mean, digits) + mark
    if summary.interval:
        text += f" [{number(summary.interval.low, digits)}, {number(summary.interval.high, digits)}]"
    text += "°" if summary.alike else ""
    if summary.num_not_scored:
        text += f" · {summary.num_scored} of {summary.num_scored + summary.num_not_scored}"
    hint = (
        f"standard deviation {number(summary.sd, digits)}, {summary.num_scored} images scored, "
        f"{summary.num_not_scored} not; "
        + (METHODS[summary.interval.method] if summary.interval else f"{_without_interval(summary)}: no interval")
    )
    median = f"median {number(summary.median, digits)}"
    return Cell(text=text, key=summary.mean, look="floor" if mark else "", hint=hint, below=median)


def _without_interval(summary: Summary) -> str:
    return "alike" if summary.alike else "too few" if summary.independent else "images compared with each other"


def missing_table(cube: ScoreCube, titles: Mapping[str, str]) -> TextTable:
    """Rows without a score by explainer, metric and reason; empty if everything was scored."""
    rows = [
        (
            Cell(text=titles[e], key=titles[e]),
            Cell(text=m.title, key=m.title),
            Cell(text=status, key=status),
            Cell(text=f"{n:,}", key=n),
        )
        for e in cube.explainers
        for m in cube.metrics
        for status, n in not_scored(cube.statuses.get((e, m.label), {})).items()
    ]
    return TextTable(title="Not scored", header=("explainer", "metric", "reason", "rows"), rows=tuple(rows))


def pair_table(
    pairs: Mapping[tuple[str, str, str], Comparison], metrics: Mapping[str, MetricInfo], titles: Mapping[str, str]
) -> TextTable:
    """Every pair of explainers under every metric."""
    rows = []
    for (first, second, label), c in pairs.items():
        digits = difference_digits(c)
        rows.append(
            (
                Cell(text=metrics[label].title, key=metrics[label].title),
                Cell(text=titles[first], key=titles[first]),
                Cell(text=titles[second], key=titles[second]),
                Cell(text=difference_text(c, digits), key=c.mean_difference if c.num_images else None),
                Cell(text=number(c.effect_size, 2), key=_finite(c.effect_size)),
                Cell(text=f"{100 * c.wins:.0f}%" if np.isfinite(c.wins) else "–", key=_finite(c.wins)),
                Cell(text=p_text(c.p_holm), key=c.p_holm),
                Cell(text=WORDS[c.verdict], key=c.verdict, look=look(c.verdict)),
                Cell(text=more_text(c), key=c.more_images),
                Cell(text=number(c.detectable, digits), key=_finite(c.detectable)),
                Cell(text=f"{c.num_images:,}", key=c.num_images),
            )
        )
    header = (
        "metric", "explainer A", "explainer B", "A − B [95% interval]", "effect size d", "A wins", "p (Holm)",
        "A is", "images to settle it", "could have seen", "images",
    )  # fmt: skip
    return TextTable(title="All pairs", header=header, rows=tuple(rows))


def matrix(
    pairs: Mapping[tuple[str, str, str], Comparison],
    metric: MetricInfo,
    explainers: Sequence[str],
    titles: Mapping[str, str],
) -> TextTable:
    """Row against column under one metric, from the row's point of view."""
    rows = []
    for a in explainers:
        cells = [Cell(text=titles[a], look="name")]
        for b in explainers:
            if a == b:
                cells.append(Cell(text="", look="self"))
                continue
            turned = (a, b, metric.label) not in pairs
            cells.append(_matrix_cell(pairs[(b, a, metric.label) if turned else (a, b, metric.label)], turned))
        rows.append(tuple(cells))
    title = f"{metric.title} {metric.arrow}".strip()
    return TextTable(title=title, header=("row against column", *(titles[e] for e in explainers)), rows=tuple(rows))


_SIGNS = {"better": "▲", "worse": "▼", "higher": "≠", "lower": "≠", "undecided": "·", "too few": "?", "dependent": ""}


def _matrix_cell(c: Comparison, turned: bool) -> Cell:
    digits = difference_digits(c)
    verdict = TURNED.get(c.verdict, c.verdict) if turned else c.verdict
    difference = -c.mean_difference if turned else c.mean_difference
    sign = "+" if difference > 0 else ""
    effect = number(-c.effect_size if turned else c.effect_size, 2)
    hint = f"{WORDS[verdict]}; effect size {effect}; p (Holm) {p_text(c.p_holm)}"
    if c.more_images:
        hint += f"; {more_text(c)} would settle it"
    text = f"{_SIGNS[verdict]} {sign}{number(difference, digits)}".strip()
    return Cell(text=text, look=look(verdict), hint=hint)


def noise_table(shares: Mapping[tuple[str, str], NoiseShare], cube: ScoreCube, titles: Mapping[str, str]) -> TextTable:
    """Share of the variance of one score that is sampling noise, explainers × metrics."""
    rows = []
    for explainer in cube.explainers:
        cells = [Cell(text=titles[explainer], key=titles[explainer], look="name")]
        for metric in cube.metrics:
            share = shares.get((explainer, metric.label))
            if share is None:
                cells.append(Cell(text="–"))
                continue
            text = f"{100 * share.share:.0f}%"
            if share.low is not None and share.high is not None and share.share > 0:
                text += f" [{100 * share.low:.0f}, {100 * share.high:.0f}]"
            hint = f"of the mean over {share.num_repeats:g} repeats: {100 * share.share_of_mean:.0f}%"
            cells.append(Cell(text=text, key=share.share, hint=hint))
        rows.append(tuple(cells))
    header = ("explainer", *(m.title for m in cube.metrics))
    return TextTable(title="Share of sampling noise", header=header, rows=tuple(rows))


def agreement_table(agreement: Agreement, metrics: Mapping[str, MetricInfo]) -> TextTable:
    """Kendall's τ between the orders of the explainers under each pair of metrics."""
    names = [metrics[label].title for label in agreement.metrics]
    rows = []
    for a, name in enumerate(names):
        cells = [Cell(text=name, look="name")]
        for b in range(len(names)):
            tau = float(agreement.tau_MM[a, b])
            cells.append(
                Cell(text="" if a == b else number(tau, 2), look="self" if a == b else "down" if tau < 0 else "")
            )
        rows.append(tuple(cells))
    w = "–" if agreement.kendall_w is None else number(agreement.kendall_w, 2)
    note = f"Kendall's W over all metrics: {w} (1: the same order, 0: none in common)"
    return TextTable(title="Agreement of metrics", header=("Kendall's τ", *names), rows=tuple(rows), note=note)


@dataclass(frozen=True, kw_only=True)
class Sanity:
    """The model on its own: accuracy lines, the confusion table (rows true, columns predicted), images without
    label."""

    lines: tuple[str, ...]
    confusion: TextTable | None
    num_unlabelled: int


def sanity(predictions: pa.Table, class_names: Sequence[str], *, seed: int) -> Sanity:
    """How good the explained model is on these images: an explanation of a poor model explains poor reasons."""
    rows = predictions.select(["patient", "label", "predicted", "correct"]).to_pylist()
    labelled = [row for row in rows if row["label"] is not None]
    if not labelled:
        return Sanity(
            lines=("The images have no labels: nothing can be said about the model's accuracy.",),
            confusion=None,
            num_unlabelled=len(rows),
        )
    if all(row["correct"] is None for row in labelled):
        return Sanity(
            lines=("The model has one output and so no predicted class: nothing can be said about its accuracy.",),
            confusion=None,
            num_unlabelled=len(rows) - len(labelled),
        )
    keys = [row["patient"] if row["patient"] is not None else f"image {i}" for i, row in enumerate(labelled)]
    _, clusters = np.unique(keys, return_inverse=True)
    right = np.array([float(row["correct"]) for row in labelled])
    names = [name for name in class_names if any(name in (row["label"], row["predicted"]) for row in labelled)]
    columns = [right] + [np.where([row["label"] == name for row in labelled], right, np.nan) for name in names]
    found = summarise(np.stack(columns, 1), clusters, seed=seed)
    lines = [f"Accuracy {_share(found[0])} on {len(labelled)} labelled images."]
    lines += [
        f"{name}: {_share(s)} of {s.num_scored} recognised."
        for name, s in zip(names, found[1:], strict=True)
        if s.num_scored
    ]
    table = []
    for name in names:
        counts = [sum(row["label"] == name and row["predicted"] == other for row in labelled) for other in names]
        total = sum(counts)
        cells = [Cell(text=name, look="name")]
        for other, count in zip(names, counts, strict=True):
            shade = round(4 * count / total) if total else 0
            cells.append(
                Cell(text=str(count), key=count, look=f"shade{shade}" + (" diagonal" if other == name else ""))
            )
        table.append(tuple(cells))
    return Sanity(
        lines=tuple(lines),
        confusion=TextTable(title="Confusion", header=("true class ↓, predicted →", *names), rows=tuple(table)),
        num_unlabelled=len(rows) - len(labelled),
    )


def _share(s: Summary) -> str:
    text = f"{100 * s.mean:.1f}%"
    return text + (f" [{100 * s.interval.low:.1f}, {100 * s.interval.high:.1f}]" if s.interval else "")


def facts_table(title: str, entries: Mapping[str, Mapping[str, Any]], columns: Sequence[tuple[str, str]]) -> TextTable:
    """One row a label of `run.json`'s explainers or metrics; `columns` are (key, heading)."""
    rows = [
        (Cell(text=label, look="name"), *(Cell(text=_plain(entry.get(key))) for key, _ in columns))
        for label, entry in entries.items()
    ]
    return TextTable(title=title, header=("label", *(heading for _, heading in columns)), rows=tuple(rows))


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) or "–"
    if isinstance(value, list | tuple):
        return " to ".join("∞" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return str(value)


def p_text(p: float | None) -> str:
    """A p-value for people.

    >>> p_text(0.00004), p_text(0.0312), p_text(None)
    ('< 0.001', '0.031', '–')
    """
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def more_text(c: Comparison) -> str:
    """How many more images an undecided comparison needs, rounded as far as such a guess deserves."""
    if c.more_images is None:
        return "–"
    if c.more_images >= 1_000_000:
        return "over a million more"
    size = 10 ** max(len(str(c.more_images)) - 2, 0)
    return f"about {-(-c.more_images // size) * size:,} more"


def look(verdict: str) -> str:
    """The class of a verdict's cell: up, down or open, which is also what a difference without a direction is."""
    return {"better": "up", "worse": "down"}.get(verdict, "open")


def difference_text(c: Comparison, digits: int) -> str:
    """Mean difference with its 95% interval; ° where nearly all differences are equal."""
    if not c.num_images:
        return "–"
    text = number(c.mean_difference, digits)
    if c.interval:
        text += f" [{number(c.interval.low, digits)}, {number(c.interval.high, digits)}]"
    return text + ("°" if c.alike else "")


def difference_digits(c: Comparison) -> int:
    """Digits after the point that show two figures of the interval's half width."""
    if c.interval is None or c.interval.high <= c.interval.low:
        return 3
    return int(np.clip(1 - np.floor(np.log10((c.interval.high - c.interval.low) / 2)), 0, 5))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
