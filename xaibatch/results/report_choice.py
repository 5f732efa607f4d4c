"""A cube and its maps in, the images worth showing out: typical ones, best and worst, and those that explainers
disagree on.

Every choice is a rule, stated beside the pictures, so that nobody need wonder who picked them.

Shape letters: E explainers, M metrics, I images, h w a map's sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from xaibatch.results.cube import MetricInfo, ScoreCube
from xaibatch.results.report_images import StoredMap


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Some images in the order in which they are shown, the rule that chose them, and one remark an image. `name`: of
    the file that shows them."""

    name: str
    title: str
    rule: str
    image_ids: tuple[str, ...]
    remarks: tuple[str, ...]


def typical(cube: ScoreCube, num_images: int, without: str | None) -> Choice:
    """For each true class the rightly predicted images nearest to the class's median scores, or, where none is
    predicted rightly, the nearest of all its images; all classes alike. Without labels, of all images."""
    scores_IM = _scaled(cube, without)
    classes = sorted({name for name in cube.labels_I if name is not None}) or [None]
    each = max(1, num_images // len(classes))
    chosen: list[str] = []
    missed: list[str] = []
    for name in classes:
        right = (cube.labels_I == name) & ((cube.predicted_I == name) | (name is None))
        missed += [] if right.any() else [str(name)]
        rows = np.flatnonzero(right if right.any() else cube.labels_I == name)
        centre_M = _median(scores_IM[rows])
        away_IM = np.abs(np.where(np.isfinite(centre_M), scores_IM[rows] - centre_M, 0.0))
        distance = np.where(np.isfinite(away_IM).any(1), np.where(np.isfinite(away_IM), away_IM, 0).sum(1), np.inf)
        chosen += [cube.image_ids[rows[k]] for k in np.argsort(distance, kind="stable")[:each]]
    return Choice(
        name="figure",
        title="Typical images by class",
        rule=_typical_rule(
            missed, labelled=classes != [None], predicts=any(name is not None for name in cube.predicted_I)
        ),
        image_ids=tuple(chosen),
        remarks=("",) * len(chosen),
    )


def best_and_worst(cube: ScoreCube, num_each: int, without: str | None) -> Choice | None:
    """The images with the highest and lowest standing under the leading metric, averaged over explainers; None if no
    metric has a direction or too few images are scored."""
    metric = leading_metric(cube)
    if metric is None:
        return None
    column = _scaled(cube, without)[:, [m.label for m in cube.metrics].index(metric.label)] * metric.sign
    rows = [int(k) for k in np.argsort(-column, kind="stable") if np.isfinite(column[k])]
    if len(rows) < 2 * num_each:
        return None
    best, worst = rows[:num_each], rows[::-1][:num_each]
    return Choice(
        name="cases",
        title="Best and worst cases",
        rule=f"the {num_each} images on which explanations score best and worst in {metric.title} {metric.arrow}, "
        "averaged over explainers after scaling each to its own spread",
        image_ids=tuple(cube.image_ids[k] for k in [*best, *worst]),
        remarks=tuple(["best"] * num_each + ["worst"] * num_each),
    )


def disagreements(
    cube: ScoreCube, maps: Mapping[tuple[str, str], StoredMap], num_images: int, without: str | None
) -> Choice | None:
    """The images whose maps agree least: lowest mean Spearman correlation over pairs of explainers."""
    explainers = [e for e in cube.explainers if e != without]
    if len(explainers) < 2:
        return None
    agreement = {i: map_agreement([maps[i, e].grid_hw for e in explainers if (i, e) in maps]) for i in cube.image_ids}
    compared = sum(any((i, e) in maps for e in explainers) for i in cube.image_ids)
    among = (
        "" if compared == cube.num_images else f"among {compared:,} of {cube.num_images:,} images, drawn at random: "
    )
    order = sorted((i for i in agreement if np.isfinite(agreement[i])), key=lambda i: (agreement[i], i))[:num_images]
    if not order:
        return None
    return Choice(
        name="disputed",
        title="Where explainers disagree",
        rule=f"{among}the images with the lowest mean rank correlation (Spearman) between the maps of different "
        "explainers",
        image_ids=tuple(order),
        remarks=tuple(f"ρ = {agreement[i]:z.2f}".replace("-", "−") for i in order),
    )


def map_agreement(grids: Sequence[NDArray[np.float64]]) -> float:
    """Mean Spearman correlation over pairs of maps of equal size; NaN where there is no pair or a map is constant.

    >>> import numpy as np
    >>> map_agreement([np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[0.0, 2.0], [4.0, 9.0]])])
    1.0
    """
    ranked = [rankdata(grid) for grid in grids if np.isfinite(grid).all() and np.ptp(grid) > 0]
    pairs = [(a, b) for a, b in combinations(ranked, 2) if a.size == b.size]
    return round(float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])), 12) if pairs else np.nan


def leading_metric(cube: ScoreCube) -> MetricInfo | None:
    """The first metric of the faithfulness family with a direction, else the first with a direction; none that
    compares images with each other."""
    directed = [metric for metric in cube.metrics if metric.sign and not metric.across_images]
    return next((metric for metric in directed if metric.family == "faithfulness"), directed[0] if directed else None)


def _typical_rule(missed: Sequence[str], *, labelled: bool, predicts: bool) -> str:
    """`missed`: classes of which no image is predicted rightly; `predicts`: not so for a model of one output."""
    nearest = "whose scores (mean over explainers) are nearest to the"
    if not labelled:
        return f"the images {nearest} median; they have no labels"
    if not predicts:
        return f"of each true class, the images {nearest} class's median"
    rule = f"of each true class, the rightly predicted images {nearest} class's median"
    if missed:
        rule += f"; as no image of {' or '.join(missed)} is predicted rightly, those shown are wrongly predicted ones"
    return rule


def _scaled(cube: ScoreCube, without: str | None) -> NDArray[np.float64]:
    """(I,M): each explainer's scores centred and over their own spread, averaged over explainers; NaN where none is
    scored."""
    kept = [e for e, explainer in enumerate(cube.explainers) if explainer != without] or list(
        range(len(cube.explainers))
    )
    values_EMI = cube.image_means()[kept]
    scored = np.isfinite(values_EMI)
    count_EM1 = np.maximum(scored.sum(-1, keepdims=True), 1)
    mean_EM1 = np.where(scored, values_EMI, 0).sum(-1, keepdims=True) / count_EM1
    spread_EM1 = np.sqrt((np.where(scored, values_EMI - mean_EM1, 0) ** 2).sum(-1, keepdims=True) / count_EM1)
    scaled = np.where(scored, (values_EMI - mean_EM1) / np.where(spread_EM1 > 0, spread_EM1, 1), 0)
    number_MI = scored.sum(0)
    return np.where(number_MI > 0, scaled.sum(0) / np.maximum(number_MI, 1), np.nan).T


def _median(scores_KM: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median of each column's scored entries; NaN where there is none."""
    return np.array([np.median(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan for c in scores_KM.T])
