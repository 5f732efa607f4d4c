"""Faithfulness as a correlation of relevance with the drop of the output, against stock Quantus 0.6 fed the identical
draws, and against slow rewrites of the papers."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.metrics_oracle import MAP_KINDS, Bench, near, replayed, stable_sorting, status_of
from xaibatch.metrics import METRICS
from xaibatch.perturb.plans import FillPlan, SubsetPlan, SuperpixelPlan
from xaibatch.types import ZERO_DENOMINATOR

EXACT = 1e-9
"""For slow rewrites in float64."""

KINDS = sorted(MAP_KINDS)


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
