"""Scores of several explainers in, their ranks per metric with uncertainty out, and how far the metrics agree.

Ranks are kept apart by metric; nothing here averages them over metrics. Two views per metric: mean ranks within
patients with Friedman's test and Nemenyi's critical difference (Demšar 2006, JMLR 7), and the rank of the mean score
with its bootstrap distribution.

Shape letters: I images, C patients, E explainers, M metrics, B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import friedmanchisquare, kendalltau, rankdata, studentized_range

from xaibatch.results.statistics import MIN_CLUSTERS, NUM_RESAMPLES, cluster_sums, resampling_weights

_LARGE_DF = np.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """The explainers' ranks under one metric; 1 is best. Tuples are in the order of `explainers`.

    mean_ranks:          mean over patients of the rank within the patient (ties share their mean rank).
    friedman_p:          p-value of "all explainers rank alike"; None where it cannot be tested.
    critical_difference: mean ranks that differ by less are not told apart at 5% (Nemenyi); None likewise.
    ranks, rank_low, rank_high: rank of the mean score and the 95% interval of that rank under resampled patients.
    probability_best:    share of resamples in which the explainer has the best mean.
    num_patients:        patients (or images of unknown patient) with a score of every explainer.
    """

    metric: str
    explainers: tuple[str, ...]
    mean_ranks: tuple[float, ...]
    friedman_p: float | None
    critical_difference: float | None
    ranks: tuple[float, ...]
    rank_low: tuple[float, ...]
    rank_high: tuple[float, ...]
    probability_best: tuple[float, ...]
    num_images: int
    num_patients: int


def rank(
    values_IE: NDArray[np.float64],
    clusters_I: NDArray[np.int64],
    sign: int,
    *,
    metric: str,
    explainers: Sequence[str],
    seed: int,
    alpha: float = 0.05,
    num_resamples: int = NUM_RESAMPLES,
) -> Ranking | None:
    """Rank the explainers that are scored at all, on the images that all of these are scored on.

    sign: +1 where higher is better, -1 where lower is. None where fewer than two explainers or MIN_CLUSTERS patients
    are left.
    """
    kept = np.flatnonzero(np.isfinite(values_IE).any(0))
    complete_I = np.isfinite(values_IE[:, kept]).all(1)
    if len(kept) < 2 or len(np.unique(clusters_I[complete_I])) < MIN_CLUSTERS:
        return None
    counts_CE, sums_CE = cluster_sums(values_IE[np.ix_(complete_I, kept)], clusters_I[complete_I])
    patients_CE = sign * sums_CE / counts_CE
    mean_ranks = rankdata(-patients_CE, axis=1).mean(0)
    weights_BC = resampling_weights(len(sums_CE), num_resamples, seed, "ranks")
    means_BE = sign * (weights_BC @ sums_CE) / (weights_BC @ counts_CE)
    ranks_BE = rankdata(-means_BE, axis=1)
    best_BE = ranks_BE == ranks_BE.min(1, keepdims=True)
    observed = rankdata(-sign * sums_CE.sum(0) / counts_CE.sum(0))
    low, high = np.quantile(ranks_BE, [0.025, 0.975], axis=0, method="inverted_cdf")
    return Ranking(
        metric=metric,
        explainers=tuple(explainers[int(k)] for k in kept),
        mean_ranks=tuple(mean_ranks.tolist()),
        friedman_p=friedman_p_value(patients_CE),
        critical_difference=critical_difference(len(kept), len(patients_CE), alpha),
        ranks=tuple(observed.tolist()),
        rank_low=tuple(low.tolist()),
        rank_high=tuple(high.tolist()),
        probability_best=tuple((best_BE / best_BE.sum(1, keepdims=True)).mean(0).tolist()),
        num_images=int(complete_I.sum()),
        num_patients=len(patients_CE),
    )


def friedman_p_value(patients_CE: NDArray[np.float64]) -> float | None:
    """Friedman's test over patients (rows); None for two explainers (it needs three) or scores that are all tied."""
    if patients_CE.shape[1] < 3 or (patients_CE == patients_CE[:, :1]).all():
        return None
    return float(friedmanchisquare(*patients_CE.T).pvalue)


def critical_difference(num_explainers: int, num_patients: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of mean ranks: q_α √(k(k+1)/(6N)), q_α the studentised range over √2.

    >>> round(critical_difference(4, 14), 2)  # Demšar's example: q = 2.569
    1.25
    """
    q = float(studentized_range.ppf(1 - alpha, num_explainers, _LARGE_DF)) / np.sqrt(2)
    return float(q * np.sqrt(num_explainers * (num_explainers + 1) / (6 * num_patients)))


def cliques(mean_ranks: Sequence[float], difference: float) -> tuple[tuple[int, ...], ...]:
    """Largest sets of explainers (indices, best first) whose mean ranks lie within the critical difference: the bars
    of the picture.

    >>> cliques([1.0, 3.1, 1.5, 2.9], 0.6)
    ((0, 2), (3, 1))
    """
    order = np.argsort(mean_ranks, kind="stable")
    sets: list[tuple[int, ...]] = []
    for start, first in enumerate(order):
        members = tuple(int(k) for k in order[start:] if mean_ranks[k] - mean_ranks[first] <= difference)
        if len(members) > 1 and not any(set(members) <= set(known) for known in sets):
            sets.append(members)
    return tuple(sets)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far metrics order the explainers alike. kendall_w: 0 no agreement, 1 the same order (Kendall's coefficient
    of concordance, ties corrected); tau_MM: Kendall's τ-b of each pair of metrics, in the order of `metrics`; NaN
    where an order is all ties."""

    metrics: tuple[str, ...]
    explainers: tuple[str, ...]
    ranks_ME: NDArray[np.float64]
    kendall_w: float | None
    tau_MM: NDArray[np.float64]


def agreement(rankings: Sequence[Ranking]) -> Agreement | None:
    """Compare the orders of the explainers that every ranking has; None for fewer than two metrics or three
    explainers."""
    shared = [e for e in rankings[0].explainers if all(e in r.explainers for r in rankings)] if rankings else []
    if len(rankings) < 2 or len(shared) < 3:
        return None
    ranks_ME = np.array([rankdata([r.ranks[r.explainers.index(e)] for e in shared]) for r in rankings])
    tied = (ranks_ME == ranks_ME[:, :1]).all()
    tau_MM = np.array([[_tau(a, b) for b in ranks_ME] for a in ranks_ME])
    return Agreement(
        metrics=tuple(r.metric for r in rankings),
        explainers=tuple(shared),
        ranks_ME=ranks_ME,
        kendall_w=None if tied else kendall_w(ranks_ME),
        tau_MM=tau_MM,
    )


def kendall_w(ranks_ME: NDArray[np.float64]) -> float:
    """Kendall's W from M orders of E explainers: Friedman's statistic over M(E - 1), ties corrected.

    >>> import numpy as np
    >>> kendall_w(np.array([[1.0, 2, 3], [1, 2, 3], [1, 2, 3]]))
    1.0
    """
    num_orders, num_explainers = ranks_ME.shape
    return float(friedmanchisquare(*ranks_ME.T).statistic / (num_orders * (num_explainers - 1)))


def _tau(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if (a == a[0]).all() or (b == b[0]).all():
        return np.nan
    return float(kendalltau(a, b).statistic)
