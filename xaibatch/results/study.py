"""A run's scores in, its statistics by group, explainer and metric out: means, the floor, every pair.

Shape letters: E explainers, M metrics, I images, K columns.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from xaibatch.results.cube import Group, ScoreCube
from xaibatch.results.ranks import Ranking, rank
from xaibatch.results.statistics import Summary, summarise
from xaibatch.results.statistics_paired import Comparison, compare
from xaibatch.results.statistics_repeats import NoiseShare, noise_share

FLOOR_MARKS: Mapping[str, str] = {"undecided": "†", "worse": "‡", "too few": "?"}
"""Verdict against the random map -> mark beside a score: not distinguishable from it, worse than it, too few to
tell."""


def summaries(cube: ScoreCube, group: Group, *, seed: int) -> dict[tuple[str, str], Summary]:
    """(explainer, metric) -> mean and interval over the group's images, repeats of an image averaged first."""
    values_IK = _columns(cube.image_means(), group)
    bounds = [metric.bounds for _ in cube.explainers for metric in cube.metrics]
    found = summarise(values_IK, cube.clusters_I[group.rows_I], seed=seed, bounds_K=bounds)
    keys = [(explainer, metric.label) for explainer in cube.explainers for metric in cube.metrics]
    return dict(zip(keys, found, strict=True))


def pairwise(
    cube: ScoreCube, group: Group, *, seed: int, alpha: float = 0.05
) -> dict[tuple[str, str, str], Comparison]:
    """(first, second, metric) -> paired comparison, for every pair of explainers in the cube's order; one family for
    Holm."""
    pairs = list(combinations(range(len(cube.explainers)), 2))
    return _compared(cube, group, pairs, seed=seed, alpha=alpha)


def against_floor(
    cube: ScoreCube, group: Group, floor: str, *, seed: int, alpha: float = 0.05
) -> dict[tuple[str, str], Comparison]:
    """(explainer, metric) -> paired comparison of each other explainer with the random map; one family for Holm."""
    place = cube.explainers.index(floor)
    pairs = [(e, place) for e in range(len(cube.explainers)) if e != place]
    return {
        (first, metric): c for (first, _, metric), c in _compared(cube, group, pairs, seed=seed, alpha=alpha).items()
    }


def floor_mark(comparison: Comparison | None) -> str:
    """† not distinguishable from the random map, ‡ worse than it, ? too few images to tell, nothing where it is
    better."""
    return FLOOR_MARKS.get(comparison.verdict, "") if comparison else ""


def _compared(
    cube: ScoreCube, group: Group, pairs: list[tuple[int, int]], *, seed: int, alpha: float
) -> dict[tuple[str, str, str], Comparison]:
    keys = [(cube.explainers[a], cube.explainers[b], metric.label) for a, b in pairs for metric in cube.metrics]
    if not keys:
        return {}
    means_EMI = cube.image_means()
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    differences_IK = _columns(means_EMI[first] - means_EMI[second], group)
    signs = [metric.sign for _ in pairs for metric in cube.metrics]
    found = compare(differences_IK, cube.clusters_I[group.rows_I], signs, seed=seed, alpha=alpha)
    return dict(zip(keys, found, strict=True))


def _columns(values_PMI: NDArray[np.float64], group: Group) -> NDArray[np.float64]:
    """(P,M,I) -> the group's images as rows and (p, m) pairs as columns."""
    chosen = values_PMI[:, :, group.rows_I]
    return chosen.reshape(-1, chosen.shape[-1]).T


def rankings(cube: ScoreCube, group: Group, *, seed: int) -> tuple[Ranking, ...]:
    """One ranking per metric that has a direction and enough images, in the cube's order."""
    means_EMI = cube.image_means()
    found = []
    for m, metric in enumerate(cube.metrics):
        if metric.sign:
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
    """(explainer, metric) -> share of sampling noise, where the run has repeats."""
    shares = {}
    for e, explainer in enumerate(cube.explainers):
        for m, metric in enumerate(cube.metrics):
            share = noise_share(cube.values_EMIR[e, m], cube.clusters_I, seed=seed)
            if share:
                shares[explainer, metric.label] = share
    return shares
