"""A run's scores in, its statistics by group, explainer and metric out: means, the floor, every pair.

Shape letters: E explainers, M metrics, I images, K columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xaibatch.errors import RunFolderError
from xaibatch.results.cube import Group, ScoreCube, floor_explainer, is_synthetic, score_cube, unfinished
from xaibatch.results.frames import Run
from xaibatch.results.ranks import Agreement, Ranking, agreement, rank
from xaibatch.results.statistics import Summary, summarise
from xaibatch.results.statistics_paired import Comparison, compare, fewest_patients, is_out_of_reach
from xaibatch.results.statistics_repeats import NoiseShare, noise_share

FLOOR_MARKS: Mapping[str, str] = {"undecided": "†", "worse": "‡", "too few": "?"}
"""Verdict against the random map -> mark beside a score: not distinguishable from it, worse than it, too few to
tell."""


TURNED: Mapping[str, str] = {"better": "worse", "worse": "better", "higher": "lower", "lower": "higher"}
"""A verdict from the second explainer's point of view; the others are the same from both."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Every statistic of a run that the report and the export show; keys are labels of `run.json`."""

    cube: ScoreCube
    groups: tuple[Group, ...]
    floor: str | None
    titles: Mapping[str, str]
    signed: Mapping[str, bool]
    seed: int
    synthetic: bool
    """Rendered images: intervals speak of their generator."""
    unfinished: tuple[str, ...]
    """What is to be said of a run that is not finished."""
    summaries: Mapping[str, Mapping[tuple[str, str], Summary]]
    """By group title."""
    marks: Mapping[str, Mapping[tuple[str, str], str]]
    """By group title."""
    pairs: Mapping[str, Mapping[tuple[str, str, str], Comparison]]
    """By group title; (first, second, metric), each group one family for Holm."""
    rankings: tuple[Ranking, ...]
    agreement: Agreement | None
    noise: Mapping[tuple[str, str], NoiseShare]


def make_study(run: Run) -> Study:
    """Compute the statistics of a run; raises RunFolderError if it has no scores yet."""
    scores = run.scores.arrow()
    if not scores.num_rows:
        raise RunFolderError(f"{run.folder.url!r} has no scores yet: finish the run first")
    cube = score_cube(scores, run.record)
    seed = int(run.config.get("seed", 0))
    floor = floor_explainer(cube.explainers, run.record)
    groups = cube.groups()
    entries: Mapping[str, Mapping[str, Any]] = run.record.get("explainers", {})
    pairs = {g.title: pairwise(cube, g, seed=seed) for g in groups}
    ranked = rankings(cube, groups[0], seed=seed)
    return Study(
        cube=cube,
        groups=groups,
        floor=floor,
        titles=explainer_titles(cube.explainers, entries),
        signed={e: bool(entries.get(e, {}).get("signed", False)) for e in cube.explainers},
        seed=seed,
        synthetic=is_synthetic(run.record),
        unfinished=tuple(unfinished(run.record, cube)),
        summaries={g.title: summaries(cube, g, seed=seed) for g in groups},
        marks={title: floor_marks(found, floor) for title, found in pairs.items()},
        pairs=pairs,
        rankings=ranked,
        agreement=agreement(ranked),
        noise=noise_shares(cube, seed=seed),
    )


