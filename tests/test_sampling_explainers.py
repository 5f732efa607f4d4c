"""KernelSHAP, RISE and occlusion against enumeration and slow float64 rewrites; LIME's convergence measurement."""

from itertools import combinations
from math import comb, factorial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xaibatch.errors import ConfigError
from xaibatch.explainers.base import EXPLAINERS, ExplainInput, InputShape
from xaibatch.explainers.explained_output import explained_output, probabilities
from xaibatch.explainers.kernel_shap import KernelShap
from xaibatch.explainers.lime import Lime
from xaibatch.explainers.lime_convergence import equal_error_sizes, measure_convergence
from xaibatch.explainers.occlusion import Occlusion, PatchOcclusion, window_positions
from xaibatch.explainers.rise import Rise, draw_masks, rise_map
from xaibatch.explainers.shapley_fit import additive_r2, draw_coalitions, shapley_kernel, solve_shapley
from xaibatch.maps import repeat_agreement
from xaibatch.perturb.runner import PlanRunner
from xaibatch.perturb.segmentation import patch_grid
from xaibatch.seeding import DrawKey

SIDE = 12


class Wavy(nn.Module):
    """A small float64 classifier whose classes mix pixels non-linearly."""

    def __init__(self, height=SIDE, width=SIDE, num_classes=3):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        inputs = 3 * height * width
        self.first = nn.Parameter(torch.randn(inputs, 20, generator=generator).double() / inputs**0.5)
        self.second = nn.Parameter(torch.randn(20, num_classes, generator=generator).double())

    def forward(self, images):
        return torch.tanh(2 * images.flatten(1) @ self.first) @ self.second


def make_images(num=2, height=SIDE, width=SIDE, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, 3, height, width)))


def make_inputs(model, images, targets, batch_size=50, segments=None, ids=None):
    runner = PlanRunner(model=model, batch_size=batch_size)
    ids = ids or [f"image-{b}" for b in range(len(images))]
    return ExplainInput(
        model=model,
        images_BCHW=images,
        targets_B=torch.as_tensor(targets),
        keys=tuple(DrawKey(seed=0, image_id=i) for i in ids),
        run_plans=lambda requests: runner.run(images, requests),
        segments=segments or {},
    )


def logits_of(model, image_CHW):
    with torch.no_grad():
        return model(torch.as_tensor(image_CHW)[None]).numpy()[0]


# -- KernelSHAP


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


# -- RISE


def slow_rise(model, image, target, plan, size, p):
    """Eq. 6, one mask at a time, masks by torch's own upsampling."""
    total, shown = np.zeros(size), np.zeros(size)
    for grid, (dy, dx) in zip(plan.grid_Sgg, plan.shift_S2, strict=True):
        up = [(len(grid) + 1) * int(np.ceil(side / len(grid))) for side in size]
        plane = nn.functional.interpolate(torch.from_numpy(grid).double()[None, None], up, mode="bilinear")[0, 0]
        mask = plane.numpy()[dy : dy + size[0], dx : dx + size[1]]
        logits = logits_of(model, image * mask)
        total += np.exp(logits[target]) / np.exp(logits).sum() * mask
        shown += mask
    return (total / (len(plan.grid_Sgg) * p), total / shown)


@pytest.mark.parametrize("size", [(12, 12), (14, 10)])
def test_rise_equals_a_slow_rewrite(size):
    model, images = Wavy(*size), make_images(2, *size)
    maps = {}
    for normalisation in ("expectation", "mask_mean"):
        explainer = Rise(num_masks=70, grid_size=4, keep_probability=0.3, normalisation=normalisation)
        inputs = make_inputs(model, images, [1, 2])
        maps[normalisation] = explainer.explain(inputs).maps_Bhw.numpy()
    for b, target in enumerate((1, 2)):
        plan = draw_masks(inputs.keys[b], size, explainer.options)
        eq6, mean = slow_rise(model, images[b].numpy(), target, plan, size, 0.3)
        np.testing.assert_allclose(maps["expectation"][b], eq6, rtol=0, atol=1e-12)
        np.testing.assert_allclose(maps["mask_mean"][b], mean, rtol=0, atol=1e-12)


