"""What a metric declares for its options, range and direction, against the scores that it gives under them."""

from collections.abc import Iterator
from itertools import combinations, product
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest

from tests.metrics_oracle import SIDE, Bench, some_masks
from xaibatch.errors import NotScoredError
from xaibatch.maps import MapOptions
from xaibatch.metrics import METRICS, Metric

ROUNDING = 1e-9
"""Scores may leave their range by the rounding of a sum, and by the 1e-12 inside the logarithm of the entropy."""

SMALL: dict[str, dict[str, Any]] = {
    "faithfulness_correlation": {"num_runs": 8},
    "sensitivity_n": {"num_sizes": 3, "num_runs": 6},
    "monotonicity": {"num_samples": 2},
    "smooth_mprt": {"num_samples": 2},
    "avg_sensitivity": {"num_samples": 2},
    "max_sensitivity": {"num_samples": 2},
    "local_lipschitz_estimate": {"num_samples": 2},
    "relative_input_stability": {"num_samples": 2},
    "relative_output_stability": {"num_samples": 2},
    "mprt": {"stages": (1, -1)},
    "irof": {"num_segments": 25},
    "road": {"percentages": (10, 60)},
}


def choices(name: str) -> dict[str, list[Any]]:
    """Each option that is a choice, with all it can be."""
    fields = METRICS[name].Options.model_fields
    found = {field: choices_of(info.annotation) for field, info in fields.items()}
    return {field: values for field, values in found.items() if len(values) > 1}


def choices_of(annotation: Any) -> list[Any]:
    if annotation is bool:
        return [False, True]
    if get_origin(annotation) in (Union, UnionType):
        return [value for part in get_args(annotation) for value in choices_of(part)]
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []


def forms(name: str) -> Iterator[tuple[dict[str, Any], Metric]]:
    """The metric under every pair of choices."""
    seen = set()
    of = choices(name)
    for pair in combinations(of, 2) if len(of) > 1 else [tuple(of)]:
        for values in product(*(of[field] for field in pair)):
            options = SMALL.get(name, {}) | dict(zip(pair, values, strict=True))
            metric = METRICS[name](**options)
            if metric.options not in seen:
                seen.add(metric.options)
                yield options, metric


def odd_maps() -> np.ndarray:
    """Signed values; the same that all but cancel; negative ones only; a single pixel; positive ones (5,H,W)."""
    signed = np.random.default_rng(5).normal(size=(SIDE, SIDE))
    single = np.zeros((SIDE, SIDE))
    single[3, 4] = 1.0
    return np.stack([signed, signed - signed.mean() * 0.999, -np.abs(signed), single, np.abs(signed)])


@pytest.fixture(scope="module")
def bench() -> Bench:
    bench = Bench(num=5, maps=odd_maps(), masks=some_masks(5))
    bench.twins = bench.x * np.where(bench.masks[:, None], np.float32(0.5), np.float32(1))
    return bench


@pytest.mark.parametrize("name", sorted(METRICS))
def test_scores_lie_in_the_declared_range_under_every_pair_of_options(name: str, bench: Bench) -> None:
    num_scored = 0
    for options, metric in forms(name):
        low, high = metric.bounds
        for row in range(len(bench.x)):
            try:
                score = bench.native(metric, row)
            except NotScoredError:
                continue
            num_scored += 1
            assert low - ROUNDING <= score <= high + ROUNDING, (options, row)
    assert num_scored


@pytest.mark.parametrize(
    ("name", "options", "bounds"),
    [
        ("pixel_flipping", {}, (0, 1)),
        ("pixel_flipping", {"auc": "steps"}, (0, np.inf)),
        ("pixel_flipping", {"output": "logit"}, (-np.inf, np.inf)),
        ("selectivity", {}, (0, 1)),
        ("selectivity", {"auc": "steps"}, (0, np.inf)),
        ("region_perturbation", {}, (-1, 1)),
        ("region_perturbation", {"auc": "steps"}, (-np.inf, np.inf)),
        ("region_perturbation", {"output": "logit"}, (-np.inf, np.inf)),
        ("irof", {}, (-np.inf, np.inf)),
        ("irof", {"auc": "unit"}, (-np.inf, 1)),
        ("deletion_auc", {}, (0, 1)),
        ("insertion_auc", {"output": "logit"}, (-np.inf, np.inf)),
        ("sparseness", {"abs": False}, (0, 1)),
        ("effective_complexity", {"unit": "share"}, (0, 1)),
        ("top_k_intersection", {}, (0, 1)),
        ("top_k_intersection", {"concept_influence": True}, (0, np.inf)),
        ("attribution_localisation", {}, (0, 1)),
        ("attribution_localisation", {"weighted": True}, (0, np.inf)),
        ("relevance_mass_accuracy", {}, (0, 1)),
        ("relevance_mass_accuracy", {"mass": "signed"}, (-np.inf, np.inf)),
        ("relevance_mass_accuracy", {"mass": "signed", "abs": True}, (0, 1)),
    ],
)
def test_the_declared_range_is_no_wider_than_needed(name: str, options: dict[str, Any], bounds: Any) -> None:
    assert METRICS[name](**options).bounds == bounds


# -- directions


