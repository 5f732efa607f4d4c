"""Faithfulness as the area under a curve of outputs, entries or regions removed by relevance, against stock Quantus 0.6
and slow rewrites of the papers."""

from typing import Any

import numpy as np
import pytest

from tests.metrics_oracle import MAP_KINDS, Bench, near, replayed, stable_sorting
from xaibatch.metrics import METRICS
from xaibatch.perturb.plans import OrderPlan

EXACT = 1e-9
"""For slow rewrites in float64."""

KINDS = sorted(MAP_KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("baseline", ["black", -0.5])
def test_pixel_flipping_equals_quantus(kind: str, rows: tuple[int, ...], baseline: Any) -> None:
    bench = Bench(kind=kind)
    options = {"features_in_step": 64, "baseline": baseline}
    metric, area = METRICS["pixel_flipping"](**options), METRICS["pixel_flipping"](**options, auc="steps")
    theirs = {"features_in_step": 64, "perturb_baseline": baseline}
    with stable_sorting():
        curves = bench.quantus("PixelFlipping", rows, **theirs)
        areas = bench.quantus("PixelFlipping", rows, **theirs, return_auc_per_sample=True)
    for curve, whole, row in zip(curves, areas, rows, strict=True):
        plan = metric.plan(bench.view(row))
        near(metric.curve(bench.view(row), bench.run(row, plan)), curve)
        near(bench.native(area, row), whole)
        near(bench.native(metric, row), np.trapezoid(curve) / (len(curve) - 1))


def test_the_mean_baseline_is_that_of_the_unchanged_image() -> None:
    """Quantus takes it anew from the copy as changed so far, so its removed entries have many colours."""
    bench = Bench(num=1, kind="tokens")
    metric = METRICS["pixel_flipping"](features_in_step=64, baseline="mean", auc="steps")
    number = float(bench.x[0].astype(np.float64).mean())
    with stable_sorting():
        running = bench.quantus(
            "PixelFlipping", features_in_step=64, perturb_baseline="mean", return_auc_per_sample=True
        )
        frozen = bench.quantus(
            "PixelFlipping", features_in_step=64, perturb_baseline=number, return_auc_per_sample=True
        )
    near(bench.native(metric, 0), frozen[0], 1e-4)
    assert abs(running[0] - frozen[0]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patch", "order"), [(8, "morf"), (8, "lerf"), (5, "morf"), (6, "lerf")])
def test_region_perturbation_equals_quantus(kind: str, patch: int, order: str) -> None:
    bench = Bench(kind=kind)
    metric = METRICS["region_perturbation"](patch_size=patch, order=order, regions_evaluation=12)
    with stable_sorting():
        theirs = bench.quantus("RegionPerturbation", patch_size=patch, order=order, regions_evaluation=12)
    for row in range(3):
        plan = metric.plan(bench.view(row))
        near(metric.curve(bench.view(row), bench.run(row, plan)), theirs[row])


def test_a_large_region_perturbation_is_a_large_drop() -> None:
    """Quantus measures the drop and declares that lower is better."""
    import quantus

    assert quantus.RegionPerturbation.score_direction.value == "lower"
    bench = Bench(num=1)
    weights = np.zeros((32, 32))
    weights[:8, :8] = 1
    bench.maps = weights[None].astype(np.float32)
    bench.x[0] = np.where(weights, 2.0, 0.5)
    bench.x[0, :, -1, -1] = 0

    def forward(x: Any) -> Any:
        seen = (x.double() * x.new_tensor(weights)).mean((1, 2, 3)) * 40
        return seen[:, None] * x.new_tensor([1.0, 0.0, 0.0]).double()

    bench.model.forward = forward  # type: ignore[method-assign]
    bench.logits, bench.y = bench.forward(bench.x), np.array([0])
    morf, lerf = (bench.native(METRICS["region_perturbation"](order=order), 0) for order in ("morf", "lerf"))
    assert morf > lerf + 0.3
    declared = {
        order: METRICS["region_perturbation"](order=order).higher_is_better for order in ("morf", "lerf", "random")
    }
    assert declared == {"morf": True, "lerf": False, "random": None}


def test_region_perturbation_in_random_order_equals_quantus_given_the_permutation() -> None:
    bench = Bench()
    metric = METRICS["region_perturbation"](patch_size=8, order="random")
    permutations = [bench.view(row).key.generator("region_perturbation").permutation(16) for row in range(3)]
    with stable_sorting(), replayed("permutation", permutations):
        theirs = bench.quantus("RegionPerturbation", patch_size=8, order="random")
    near(bench.natives(metric), [np.trapezoid(curve) / (len(curve) - 1) for curve in theirs])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch", [8, 7])
def test_selectivity_equals_quantus(kind: str, patch: int) -> None:
    bench = Bench(kind=kind)
    with stable_sorting():
        theirs = bench.quantus("Selectivity", patch_size=patch)
    near(bench.natives(METRICS["selectivity"](patch_size=patch, auc="steps")), np.trapezoid(theirs, axis=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("baseline", [0.1, -1.0])
def test_irof_equals_quantus_on_one_image(kind: str, baseline: float) -> None:
    bench = Bench(kind=kind, channels=1)
    metric = METRICS["irof"](baseline=baseline)
    for row in range(3):
        with stable_sorting():
            theirs = bench.quantus("IROF", [row], perturb_baseline=baseline)
        near(bench.native(metric, row), theirs[0])


def test_irof_of_quantus_fails_on_colour_images_where_ours_scores() -> None:
    bench = Bench(num=1, kind="tokens")
    with pytest.raises(AssertionError, match="mask shape"), stable_sorting():
        bench.quantus("IROF")
    segments = METRICS["irof"](baseline=0.1).plan(bench.view(0)).segments_HW
    mean_M = [bench.maps[0][segments == m].mean(dtype=float) for m in range(segments.max() + 1)]
    copy, ratios = bench.x[0].copy(), []
    probability = np.exp(bench.logits[0]) / np.exp(bench.logits[0]).sum()
    for segment in np.argsort(-np.array(mean_M), kind="stable"):
        copy = np.where(segments == segment, np.float32(0.1), copy)
        logits = bench.forward(copy[None])[0]
        ratios.append((np.exp(logits) / np.exp(logits).sum() / probability)[bench.y[0]])
    near(bench.native(METRICS["irof"](baseline=0.1), 0), len(ratios) - np.trapezoid(ratios), 1e-6)


def test_irof_of_quantus_depends_on_its_batch_and_on_its_own_changes() -> None:
    """Its mean baseline is taken over the whole batch as changed so far, and shorter curves are padded with zeros."""
    bench = Bench(kind="tokens", channels=1)
    with stable_sorting():
        alone = [bench.quantus("IROF", [row])[0] for row in range(3)]
        together = bench.quantus("IROF")
    assert np.abs(np.array(alone) - together).max() > 1e-3
    for row, x in enumerate(bench.x):
        frozen = METRICS["irof"](baseline=float(x.mean(dtype=np.float64)))
        near(bench.native(METRICS["irof"](), row), bench.native(frozen, row), 1e-6)


@pytest.mark.parametrize("name", ["deletion_auc", "insertion_auc"])
def test_insertion_and_deletion_equal_a_slow_rewrite(name: str) -> None:
    bench = Bench(kind="signed")
    metric = METRICS[name](baseline=0.0, pixels_in_step=100)
    order = np.argsort(-bench.maps[1].ravel(), kind="stable")
    klass = int(bench.logits[1].argmax())
    heights = []
    for count in [*range(0, 1024, 100), 1024]:
        shown = np.zeros(1024, bool)
        shown[order[:count]] = True
        shown = shown.reshape(32, 32) if name == "insertion_auc" else ~shown.reshape(32, 32)
        logits = bench.forward((bench.x[1] * shown).astype(np.float32)[None])[0]
        heights.append((np.exp(logits) / np.exp(logits).sum())[klass])
    near(bench.native(metric, 1), np.trapezoid(heights) / 11, EXACT)
    plan = metric.plan(bench.view(1))
    assert isinstance(plan, OrderPlan)
    assert plan.num_samples == metric.num_forward_passes(1, (3, 32, 32)) == 11
