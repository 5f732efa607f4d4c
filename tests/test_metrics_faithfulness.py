"""Faithfulness metrics against stock Quantus 0.6 fed the identical draws, and against slow rewrites of the papers."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.metrics_oracle import MAP_KINDS, Bench, near, replayed, stable_sorting, status_of
from xaibatch.metrics import METRICS
from xaibatch.perturb.plans import FillPlan, ImputationPlan, OrderPlan, SubsetPlan, SuperpixelPlan
from xaibatch.types import ALL_ZERO_MAP, MISSING_LABEL, NAN_MAP, ZERO_DENOMINATOR

EXACT = 1e-9
"""For slow rewrites in float64."""

KINDS = sorted(MAP_KINDS)


# -- random subsets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("baseline", ["black", "mean", "white", 0.25])
def test_faithfulness_correlation_equals_quantus(kind: str, rows: tuple[int, ...], baseline: Any) -> None:
    bench = Bench(kind=kind)
    metric = METRICS["faithfulness_correlation"](num_runs=25, subset_size=60, baseline=baseline)
    plans = [metric.plan(bench.image_view(row)) for row in rows]
    draws = [plan.index_SK[run] for run in range(25) for plan in plans]
    with replayed("choice", draws):
        theirs = bench.quantus("FaithfulnessCorrelation", rows, nr_runs=25, subset_size=60, perturb_baseline=baseline)
    near([bench.native(metric, row) for row in rows], theirs)


@pytest.mark.parametrize("similarity", ["pearson", "spearman"])
def test_faithfulness_correlation_of_probabilities_absolute_maps_and_ranks(similarity: str) -> None:
    bench = Bench()
    metric = METRICS["faithfulness_correlation"](
        num_runs=20, subset_size=50, output="probability", abs=True, similarity=similarity
    )
    import quantus

    with replayed("choice", list(metric.plan(bench.image_view(1)).index_SK)):
        theirs = bench.quantus(
            "FaithfulnessCorrelation", [1], {"softmax": True}, nr_runs=20, subset_size=50, abs=True,
            similarity_func=getattr(quantus.similarity_func, f"correlation_{similarity}"),
        )  # fmt: skip
    near(bench.native(metric, 1), theirs[0])


def test_faithfulness_correlation_of_whole_patches_equals_a_slow_rewrite() -> None:
    bench = Bench(kind="tokens")
    metric = METRICS["faithfulness_correlation"](num_runs=30, entries="patch", subset_size=5)
    plan = metric.plan(bench.image_view(0))
    assert isinstance(plan, SuperpixelPlan)
    assert ((~plan.keep_SM).sum(1) == 5).all()
    drops, sums = [], []
    for keep_M in plan.keep_SM:
        copy, total = bench.x[0].copy(), 0.0
        for patch in np.flatnonzero(~keep_M):
            row, column = divmod(int(patch), 4)
            square = np.s_[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            copy[(slice(None), *square)] = bench.x[0].min()
            total += bench.maps[0][square].astype(float).sum()
        drops.append(bench.logits[0, bench.y[0]] - bench.forward(copy[None])[0, bench.y[0]])
        sums.append(total)
    near(bench.native(metric, 0), np.corrcoef(sums, drops)[0, 1], EXACT)


def test_subsets_do_not_look_at_the_map_and_differ_between_images_and_repeats() -> None:
    bench = Bench()
    metric = METRICS["faithfulness_correlation"](num_runs=4)
    plan, again = metric.plan(bench.image_view(0)), metric.plan(bench.image_view(0))
    assert isinstance(plan, SubsetPlan)
    assert plan.index_SK.shape == (4, 224)
    assert all(len(set(subset)) == 224 for subset in plan.index_SK)
    np.testing.assert_array_equal(plan.index_SK, again.index_SK)
    other, repeat = metric.plan(bench.image_view(1)), metric.plan(bench.view(0, repeat=1))
    assert (plan.index_SK != other.index_SK).any()
    assert (plan.index_SK != repeat.index_SK).any()
    assert metric.num_forward_passes(4) == metric.num_forward_passes(1) == 4


# -- ordered removal


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
@pytest.mark.parametrize("rows", [(1,), (0, 1, 2)])
def test_faithfulness_estimate_equals_quantus(kind: str, rows: tuple[int, ...]) -> None:
    bench = Bench(kind=kind)
    with stable_sorting():
        theirs = bench.quantus("FaithfulnessEstimate", rows, features_in_step=64)
    near([bench.native(METRICS["faithfulness_estimate"](features_in_step=64), row) for row in rows], theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(2,), (0, 1, 2)])
def test_monotonicity_equals_quantus(kind: str, rows: tuple[int, ...]) -> None:
    bench = Bench(kind=kind)
    metric = METRICS["monotonicity"](features_in_step=128, num_samples=4)
    plans = [metric.plan(bench.view(row)) for row in rows]
    assert all(isinstance(plan, FillPlan) for plan in plans)
    draws = np.stack([plan.value_S for plan in plans], 1)
    with stable_sorting(), replayed("uniform", list(draws)):
        theirs = bench.quantus("MonotonicityCorrelation", rows, features_in_step=128, nr_samples=4)
    near([bench.native(metric, row) for row in rows], theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_sensitivity_n_has_the_sums_and_drops_of_quantus(kind: str) -> None:
    """Quantus correlates its arrays across images, one number a step; ours correlates them along the steps."""
    import quantus
    from scipy.stats import pearsonr

    bench = Bench(kind=kind)
    seen: list[dict[str, np.ndarray]] = []

    class Spy(quantus.SensitivityN):  # type: ignore[misc]
        def evaluate_batch(self, **data: Any) -> Any:
            seen.extend(super().evaluate_batch(**data))
            return seen

    setattr(quantus, "Spy", Spy)  # noqa: B010
    try:
        with stable_sorting():
            across = bench.quantus("Spy", features_in_step=64)
    finally:
        del quantus.Spy
    last = int(0.8 * 32 * 32 // 64)
    metric = METRICS["sensitivity_n"](semantics="quantus-0.6", features_in_step=64)
    for row in range(3):
        drops, sums = seen[0]["pred_deltas"][row], seen[0]["att_sums"][row]
        if np.ptp(sums[:last]):
            near(bench.native(metric, row), pearsonr(drops[:last], sums[:last])[0])
        else:
            assert status_of(lambda row=row: bench.native(metric, row)) == ZERO_DENOMINATOR
    assert len(across) == last != 3


def test_monotonicity_of_quantus_fails_where_some_outputs_of_a_batch_are_small() -> None:
    bench = Bench(num=3)
    probability = np.exp(bench.logits) / np.exp(bench.logits).sum(1, keepdims=True)
    eps = float(np.median(probability[np.arange(3), bench.y]))
    with pytest.raises(ValueError, match="assign"):
        bench.quantus("MonotonicityCorrelation", features_in_step=256, nr_samples=2, eps=eps)
    assert all(np.isfinite(bench.natives(METRICS["monotonicity"](features_in_step=256, num_samples=2, eps=eps))))


def test_sensitivity_n_of_the_paper_equals_a_slow_rewrite() -> None:
    bench = Bench(kind="signed")
    metric = METRICS["sensitivity_n"](num_sizes=4, num_runs=12)
    plan = metric.plan(bench.image_view(0))
    assert isinstance(plan, SuperpixelPlan)
    assert not metric.plan_uses_map
    correlations: dict[int, list[tuple[float, float]]] = {}
    probability = np.exp(bench.logits[0]) / np.exp(bench.logits[0]).sum()
    for keep_M in plan.keep_SM:
        removed = ~keep_M[plan.segments_HW]
        copy = np.where(removed, bench.x[0].min(), bench.x[0])
        logits = bench.forward(copy[None])[0]
        drop = (probability - np.exp(logits) / np.exp(logits).sum())[bench.y[0]]
        correlations.setdefault(int((~keep_M).sum()), []).append((bench.maps[0][removed].astype(float).sum(), drop))
    assert sorted(correlations) == [1, 2, 5, 13]
    expected = np.mean([np.corrcoef(np.array(pairs).T)[0, 1] for pairs in correlations.values()])
    near(bench.native(metric, 0), expected, EXACT)


def test_monotonicity_of_arya_puts_the_image_in_where_quantus_never_changes_its_copies() -> None:
    bench = Bench(kind="signed")
    metric = METRICS["monotonicity_arya"](features_in_step=256)
    with stable_sorting():
        theirs = bench.quantus("Monotonicity", features_in_step=256)
        upside_down = Bench(kind="signed", maps=bench.maps.max() - np.abs(bench.maps))
        assert upside_down.quantus("Monotonicity", features_in_step=256) == theirs == [True, True, True]
    for row in range(3):
        order = np.argsort(np.tile(np.abs(bench.maps[row]).ravel(), 3), kind="stable")
        copy, values = np.full(bench.x[row].size, bench.x[row].min()), []
        for first in range(0, len(order), 256):
            copy[order[first : first + 256]] = bench.x[row].ravel()[order[first : first + 256]]
            logits = bench.forward(copy.reshape(bench.x[row].shape)[None])[0]
            values.append((np.exp(logits) / np.exp(logits).sum())[bench.y[row]])
        assert bench.native(metric, row) == float(all(a <= b for a, b in pairwise(values)))
    assert 0.0 in bench.natives(metric)


def test_monotonicity_of_arya_is_one_for_the_order_that_the_model_wants() -> None:
    bench = Bench(num=1)
    bench.model.forward = lambda x: x.double().mean((1, 2, 3))[:, None] * x.new_tensor([1.0, 0.0, -1.0])  # type: ignore
    bench.y = np.array([0])
    assert bench.native(METRICS["monotonicity_arya"](features_in_step=64), 0) == 1.0
    bench.y = np.array([2])
    assert bench.native(METRICS["monotonicity_arya"](features_in_step=64), 0) == 0.0


# -- regions


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


# -- imputation and infidelity


@pytest.mark.parametrize("kind", KINDS)
def test_road_equals_quantus_where_quantus_runs(kind: str) -> None:
    """One channel: the mean over images of ours is the mean over percentages of Quantus's."""
    bench = Bench(num=4, kind=kind, channels=1)
    percentages = [1, 5, 20, 50, 80, 95]
    metric = METRICS["road"](percentages=percentages, noise=0.3)
    plans = [metric.plan(bench.view(row)) for row in range(4)]
    noise = [plan.noise_CK(share, 1) / 0.3 for share in range(len(percentages)) for plan in plans]
    with stable_sorting(), pytest.MonkeyPatch.context() as patch:
        stream = iter(noise)
        patch.setattr(np.random, "randn", lambda *shape: next(stream).reshape(shape))
        theirs = bench.quantus("ROAD", percentages=percentages, noise=0.3)
    ours = np.stack([bench.run(row, plans[row]).argmax(1) == bench.y[row] for row in range(4)])
    near(ours.mean(0), [theirs[share] for share in percentages])
    near(np.mean(bench.natives(metric)), np.mean(list(theirs.values())))


