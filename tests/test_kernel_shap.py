"""KernelSHAP against enumeration of all coalitions and a general constrained solver."""

from itertools import combinations
from math import comb, factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampled_models import SIDE, Wavy, logits_of, make_images, make_inputs
from xaibatch.explainers.kernel_shap import KernelShap
from xaibatch.explainers.shapley_fit import additive_r2, draw_coalitions, shapley_kernel, solve_shapley
from xaibatch.perturb.segmentation import patch_grid


def exact_shapley(value, num_players):
    """The definition: the mean gain over all orders, grouped by coalition (Shapley 1953)."""
    phi = np.zeros(num_players)
    for i in range(num_players):
        others = [j for j in range(num_players) if j != i]
        for size in range(num_players):
            share = factorial(size) * factorial(num_players - size - 1) / factorial(num_players)
            for coalition in combinations(others, size):
                phi[i] += share * (value({*coalition, i}) - value(set(coalition)))
    return phi


@pytest.mark.parametrize("num_players", [1, 2, 3, 5, 8])
def test_all_coalitions_give_the_exact_shapley_values(num_players):
    table = np.random.default_rng(num_players).normal(size=2**num_players)

    def value(coalition):
        return table[sum(1 << player for player in coalition)]

    keep, weights = draw_coalitions(np.random.default_rng(0), 2**num_players, num_players, paired=True)
    assert len(np.unique(keep, axis=0)) == len(keep) == 2**num_players
    values = np.array([value(set(np.flatnonzero(row))) for row in keep])[:, None]
    phi = solve_shapley(keep, values, weights)[:, 0]
    np.testing.assert_allclose(phi, exact_shapley(value, num_players), rtol=0, atol=1e-12)


@pytest.mark.parametrize("paired", [False, True])
def test_sampled_values_converge_to_the_exact_ones(paired):
    """A game of single and pairwise effects: exact values are b_i + sum_j a_ij / 2."""
    generator = np.random.default_rng(0)
    single, pair = generator.normal(size=12), np.triu(generator.normal(size=(12, 12)), 1)
    exact = single + (pair + pair.T).sum(1) / 2

    def value(keep):
        z = keep.astype(float)
        return (z @ single + np.einsum("si,ij,sj->s", z, pair, z))[:, None]

    keep, weights = draw_coalitions(np.random.default_rng(1), 2000, 12, paired)
    phi = solve_shapley(keep, value(keep), weights)[:, 0]
    # a pair of complements cancels pairwise effects exactly, so paired sampling is exact for this game
    np.testing.assert_allclose(phi, exact, rtol=0, atol=1e-10 if paired else 0.35)
    if not paired:
        assert np.abs(phi - exact).max() > 1e-4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 25), st.integers(3, 60), st.booleans())
def test_efficiency_holds_exactly(seed, num_players, num_samples, paired):
    generator = np.random.default_rng(seed)
    keep, weights = draw_coalitions(generator, num_samples, num_players, paired)
    assert len(keep) <= max(num_samples, 2)
    assert keep[0].all()
    assert not keep[1].any()
    assert ((keep[2:].sum(1) > 0) & (keep[2:].sum(1) < num_players)).all()
    values = generator.normal(size=(len(keep), 2))
    phi = solve_shapley(keep, values, weights)
    np.testing.assert_allclose(phi.sum(0), values[0] - values[1], rtol=0, atol=1e-10)


def test_an_additive_game_is_solved_from_few_samples():
    effects = np.random.default_rng(0).normal(size=15)
    keep, weights = draw_coalitions(np.random.default_rng(1), 40, 15, paired=False)
    values = (3.0 + keep @ effects)[:, None]
    phi = solve_shapley(keep, values, weights)
    np.testing.assert_allclose(phi[:, 0], effects, rtol=0, atol=1e-10)
    np.testing.assert_allclose(additive_r2(keep, values, weights, phi), 1.0, atol=1e-12)


def test_solution_equals_a_general_constrained_solver():
    """Lagrange's equations of the weighted problem, written out, against the fit of deviations."""
    generator = np.random.default_rng(3)
    keep, weights = draw_coalitions(generator, 200, 9, paired=False)
    weights = weights * generator.uniform(0.1, 2.0, len(weights))
    values = generator.normal(size=(200, 1))
    z = keep.astype(float)
    system = np.zeros((10, 10))
    system[:9, :9], system[:9, 9], system[9, :9] = z.T @ (weights[:, None] * z), 1, 1
    right = np.append(z.T @ (weights * (values - values[1])[:, 0]), values[0] - values[1])
    np.testing.assert_allclose(
        solve_shapley(keep, values, weights)[:, 0], np.linalg.solve(system, right)[:9], atol=1e-10
    )


def test_drawn_sizes_follow_the_kernel():
    keep, _ = draw_coalitions(np.random.default_rng(0), 20002, 16, paired=False)
    sizes = np.arange(1, 16)
    share = np.array([shapley_kernel(16, k) * comb(16, k) for k in sizes.tolist()])
    np.testing.assert_allclose(share, 15 / (sizes * (16 - sizes)), rtol=1e-12)
    counted = np.bincount(keep[2:].sum(1), minlength=16)[1:16] / 20000
    np.testing.assert_allclose(counted, share / share.sum(), rtol=0, atol=0.015)  # four standard errors
    np.testing.assert_allclose(keep[2:].mean(0), 0.5, rtol=0, atol=0.015)


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_kernel_shap_of_an_image_is_exact_for_few_superpixels(output):
    model, images = Wavy(), make_images()
    segments = [patch_grid((SIDE, SIDE), patch_size=6)] * 2
    explainer = KernelShap(num_samples=16, segmentation="grid", baseline=0.3, output=output)
    result = explainer.explain(make_inputs(model, images, [2, 0], segments={"grid": segments}))
    for b, target in enumerate((2, 0)):

        def value(coalition, b=b, target=target):
            shown = np.isin(segments[b], list(coalition))
            logits = logits_of(model, np.where(shown, images[b].numpy(), 0.3))
            return (logits if output == "logit" else np.exp(logits) / np.exp(logits).sum())[target]

        expected = exact_shapley(value, 4)[segments[b]]
        np.testing.assert_allclose(result.maps_Bhw[b].numpy(), expected, rtol=0, atol=1e-12)
    assert result.extras["num_segments"].tolist() == [4, 4]
    assert (result.extras["r2"] <= 1).all()
