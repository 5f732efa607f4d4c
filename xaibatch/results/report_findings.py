"""A study in, the few sentences out that a reader should take away; each metric speaks for itself."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from xaibatch.results.cube import MetricInfo, ScoreCube
from xaibatch.results.ranks import Agreement
from xaibatch.results.report_tables import more_text, number
from xaibatch.results.statistics import Summary
from xaibatch.results.statistics_paired import Comparison
from xaibatch.results.summary import column_digits


def findings(
    cube: ScoreCube,
    summaries: Mapping[tuple[str, str], Summary],
    pairs: Mapping[tuple[str, str, str], Comparison],
    marks: Mapping[tuple[str, str], str],
    agreement: Agreement | None,
    floor: str | None,
    titles: Mapping[str, str],
) -> tuple[str, ...]:
    """Who leads under each metric and against whom that is settled, who does not beat the random map, whether metrics
    agree."""
    lines = [_leader(cube, metric, summaries, pairs, floor, titles) for metric in cube.metrics if metric.sign]
    if floor is not None:
        lines += _floor(cube, marks, titles)
    if agreement is not None:
        lines += _agreement(agreement, {m.label: m for m in cube.metrics})
    return tuple(line for line in lines if line)


def _leader(
    cube: ScoreCube,
    metric: MetricInfo,
    summaries: Mapping[tuple[str, str], Summary],
    pairs: Mapping[tuple[str, str, str], Comparison],
    floor: str | None,
    titles: Mapping[str, str],
) -> str:
    compared = [e for e in cube.explainers if e != floor]
    scored = [e for e in compared if summaries[e, metric.label].num_scored]
    if not compared:
        return ""
    if not scored:
        return f"{metric.title}: nothing was scored."
    digits = column_digits([summaries[e, metric.label] for e in scored])
    order = sorted(scored, key=lambda e: -metric.sign * summaries[e, metric.label].mean)
    best = order[0]
    summary = summaries[best, metric.label]
    level = [e for e in order if summaries[e, metric.label].mean == summary.mean]
    text = f"{metric.title} {metric.arrow}: {_listed([titles[e] for e in level])} "
    text += f"{'has' if len(level) == 1 else 'share'} the best mean, {number(summary.mean, digits)}"
    if summary.interval:
        text += f" [{number(summary.interval.low, digits)}, {number(summary.interval.high, digits)}]"
    if metric.across_images:
        return f"{text}; not tested, as the images are compared with each other."
    better, open_, few = [], [], []
    for other in order[len(level) :]:
        comparison, turned = _between(pairs, best, other, metric.label)
        verdict = comparison.verdict
        if verdict == "undecided":
            open_.append(
                f"{titles[other]} ({more_text(comparison)} images would settle it)"
                if comparison.more_images
                else titles[other]
            )
        elif verdict == "too few":
            few.append(titles[other])
        elif (verdict == "better") != turned:
            better.append(titles[other])
    if better:
        text += f"; better than {_listed(better)}"
    if open_:
        text += f"; undecided against {_listed(open_)}"
    if few:
        text += f"; too few images to compare with {_listed(few)}"
    return text + "."


def _between(
    pairs: Mapping[tuple[str, str, str], Comparison], first: str, second: str, metric: str
) -> tuple[Comparison, bool]:
    """The comparison of two explainers and whether it is stored the other way round."""
    turned = (first, second, metric) not in pairs
    return pairs[(second, first, metric) if turned else (first, second, metric)], turned


def _floor(cube: ScoreCube, marks: Mapping[tuple[str, str], str], titles: Mapping[str, str]) -> Iterator[str]:
    for mark, words in (("†", "Not distinguishable from the random map"), ("‡", "Worse than the random map")):
        found = [
            f"{titles[e]} ({', '.join(m.title for m in cube.metrics if marks.get((e, m.label)) == mark)})"
            for e in cube.explainers
            if any(marks.get((e, m.label)) == mark for m in cube.metrics)
        ]
        if found:
            yield f"{words}: {_listed(found)}."


def _agreement(agreement: Agreement, metrics: Mapping[str, MetricInfo]) -> Iterator[str]:
    if agreement.kendall_w is None:
        return
    names = [metrics[label].title for label in agreement.metrics]
    pairs = [
        (agreement.tau_MM[a, b], names[a], names[b])
        for a in range(len(names))
        for b in range(a + 1, len(names))
        if np.isfinite(agreement.tau_MM[a, b])
    ]
    text = (
        f"The {len(names)} metrics order the explainers "
        + ("alike" if agreement.kendall_w > 0.8 else "differently")
        + f": Kendall's W is {agreement.kendall_w:.2f} (1: the same order, 0: none in common)"
    )
    if pairs:
        tau, first, second = min(pairs)
        text += f"; furthest apart are {first} and {second} (τ = {number(float(tau), 2)})"
    yield text + "."


def _listed(names: Sequence[str]) -> str:
    """Names as a phrase.

    >>> _listed(["a"]), _listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