def linear_bench(num: int = 5) -> tuple[Bench, np.ndarray]:
    """A model whose first logit is a weighted sum of the pixels plus one, and its exact relevance (B,H,W), all of it
    positive: removing a pixel by a zero lowers the logit by what the map says."""
    bench = Bench(num=num)
    generator = np.random.default_rng(6)
    weights = np.kron(generator.exponential(size=(4, 4)), np.ones((SIDE // 4, SIDE // 4))) / 500
    bench.x = np.abs(bench.x)
    bench.model.forward = lambda x: (  # type: ignore[method-assign]
        ((x.double() * x.new_tensor(weights).double()).sum((1, 2, 3)) + 1)[:, None]
        * x.new_tensor([1.0, -1.0, 0.0]).double()
    )
    bench.logits, bench.y = bench.forward(bench.x), np.zeros(num, int)
    return bench, weights * bench.x.sum(1)


DIRECTED = {
    "pixel_flipping": {"baseline": 0.0},
    "region_perturbation": {"baseline": 0.0},
    "selectivity": {"baseline": 0.0},
    "irof": {"baseline": 0.0},
    "deletion_auc": {"baseline": 0.0},
    "insertion_auc": {"baseline": 0.0},
    "faithfulness_correlation": {"baseline": 0.0, "num_runs": 30},
    "faithfulness_estimate": {"baseline": 0.0},
    "sensitivity_n": {"baseline": 0.0},
}

UNDIRECTED = ("region_perturbation", "sensitivity_n")
"""Those that have no direction under some of their options."""


@pytest.mark.parametrize("name", sorted(DIRECTED))
def test_the_exact_map_is_the_better_one_in_the_declared_direction(name: str) -> None:
    """Against random maps, under every pair of options."""
    bench, exact = linear_bench()
    random = np.random.default_rng(7).uniform(size=exact.shape)
    directions = set()
    for options, _ in forms(name):
        metric = METRICS[name](**(options | DIRECTED[name]))
        directions.add(metric.higher_is_better)
        if metric.higher_is_better is None:
            continue
        means = []
        for bench.maps in (exact, random):
            means.append(np.mean(bench.natives(metric)))
        assert (means[0] > means[1]) == metric.higher_is_better, (options, means)
    assert (None in directions) == (name in UNDIRECTED)
    assert (len(directions - {None}) == 2) == (name == "region_perturbation")


def test_sums_of_single_steps_run_against_a_drop_that_adds_up() -> None:
    """Sensitivity-N along the steps: the exact map's sums fall from step to step, and the drop rises."""
    bench, bench.maps = linear_bench(num=3)
    metric = METRICS["sensitivity_n"](semantics="quantus-0.6", output="logit", similarity="spearman", baseline=0.0)
    assert bench.natives(metric) == pytest.approx([-1.0] * 3)
    assert metric.higher_is_better is None


def test_an_image_whose_own_logit_is_negative_has_no_relative_output() -> None:
    bench = Bench(num=1)
    bench.logits[0], bench.y = [1.0, -1.0, 0.0], np.array([0])
    assert np.isfinite(bench.native(METRICS["irof"](output="logit"), 0))
    for bench.y in np.array([[1], [2]]):
        assert np.isfinite(bench.native(METRICS["irof"](), 0))
        with pytest.raises(NotScoredError, match="not positive"):
            bench.native(METRICS["irof"](output="logit"), 0)


# -- signed maps


def quadrants(values: list[list[float]]) -> Bench:
    """One image, a map of four squares, and a mask that holds the upper two."""
    bench = Bench(num=1, masks=np.kron([[[True, True], [False, False]]], np.ones((SIDE // 2, SIDE // 2), bool)))
    bench.maps = np.kron(np.array([values]), np.ones((SIDE // 2, SIDE // 2)))
    return bench


def test_relevance_mass_accuracy_is_a_share_of_the_positive_relevance_before_normalisation() -> None:
    """Map [[3, -5], [1, 0]]: 3 of 4 positive units lie in the upper row, 8 of 9 of the magnitude; the signed sums are
    -2 and -1, whose quotient 2 is no share."""
    bench = quadrants([[3.0, -5.0], [1.0, 0.0]])
    metric = METRICS["relevance_mass_accuracy"]
    assert bench.native(metric(), 0) == 0.75
    assert metric().score(bench.view(0, map_options=MapOptions(normalise="min_max"))) == 0.75
    assert bench.native(metric(abs=True), 0) == pytest.approx(8 / 9, rel=1e-12)
    assert bench.native(metric(mass="signed"), 0) == pytest.approx(2.0, rel=1e-12)
    assert (metric().higher_is_better, metric(mass="signed").higher_is_better) == (True, None)
    bench.maps = -np.abs(bench.maps)
    with pytest.raises(NotScoredError, match="no positive relevance"):
        bench.native(metric(), 0)


@pytest.mark.parametrize("name", ["sparseness", "complexity", "attribution_localisation"])
def test_a_map_with_negative_values_has_no_shares(name: str) -> None:
    """Each part over a signed total: outside [0, 1], and of any sign."""
    metric = METRICS[name](abs=False)
    with pytest.raises(NotScoredError, match="set abs") as caught:
        quadrants([[1.0, -3.0], [3.0, 1.0]]).native(metric, 0)
    assert caught.value.status == "negative_map"
    assert np.isfinite(quadrants([[1.0, 3.0], [3.0, 1.0]]).native(metric, 0))
