"""A run in, files for a paper out: tables as CSV, Parquet and LaTeX (booktabs), figures as PDF and PNG."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from xaibatch.data.storage import is_remote
from xaibatch.errors import UsageError
from xaibatch.results import captions, figures
from xaibatch.results.cube import Group, not_independent
from xaibatch.results.figures_images import picture_figure
from xaibatch.results.frames import open_run
from xaibatch.results.report_gallery import ReportOptions, make_gallery
from xaibatch.results.report_tables import difference_digits, difference_text, number, p_text
from xaibatch.results.statistics import Summary
from xaibatch.results.study import Study, make_study
from xaibatch.results.summary import ALIKE, column_digits, counted

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "°": r"$^\circ$", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "−": "$-$", "–": "--", "’": "'", "“": "``", "”": "''",
    "<": "$<$", ">": "$>$", "×": r"$\times$",
}  # fmt: skip

_ARROWS = "↑ more is better, ↓ less is better"


def export(url: str, output: str | Path, *, dots_per_inch: int = 300) -> list[Path]:
    """Write everything into the folder `output`; returns the files, sorted. Figures need no display.

    Tables as CSV and Parquet: `scores` (every row), `summary` (by group, explainer, metric), `pairs`, `ranks`, `noise`;
    as LaTeX: `table.tex`, `table_medians.tex` (the same with a line of medians below each explainer's means) and
    `pairs.tex`, each after comments that say what its marks and numbers are. Figures: intervals, distributions, ranks,
    critical differences and pictures, with their captions.
    Raises RunFolderError as a report does, UsageError for an output that is a URL.
    """
    if is_remote(str(output)):
        raise UsageError(f"an export is a local folder, received {str(output)!r}: give a path and copy it there")
    folder = Path(output)
    run = open_run(url)
    made = make_study(run)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (
        ("table", latex_scores(made)),
        ("table_medians", latex_scores(made, medians=True)),
        ("pairs", latex_pairs(made)),
    ):
        written.append(folder / f"{name}.tex")
        written[-1].write_text(text, "utf-8")
    written += _save_table(_plain(run.scores.arrow()), folder / "scores")
    for name, rows in (
        ("summary", list(summary_rows(made))),
        ("pairs", list(pair_rows(made))),
        ("ranks", list(rank_rows(made))),
        ("noise", list(noise_rows(made))),
    ):
        if rows:
            written += _save_table(pa.Table.from_pylist(rows), folder / name)
    gallery = make_gallery(run, made, ReportOptions(max_pixels=0))
    for name, draw in charts(made).items():
        written += _save(draw(), folder / name, dots_per_inch)
    for choice in gallery.choices:
        written += _save(picture_figure(choice, gallery.material), folder / choice.name, dots_per_inch)
    return sorted(written)


def summary_rows(made: Study) -> Iterator[dict[str, Any]]:
    """One row a group, explainer and metric; `mark` as in the printed table; not `independent` where the metric
    compares images with each other and so has no interval."""
    for group in made.groups:
        for (explainer, metric), s in made.summaries[group.title].items():
            yield {
                "group": group.kind,
                "name": group.name,
                "explainer": explainer,
                "metric": metric,
                "mean": _known(s.mean),
                "median": _known(s.median),
                "sd": _known(s.sd),
                "standard_error": _known(s.standard_error),
                "low": s.interval.low if s.interval else None,
                "high": s.interval.high if s.interval else None,
                "interval": s.interval.method if s.interval else None,
                "num_scored": s.num_scored,
                "num_not_scored": s.num_not_scored,
                "num_patients": s.num_clusters,
                "independent": s.independent,
                "mark": made.marks[group.title].get((explainer, metric), ""),
            }


def pair_rows(made: Study) -> Iterator[dict[str, Any]]:
    """One row a group of images, pair of explainers and metric: every field of `Comparison`. Each group is a family."""
    for group in made.groups:
        for (first, second, metric), c in made.pairs[group.title].items():
            row = asdict(c)
            interval = row.pop("interval") or {"low": None, "high": None, "method": None}
            row |= {"low": interval["low"], "high": interval["high"], "interval": interval["method"]}
            names = {"group": group.kind, "name": group.name, "first": first, "second": second, "metric": metric}
            yield names | {k: _known(v) for k, v in row.items()}


def rank_rows(made: Study) -> Iterator[dict[str, Any]]:
    """One row a metric and explainer."""
    for r in made.rankings:
        for k, explainer in enumerate(r.explainers):
            yield {
                "metric": r.metric,
                "explainer": explainer,
                "mean_rank": r.mean_ranks[k],
                "rank": r.ranks[k],
                "rank_low": r.rank_low[k],
                "rank_high": r.rank_high[k],
                "probability_best": r.probability_best[k],
                "critical_difference": r.critical_difference,
                "friedman_p": r.friedman_p,
                "num_images": r.num_images,
                "num_patients": r.num_patients,
            }


def noise_rows(made: Study) -> Iterator[dict[str, Any]]:
    """One row an explainer and metric, where the run has repeats."""
    for (explainer, metric), share in made.noise.items():
        yield {"explainer": explainer, "metric": metric, **asdict(share)}


def latex_scores(made: Study, *, medians: bool = False) -> str:
    """The study's table for `\\usepackage{booktabs}`: overall and by true class, intervals beside the means; with
    `medians` a line of them below each explainer."""
    groups = [group for group in made.groups if group.kind in {"all", "label"}]
    groups = groups[:1] if len(groups) == 2 else groups
    cube = made.cube
    head = " & ".join(["Explainer", *(latex(f"{m.title} {m.arrow}".strip()) for m in cube.metrics)])
    marks = [mark for group in groups for mark in made.marks[group.title].values()]
    lines = [
        _comment(f"mean [95% interval], {counted(cube)}" + (", rendered images" if made.synthetic else "")),
        _comment(_ARROWS),
        *map(_comment, made.unfinished),
        *(_comment(note) for note in captions.mark_notes(marks)),
        *([_comment(_family(made, groups))] if any(marks) else []),
        *([_comment(f"° {ALIKE}")] if _any_alike(made, groups) else []),
        *([_comment(dependent)] if (dependent := not_independent(cube.metrics)) else []),
        f"\\begin{{tabular}}{{l{'r' * len(cube.metrics)}}}",
        "\\toprule",
        f"{head} \\\\",
    ]
    for group in groups:
        title = f"{group.title} ({int(group.rows_I.sum())})"
        lines += ["\\midrule", f"\\multicolumn{{{len(cube.metrics) + 1}}}{{l}}{{\\emph{{{latex(title)}}}}} \\\\"]
        for e in cube.explainers:
            lines.append(f"{latex(made.titles[e])} & {' & '.join(_latex_cells(made, group, e))} \\\\")
            if medians:
                lines.append(f"\\quad median & {' & '.join(_latex_medians(made, group, e))} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def latex_pairs(made: Study) -> str:
    """All pairs of explainers on all images, with the report's numbers: difference with interval, effect size,
    corrected p-value, verdict."""
    titles = {m.label: f"{m.title} {m.arrow}".strip() for m in made.cube.metrics}
    pairs = made.pairs[made.groups[0].title]
    lines = [
        _comment(
            f"A − B: mean difference of the same images [95% interval], {counted(made.cube)}"
            + (", rendered images" if made.synthetic else "")
        ),
        _comment("d: mean difference over the standard deviation of the differences"),
        _comment(_family(made, made.groups[:1]) + "; better and worse also require an interval that excludes zero"),
        _comment(_ARROWS),
        *map(_comment, made.unfinished),
        *([_comment(f"° {ALIKE}")] if any(c.alike and c.num_images for c in pairs.values()) else []),
        "\\begin{tabular}{lllrrrl}",
        "\\toprule",
        "Metric & A & B & A $-$ B [95\\%] & $d$ & $p_\\mathrm{Holm}$ & A is \\\\",
        "\\midrule",
    ]
    for (first, second, metric), c in pairs.items():
        names = [titles[metric], made.titles[first], made.titles[second]]
        numbers = [difference_text(c, difference_digits(c)), number(c.effect_size, 2), p_text(c.p_holm)]
        lines.append(" & ".join(map(latex, [*names, *numbers, c.verdict])) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def latex(text: str) -> str:
    """Escape a text for LaTeX.

    >>> latex("AUC_5% ↓")
    'AUC\\\\_5\\\\% $\\\\downarrow$'
    """
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _comment(text: str) -> str:
    """A line for the table's caption, out of the table itself."""
    return f"% {latex(text)}"


def _family(made: Study, groups: Sequence[Group]) -> str:
    """How the pairs were tested, with the number of comparisons that each group of images was corrected for."""
    counts = {g.title: max((c.num_tests for c in made.pairs[g.title].values()), default=0) for g in groups}
    listed = ", ".join(f"{title}: {count}" for title, count in counts.items() if count) or "none: too few images"
    return f"paired, tested by sign flips of whole patients, corrected by Holm at 5% (comparisons of {listed})"


def _latex_cells(made: Study, group: Group, explainer: str) -> list[str]:
    cells = []
    for metric in made.cube.metrics:
        column: Sequence[Summary] = [made.summaries[group.title][e, metric.label] for e in made.cube.explainers]
        digits = column_digits(column)
        s = made.summaries[group.title][explainer, metric.label]
        if not s.num_scored:
            cells.append("--")
            continue
        text = number(s.mean, digits) + made.marks[group.title].get((explainer, metric.label), "")
        if s.interval:
            text += f" [{number(s.interval.low, digits)}, {number(s.interval.high, digits)}]"
        cells.append(latex(text + ("°" if s.alike else "")))
    return cells


def _latex_medians(made: Study, group: Group, explainer: str) -> list[str]:
    found = made.summaries[group.title]
    cells = []
    for metric in made.cube.metrics:
        digits = column_digits([found[e, metric.label] for e in made.cube.explainers])
        s = found[explainer, metric.label]
        cells.append(latex(number(s.median, digits)))
    return cells


def _any_alike(made: Study, groups: Sequence[Group]) -> bool:
    return any(s.alike and s.num_scored for group in groups for s in made.summaries[group.title].values())


def charts(made: Study) -> Mapping[str, Callable[[], Figure]]:
    """The study's charts by the name of their files, each with its caption below it."""
    cube, everything = made.cube, made.groups[0].title
    by_metric = {metric.label: metric for metric in cube.metrics}
    labels = [group for group in made.groups if group.kind == "label"]
    summaries, marks = made.summaries[everything], made.marks[everything]
    drawn: dict[str, Callable[[], Figure]] = {
        "intervals": lambda: figures.captioned(
            figures.interval_figure(cube, summaries, marks, made.floor, made.titles),
            captions.intervals(summaries.values(), marks.values(), floor=made.floor is not None),
        )
    }
    if labels:
        drawn["distributions"] = lambda: figures.captioned(
            figures.distribution_figure(cube, labels, made.titles, made.floor), captions.DISTRIBUTIONS
        )
    if made.rankings:
        drawn["ranks"] = lambda: figures.captioned(
            figures.rank_figure(made.rankings, by_metric, made.titles), captions.RANKS
        )
        drawn["critical_differences"] = lambda: figures.captioned(
            figures.critical_difference_figure(made.rankings, by_metric, made.titles), captions.CRITICAL_DIFFERENCES
        )
    return drawn


def _plain(table: pa.Table) -> pa.Table:
    """Without dictionaries, which CSV does not have."""
    kinds = [f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in table.schema]
    return table.cast(pa.schema([f.with_type(kind) for f, kind in zip(table.schema, kinds, strict=True)]))


def _save_table(table: pa.Table, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(".parquet"), stem.with_suffix(".csv")]
    pq.write_table(table, paths[0], compression="zstd")
    pacsv.write_csv(table, paths[1])
    return paths


def _save(figure: Figure, stem: Path, dots_per_inch: int) -> list[Path]:
    paths = [stem.with_suffix(".pdf"), stem.with_suffix(".png")]
    for path in paths:
        metadata = {"CreationDate": None} if path.suffix == ".pdf" else {"Software": None}
        figure.savefig(path, dpi=dots_per_inch, metadata=metadata)
    return paths


def _known(value: Any) -> Any:
    """Undefined numbers as null, so that every reader sees them as missing."""
    return None if isinstance(value, float) and value != value else value
