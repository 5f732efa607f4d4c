"""What holds for every faithfulness metric: maps of any scale, ties, shared plans, what cannot be scored."""

from typing import Any

import numpy as np
import pytest

from tests.metrics_oracle import MAP_KINDS, Bench, near, stable_sorting, status_of
from xaibatch.metrics import METRICS
from xaibatch.types import ALL_ZERO_MAP, MISSING_LABEL, NAN_MAP

KINDS = sorted(MAP_KINDS)

EVERY: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "faithfulness_estimate": (
        {"features_in_step": 64, "baseline": 0.1}, "FaithfulnessEstimate",
        {"features_in_step": 64, "perturb_baseline": 0.1},
    ),
    "pixel_flipping": (
        {"features_in_step": 64, "baseline": 0.1}, "PixelFlipping", {"features_in_step": 64, "perturb_baseline": 0.1},
    ),
    "region_perturbation": (
        {"patch_size": 8, "regions_evaluation": 7, "baseline": 0.1, "auc": "steps"}, "RegionPerturbation",
        {"patch_size": 8, "regions_evaluation": 7, "perturb_baseline": 0.1},
    ),
    "selectivity": (
        {"patch_size": 8, "baseline": 0.1, "auc": "steps"}, "Selectivity", {"patch_size": 8, "perturb_baseline": 0.1},
    ),
    "irof": ({"baseline": 0.1}, "IROF", {"perturb_baseline": 0.1}),
    "infidelity": (
        {"patch_size": 8, "baseline": 0.1}, "Infidelity",
        {"perturb_patch_sizes": [8], "n_perturb_samples": 1, "perturb_baseline": 0.1},
    ),
}  # fmt: skip
"""Ours and Quantus's name and options of metrics whose copies hang on the map alone."""


def one_by_one(name: str, bench: Bench) -> tuple[list[float], list[float]]:
    """The native scores, and Quantus's of one call per image."""
    options, theirs, theirs_options = EVERY[name]
    expected = []
    with stable_sorting():
        for row in range(len(bench.x)):
            (value,) = bench.quantus(theirs, [row], **theirs_options)
            expected.append(float(value) if np.ndim(value) == 0 else float(np.trapezoid(value)))
    scale = {"pixel_flipping": {"auc": "steps"}}.get(name, {})
    return bench.natives(METRICS[name](**options, **scale)), expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(EVERY))
def test_maps_of_any_scale_score_as_in_quantus_one_by_one(name: str, kind: str) -> None:
    """Peaks of 0.01, 3 and 50: Quantus, called for one image, normalises it by its own peak as ours does."""
    bench = Bench(kind=kind, channels=1)
    bench.maps *= np.float32([[[0.01]], [[3]], [[50]]])
    ours, theirs = one_by_one(name, bench)
    near(ours, theirs)


@pytest.mark.parametrize("name", ["infidelity", "pixel_flipping", "region_perturbation", "selectivity"])
def test_a_constant_map_among_others_scores_as_in_quantus(name: str) -> None:
    """Everything is tied: entries and squares go by position on both sides. Alone Quantus refuses such a map."""
    bench = Bench(kind="tokens", channels=1)
    bench.maps[1] = 1.0
    options, theirs, theirs_options = EVERY[name]
    with stable_sorting():
        values = bench.quantus(theirs, **theirs_options)
    scale = {"pixel_flipping": {"auc": "steps"}}.get(name, {})
    near(bench.natives(METRICS[name](**options, **scale)), values if np.ndim(values) == 1 else np.trapezoid(values))
    with pytest.raises(AssertionError, match="equal to one"):
        bench.quantus(theirs, [1], **theirs_options)


def test_metrics_of_equal_cell_key_make_equal_plans() -> None:
    bench = Bench(kind="ties")
    flipping = METRICS["pixel_flipping"](features_in_step=64)
    curve = METRICS["sensitivity_n"](semantics="quantus-0.6", features_in_step=64)
    assert flipping.cell_key() == curve.cell_key()
    one, two = flipping.plan(bench.view(0)), curve.plan(bench.view(0))
    np.testing.assert_array_equal(one.order_N, two.order_N)
    np.testing.assert_array_equal(one.counts_S, two.counts_S)
    assert flipping.cell_key() != METRICS["pixel_flipping"](features_in_step=64, baseline="white").cell_key()
    draws = METRICS["faithfulness_correlation"]
    assert draws(similarity="spearman").cell_key() == draws(abs=True).cell_key() != draws(num_runs=99).cell_key()
    assert draws(semantics="paper-2023").cell_key() == draws(entries="pixel").cell_key() != draws().cell_key()


def test_equal_relevance_is_ordered_by_position() -> None:
    bench = Bench(maps=np.ones((3, 32, 32), np.float32))
    plan = METRICS["pixel_flipping"](entries="pixel").plan(bench.view(0))
    np.testing.assert_array_equal(plan.order_N, np.arange(1024))
    assert plan.counts_S.tolist() == [64 * step for step in range(1, 17)]


PLAN_METRICS = [name for name in METRICS if METRICS[name].family == "faithfulness"]


@pytest.mark.parametrize("name", PLAN_METRICS)
def test_maps_that_cannot_be_scored_are_null_with_a_reason(name: str) -> None:
    bench = Bench(num=1, maps=np.zeros((1, 32, 32), np.float32))
    options = {"num_runs": 4} if name in ("faithfulness_correlation", "sensitivity_n") else {}
    metric = METRICS[name](**options)
    assert status_of(lambda: bench.native(metric, 0)) == ALL_ZERO_MAP
    bench.maps = np.full((1, 32, 32), np.nan, np.float32)
    assert status_of(lambda: bench.native(metric, 0)) == NAN_MAP


def test_an_unknown_label_is_not_scored_but_the_predicted_class_is() -> None:
    bench = Bench(num=1)
    bench.y = np.array([-1])
    assert status_of(lambda: bench.native(METRICS["pixel_flipping"](), 0)) == MISSING_LABEL
    assert 0 < bench.native(METRICS["pixel_flipping"](scored_class="predicted"), 0) < 1