def explainer_titles(labels: tuple[str, ...], entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Titles for people; the label stands in where two explainers share a title (one method with other options).

    >>> explainer_titles(("a", "b"), {"a": {"title": "LIME"}, "b": {"title": "LIME"}})
    {'a': 'LIME (a)', 'b': 'LIME (b)'}
    """
    titles = {label: str(entries.get(label, {}).get("title", label)) for label in labels}
    shared = [title for title in titles.values() if list(titles.values()).count(title) > 1]
    return {label: f"{title} ({label})" if title in shared else title for label, title in titles.items()}


def summaries(cube: ScoreCube, group: Group, *, seed: int) -> dict[tuple[str, str], Summary]:
    """(explainer, metric) -> mean and interval over the group's images, repeats of an image averaged first."""
    values_IK = _columns(cube.image_means(), group)
    bounds = [metric.bounds for _ in cube.explainers for metric in cube.metrics]
    hits = [hit for _ in cube.explainers for hit in _hits(cube)]
    dependent = [metric.across_images for _ in cube.explainers for metric in cube.metrics]
    found = summarise(
        values_IK, cube.clusters_I[group.rows_I], seed=seed, bounds_K=bounds, hits_K=hits, dependent_K=dependent
    )
    keys = [(explainer, metric.label) for explainer in cube.explainers for metric in cube.metrics]
    return dict(zip(keys, found, strict=True))


def pairwise(
    cube: ScoreCube, group: Group, *, seed: int, alpha: float = 0.05
) -> dict[tuple[str, str, str], Comparison]:
    """(first, second, metric) -> paired comparison, for every pair of explainers in the cube's order; one family for
    Holm."""
    pairs = list(combinations(range(len(cube.explainers)), 2))
    keys = [(cube.explainers[a], cube.explainers[b], metric.label) for a, b in pairs for metric in cube.metrics]
    if not keys:
        return {}
    means_EMI = cube.image_means()
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    differences_IK = _columns(means_EMI[first] - means_EMI[second], group)
    signs = [metric.sign for _ in pairs for metric in cube.metrics]
    bounds = [metric.bounds for _ in pairs for metric in cube.metrics]
    dependent = [metric.across_images for _ in pairs for metric in cube.metrics]
    found = compare(
        differences_IK,
        cube.clusters_I[group.rows_I],
        signs,
        seed=seed,
        bounds_K=bounds,
        dependent_K=dependent,
        alpha=alpha,
    )
    return dict(zip(keys, found, strict=True))


def floor_marks(pairs: Mapping[tuple[str, str, str], Comparison], floor: str | None) -> dict[tuple[str, str], str]:
    """(explainer, metric) -> mark beside its score: † not distinguishable from the random map, ‡ worse than it, ? too
    few images to tell, nothing where it is better, where no image is scored for both, or where images are dependent.

    The verdicts are those of `pairwise`, so that table, marks and matrix cannot contradict each other.
    """
    marks = {}
    for (first, second, metric), comparison in pairs.items():
        if floor in (first, second) and comparison.num_images:
            verdict = comparison.verdict if second == floor else TURNED.get(comparison.verdict, comparison.verdict)
            marks[first if second == floor else second, metric] = FLOOR_MARKS.get(verdict, "")
    return marks


def too_many_tests(pairs: Mapping[str, Mapping[Any, Comparison]], num_patients: int) -> str:
    """Which families of comparisons, by the title of their group of images, are too large for any verdict; empty where
    none is. num_patients: as in the cube, 0 where patients are unknown."""
    unit = "patients" if num_patients else "images"
    families = []
    for title, family in pairs.items():
        if is_out_of_reach(family.values()):
            tested = [c for c in family.values() if c.p_value is not None]
            families.append(
                f"{title} ({tested[0].num_tests} comparisons, {max(c.num_clusters for c in tested)} {unit}; "
                f"{fewest_patients(tested[0].num_tests)} could give one)"
            )
    if not families:
        return ""
    return f"too many comparisons for a verdict, however large the differences: {', '.join(families)}"


def _hits(cube: ScoreCube) -> list[bool]:
    """Whether a metric only ever gave 0 or 1, to any explainer."""
    values_MK = np.moveaxis(cube.values_EMIR, 1, 0).reshape(len(cube.metrics), -1)
    return [bool(np.isin(row[np.isfinite(row)], (0.0, 1.0)).all()) for row in values_MK]


def _columns(values_PMI: NDArray[np.float64], group: Group) -> NDArray[np.float64]:
    """(P,M,I) -> the group's images as rows and (p, m) pairs as columns."""
    chosen = values_PMI[:, :, group.rows_I]
    return chosen.reshape(-1, chosen.shape[-1]).T


def rankings(cube: ScoreCube, group: Group, *, seed: int) -> tuple[Ranking, ...]:
    """One ranking per metric that has a direction, independent images and enough of them, in the cube's order."""
    means_EMI = cube.image_means()
    found = []
    for m, metric in enumerate(cube.metrics):
        if metric.sign and not metric.across_images:
            values_IE = means_EMI[:, m, group.rows_I].T
            ranking = rank(
                values_IE,
                cube.clusters_I[group.rows_I],
                metric.sign,
                metric=metric.label,
                explainers=cube.explainers,
                seed=seed,
            )
            found += [ranking] if ranking else []
    return tuple(found)


def noise_shares(cube: ScoreCube, *, seed: int) -> dict[tuple[str, str], NoiseShare]:
    """(explainer, metric) -> share of sampling noise, where the run has repeats and the metric independent images."""
    shares = {}
    for e, explainer in enumerate(cube.explainers):
        for m, metric in enumerate(cube.metrics):
            share = None
            if not metric.across_images:
                share = noise_share(cube.values_EMIR[e, m], cube.clusters_I, seed=seed)
            if share:
                shares[explainer, metric.label] = share
    return shares