def test_rise_mask_expectation():
    """Bilinear weights add up to one, so the mean mask is the keep probability at every pixel, and a constant
    probability c has the constant map c."""
    options = Rise(num_masks=6000, grid_size=5, keep_probability=0.4).options
    plan = draw_masks(DrawKey(seed=0, image_id="a"), (20, 23), options)
    ones = np.ones(6000)
    mean = rise_map(plan, ones, (20, 23), expectation=1.0)
    assert (mean - 0.4).abs().max() < 0.04  # six standard errors of a Bernoulli mean
    torch.testing.assert_close(
        rise_map(plan, 0.7 * ones, (20, 23), expectation=None), torch.full((20, 23), 0.7).double()
    )
    assert plan.shift_S2.min() == 0
    assert plan.shift_S2.max(0).tolist() == [3, 4]


def test_rise_masks_are_keyed():
    model, images = Wavy(), make_images(1)
    first, again, other = (
        Rise(num_masks=20).explain(make_inputs(model, images, [0], ids=[name])).maps_Bhw for name in "aab"
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# -- occlusion


@pytest.mark.parametrize("size", [(12, 12), (15, 10), (4, 17)])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_occlusion_equals_a_slow_rewrite(size, output):
    model, images = Wavy(*size), make_images(2, *size)
    explainer = Occlusion(window=5, stride=3, baseline=0.1, output=output)
    maps = explainer.explain(make_inputs(model, images, [1, 0])).maps_Bhw.numpy()

    def value(image, target):
        logits = logits_of(model, image)
        return (logits if output == "logit" else np.exp(logits) / np.exp(logits).sum())[target]

    windows = [min(5, side) for side in size]
    starts = [sorted({*range(0, side - w + 1, 3), side - w}) for side, w in zip(size, windows, strict=True)]
    for b, target in enumerate((1, 0)):
        total, count = np.zeros(size), np.zeros(size)
        for top in starts[0]:
            for left in starts[1]:
                covered = images[b].numpy().copy()
                covered[:, top : top + 5, left : left + 5] = 0.1
                total[top : top + 5, left : left + 5] += value(images[b], target) - value(covered, target)
                count[top : top + 5, left : left + 5] += 1
        np.testing.assert_allclose(maps[b], total / count, rtol=0, atol=1e-12)


def test_occlusion_equals_captum():
    """Captum averages the falls of the windows that cover an entry in the same way, where windows fit exactly."""
    captum_attr = pytest.importorskip("captum.attr")
    model, images = Wavy(), make_images()
    maps = Occlusion(window=6, stride=3, baseline=0.5, output="logit").explain(make_inputs(model, images, [2, 1]))
    reference = captum_attr.Occlusion(model).attribute(
        images, sliding_window_shapes=(3, 6, 6), strides=(3, 3, 3), baselines=0.5, target=torch.tensor([2, 1])
    )
    assert torch.equal(reference[:, 0], reference[:, 2]), "every channel carries the same value"
    torch.testing.assert_close(maps.maps_Bhw, reference[:, 0].detach().double(), rtol=0, atol=1e-6)


def test_patch_occlusion_is_the_window_of_a_patch():
    size = (32, 48)
    model, images = Wavy(*size), make_images(2, *size)
    tokens = PatchOcclusion(output="logit").explain(make_inputs(model, images, [2, 1])).maps_Bhw
    assert tokens.shape == (2, 2, 3)
    pixels = Occlusion(window=16, stride=16, output="logit").explain(make_inputs(model, images, [2, 1])).maps_Bhw
    torch.testing.assert_close(tokens.repeat_interleave(16, 1).repeat_interleave(16, 2), pixels)


def test_a_gap_between_windows_is_refused():
    with pytest.raises(ConfigError, match="never be covered"):
        Occlusion(window=8, stride=9)
    assert window_positions(5, 5, 100).tolist() == [0]


@pytest.mark.parametrize("size", [(224, 224), (160, 240)])
def test_estimated_passes_are_those_made(size):
    images = torch.zeros(1, 3, *size, dtype=torch.float64)
    shape = InputShape(size, (size[0] // 16, size[1] // 16))
    for explainer in (
        Occlusion(),
        PatchOcclusion(),
        Rise(num_masks=9),
        KernelShap(num_samples=30),
        Lime(num_samples=9),
    ):
        runner = PlanRunner(model=nn.Sequential(nn.AvgPool2d(80), nn.Flatten()), batch_size=99)
        inputs = ExplainInput(
            model=runner.model, images_BCHW=images, targets_B=torch.tensor([0]),
            keys=(DrawKey(seed=0, image_id="a"),),
            run_plans=lambda requests, runner=runner: runner.run(images, requests),
            segments={"quickshift": [patch_grid(size, patch_size=32)]},
        )  # fmt: skip
        explainer.explain(inputs)
        assert runner.num_forward_passes == explainer.num_forward_passes(shape), explainer.name


# -- what all of them promise


@pytest.mark.parametrize("name", ["lime", "kernel_shap", "rise", "occlusion", "occlusion_patch"])
def test_a_batch_equals_its_singles(name):
    options = {
        "lime": {"num_samples": 25, "segmentation": "grid", "segmentation_options": {"patch_size": 4}},
        "kernel_shap": {"num_samples": 25, "segmentation": "grid", "segmentation_options": {"patch_size": 4}},
        "rise": {"num_masks": 25},
        "occlusion": {"window": 5, "stride": 2},
        "occlusion_patch": {},
    }[name]
    model, images = Wavy(16, 16), make_images(3, 16, 16)
    explainer = EXPLAINERS[name](**options)
    whole = explainer.explain(make_inputs(model, images, [0, 1, 2], batch_size=999)).maps_Bhw
    assert whole.shape == ((3, 1, 1) if name == "occlusion_patch" else (3, 16, 16))
    assert whole.dtype == torch.float64
    for b in (1, 2, 0):
        alone = explainer.explain(make_inputs(model, images[b : b + 1], [b], batch_size=4, ids=[f"image-{b}"]))
        torch.testing.assert_close(alone.maps_Bhw[0], whole[b], rtol=0, atol=1e-12)


def test_softmax_does_not_overflow():
    logits = np.array([[1000.0, 1001.0, -1000.0]], np.float32)
    np.testing.assert_allclose(probabilities(logits), [[1 / (1 + np.e), np.e / (1 + np.e), 0]], rtol=1e-12)
    assert explained_output(logits, 1, "logit").tolist() == [1001.0]


# -- LIME's convergence


def test_convergence_of_a_game_with_an_even_part():
    """The even part (products of signs) is noise for independent samples and nearly cancels for antithetic ones."""
    effects = np.random.default_rng(0).normal(size=10) * 0.03

    def probabilities(keep):
        sign = 2.0 * keep - 1
        value = 0.5 + keep @ effects + 0.2 * sign[:, 0] * sign[:, 1] - 0.15 * sign[:, 4] * sign[:, 7]
        return np.stack([value, 1 - value], 1)

    measured = measure_convergence(
        probabilities,
        key=DrawKey(seed=0, image_id="a"),
        num_segments=10,
        target=0,
        sizes=(400, 100, 200),
        num_repeats=6,
    )
    assert measured.sizes_N.tolist() == [100, 200, 400]
    assert measured.independent_RN.shape == measured.antithetic_RN.shape == (6, 3)
    assert (measured.antithetic_RN.mean(0) < measured.independent_RN.mean(0)).all()
    assert measured.independent_RN.mean(0)[0] > measured.independent_RN.mean(0)[2]
    assert (measured.antithetic_agreement_N > measured.agreement_N).all()
    equivalent = equal_error_sizes(measured.sizes_N, measured.independent_RN.mean(0), measured.antithetic_RN.mean(0))
    known = ~np.isnan(equivalent)
    assert (equivalent[known] < measured.sizes_N[known]).all()


def test_equal_error_sizes_of_the_same_curve_are_its_sizes():
    sizes, errors = np.array([10, 20, 40]), np.array([0.4, 0.3, 0.1])
    np.testing.assert_allclose(equal_error_sizes(sizes, errors, errors), sizes)


def test_repeat_agreement():
    assert repeat_agreement(np.array([[1.0, 2.0, 4.0], [2.0, 4.0, 8.0]])) == pytest.approx(1)
    assert repeat_agreement(np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])) == pytest.approx(-1 / 3)
    assert np.isnan(repeat_agreement(np.ones((1, 3))))
    assert np.isnan(repeat_agreement(np.ones((2, 3))))


# -- outputs that do not vary


class Unmoved(nn.Module):
    """Answers the same to every image, but for the rounding that another place in a batch brings."""

    def __init__(self, logits, units=0):
        super().__init__()
        self.logits, self.units = torch.tensor(logits), units

    def forward(self, images):
        place = torch.arange(len(images))[:, None] % 3 - 1
        return (self.logits * (1 + self.units * torch.finfo(torch.float32).eps * place)).to(images.dtype)


EACH_SAMPLING_EXPLAINER = {
    "lime": {"num_samples": 40, "segmentation": "grid", "segmentation_options": {"patch_size": 4}},
    "kernel_shap": {"num_samples": 40, "segmentation": "grid", "segmentation_options": {"patch_size": 4}},
    "rise": {"num_masks": 40, "grid_size": 3},
    "occlusion": {"window": 4, "stride": 4},
    "occlusion_patch": {},
}


@pytest.mark.parametrize("name", EACH_SAMPLING_EXPLAINER)
@pytest.mark.parametrize("units", [0, 8])
def test_an_output_that_does_not_vary_gives_a_map_of_exact_zeros(name, units):
    """So that it is flagged: a mask of the superpixels that rounding puts first would look like any other."""
    images = make_images(3).float()
    model = Unmoved([1.3, -0.4, 2.2], units)
    for options in ({}, {"output": "top_k_mask"}) if name == "lime" else ({},):
        explainer = EXPLAINERS[name](**EACH_SAMPLING_EXPLAINER[name], **options)
        assert not explainer.explain(make_inputs(model, images, [0, 1, 2])).maps_Bhw.any()


@pytest.mark.parametrize("name", ["lime", "kernel_shap"])
def test_a_constant_image_gives_a_map_of_exact_zeros(name):
    """Hiding a superpixel of one colour with its mean colour changes nothing but the mean's rounding."""
    images = torch.full((2, 3, SIDE, SIDE), 0.3)
    explainer = EXPLAINERS[name](**EACH_SAMPLING_EXPLAINER[name])
    assert not explainer.explain(make_inputs(Wavy().float(), images, [0, 1])).maps_Bhw.any()


def test_a_saturated_probability_gives_zeros_and_a_small_one_does_not():
    """Class 0 is certain to the last bit; class 1 varies by its whole (tiny) size."""

    class Certain(nn.Module):
        def forward(self, images):
            small = -50 + images.mean((1, 2, 3))
            return torch.stack([torch.zeros_like(small), small], 1)

    inputs = make_inputs(Certain(), make_images(2), [0, 1])
    maps = Lime(**EACH_SAMPLING_EXPLAINER["lime"], hide=0.0).explain(inputs).maps_Bhw
    assert not maps[0].any()
    assert maps[1].unique().numel() > 5


@pytest.mark.parametrize("name", EACH_SAMPLING_EXPLAINER)
def test_a_model_of_one_output_is_explained_by_its_sigmoid(name):
    """sigmoid(z) is the softmax of (z, 0): the map is that of the two-class model, the direction included."""

    class WithZero(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            z = self.model(images)
            return torch.cat([z, torch.zeros_like(z)], 1)

    one = Wavy(num_classes=1)
    explainer = EXPLAINERS[name](**EACH_SAMPLING_EXPLAINER[name])
    maps = explainer.explain(make_inputs(one, make_images(2), [0, 0])).maps_Bhw
    two = explainer.explain(make_inputs(WithZero(one), make_images(2), [0, 0])).maps_Bhw
    assert maps.unique().numel() > 1
    torch.testing.assert_close(maps, two, rtol=1e-12, atol=1e-14)