def test_road_of_quantus_fails_on_colour_images_where_ours_scores() -> None:
    bench = Bench(num=1, kind="tokens")
    with pytest.raises(IndexError), stable_sorting():
        bench.quantus("ROAD", percentages=[10, 50])
    assert bench.native(METRICS["road"](percentages=(10, 50)), 0) in (0.0, 0.5, 1.0)


def test_imputed_pixels_solve_the_equations_of_the_paper() -> None:
    import torch

    from xaibatch.perturb.expand import expand

    bench = Bench(num=1, channels=3, kind="segments")
    order = np.argsort(-bench.maps[0].ravel(), kind="stable").astype(np.int32)
    counts = np.array([0, 1, 300, 1023], np.int32)
    plan = ImputationPlan(order_N=order, counts_S=counts, noise_std=0.0, key=bench.view(0).key)
    for copy, count in zip(expand(plan, torch.as_tensor(bench.x[0]).double(), 0, 4).numpy(), counts, strict=True):
        removed = np.zeros(1024, bool)
        removed[order[:count]] = True
        removed = removed.reshape(32, 32)
        np.testing.assert_array_equal(copy[:, ~removed], bench.x[0].astype(float)[:, ~removed])
        for row, column in zip(*np.nonzero(removed), strict=True):
            total, weights = 0.0, 0.0
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    inside = 0 <= row + down < 32 and 0 <= column + right < 32
                    weight = (1 / 6 if 0 in (down, right) else 1 / 12) * inside * ((down, right) != (0, 0))
                    total = total + (weight * copy[:, row + down, column + right] if weight else 0.0)
                    weights += weight
            np.testing.assert_allclose(copy[:, row, column], total / weights, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("baseline", ["black", 0.5])
def test_infidelity_equals_quantus(kind: str, baseline: Any) -> None:
    bench = Bench(kind=kind)
    theirs = bench.quantus("Infidelity", perturb_patch_sizes=[8], n_perturb_samples=2, perturb_baseline=baseline)
    near(bench.natives(METRICS["infidelity"](patch_size=8, baseline=baseline)), theirs)


def test_infidelity_of_quantus_fails_where_the_square_does_not_divide_the_image() -> None:
    bench = Bench(num=1)
    with pytest.raises((ValueError, IndexError)):
        bench.quantus("Infidelity", perturb_patch_sizes=[7], n_perturb_samples=1)
    assert np.isfinite(bench.native(METRICS["infidelity"](patch_size=7), 0))


def test_infidelity_of_the_paper_removes_each_square_alone() -> None:
    bench = Bench(kind="signed")
    errors = []
    for row in range(0, 32, 8):
        for column in range(0, 32, 8):
            copy = bench.x[0].astype(float).copy()
            copy[:, row : row + 8, column : column + 8] = 0.0
            drop = bench.logits[0, bench.y[0]] - bench.forward(copy.astype(np.float32)[None])[0, bench.y[0]]
            errors.append((drop - (bench.maps[0] * (bench.x[0] - copy)).sum()) ** 2)
    near(bench.native(METRICS["infidelity"](semantics="yeh-2019", baseline=0.0), 0), np.mean(errors), 1e-6)


# -- maps of any scale, constant maps

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


# -- insertion and deletion


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


# -- sharing, ties, undefined scores


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


@pytest.mark.parametrize("name", ["faithfulness_correlation", "faithfulness_estimate", "monotonicity", "sensitivity_n"])
def test_a_constant_map_has_no_correlation(name: str) -> None:
    bench = Bench(num=1, maps=np.full((1, 32, 32), 0.3, np.float32))
    assert status_of(lambda: bench.native(METRICS[name](), 0)) == ZERO_DENOMINATOR
    bench.maps = np.full((1, 4, 4), 0.1, np.float64)
    bench.patch_size = 4
    assert status_of(lambda: bench.native(METRICS[name](), 0)) == ZERO_DENOMINATOR


def test_a_model_that_ignores_the_image_has_no_correlation() -> None:
    bench = Bench(num=1)
    bench.model.forward = lambda x: x.double().new_zeros(len(x), 3) + 0.5  # type: ignore[method-assign]
    bench.logits = bench.forward(bench.x)
    assert status_of(lambda: bench.native(METRICS["faithfulness_correlation"](num_runs=5), 0)) == ZERO_DENOMINATOR


def test_an_unknown_label_is_not_scored_but_the_predicted_class_is() -> None:
    bench = Bench(num=1)
    bench.y = np.array([-1])
    assert status_of(lambda: bench.native(METRICS["pixel_flipping"](), 0)) == MISSING_LABEL
    assert 0 < bench.native(METRICS["pixel_flipping"](scored_class="predicted"), 0) < 1
