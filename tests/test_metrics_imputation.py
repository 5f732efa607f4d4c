"""ROAD and Infidelity against stock Quantus 0.6 and slow rewrites of the papers."""

from typing import Any

import numpy as np
import pytest

from tests.metrics_oracle import MAP_KINDS, Bench, near, stable_sorting
from xaibatch.metrics import METRICS
from xaibatch.perturb.plans import ImputationPlan

KINDS = sorted(MAP_KINDS)


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
