"""LIME equals the lime package: golden numbers, its own run on the same samples, and scikit-learn's ridge."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lime.lime_image import ImageExplanation, LimeImageExplainer
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from sklearn.metrics import pairwise_distances
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from xaibatch.errors import ConfigError
from xaibatch.explainers.base import ExplainInput
from xaibatch.explainers.explained_output import probabilities as probabilities_of
from xaibatch.explainers.lime import Lime
from xaibatch.explainers.lime_fit import draw_samples, fit_local_model, proximity, top_k_mask
from xaibatch.explainers.superpixels import paint
from xaibatch.perturb.plans import SuperpixelPlan
from xaibatch.perturb.runner import PlanRunner
from xaibatch.perturb.segmentation import patch_grid, segment
from xaibatch.seeding import DrawKey


@pytest.fixture(scope="module")
def small_model(golden_small):
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=3, qkv_bias=True
    )
    model.load_state_dict(load_file(golden_small / "small_vit.safetensors"))
    return model.eval()


class Linear(nn.Module):
    """A float64 classifier without structure, for comparing arithmetic."""

    def __init__(self, num_inputs, num_classes=3):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(num_inputs, num_classes, generator=generator).double() / num_inputs**0.5)

    def forward(self, images):
        return torch.sin(images.flatten(1) @ self.weight) * 2


def make_inputs(model, images_BCHW, targets, batch_size=64, seed=0, segments=None):
    images = torch.as_tensor(images_BCHW)
    runner = PlanRunner(model=model, batch_size=batch_size)
    keys = tuple(DrawKey(seed=seed, image_id=f"image-{b}") for b in range(len(images)))
    return ExplainInput(
        model=model,
        images_BCHW=images,
        targets_B=torch.as_tensor(targets),
        keys=keys,
        run_plans=lambda requests: runner.run(images, requests),
        segments=segments or {},
    )


class GivenSamples(np.random.RandomState):
    """A random state whose randint gives the wanted sample matrix to LimeImageExplainer."""

    def __init__(self, keep_SM):
        super().__init__(0)
        self.keep_SM = keep_SM

    def randint(self, low, high=None, size=None, dtype=int):
        return self.keep_SM.astype(int).reshape(-1) if size == self.keep_SM.size else super().randint(low, high, size)


def lime_package(image_CHW, segments_HW, keep_SM, model, hide_color):
    """Run LimeImageExplainer.explain_instance itself with this segmentation and these samples."""

    def classifier(images_NHWC):
        with torch.no_grad():
            logits = model(torch.from_numpy(images_NHWC.transpose(0, 3, 1, 2).copy())).numpy()
        return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    explainer = LimeImageExplainer(random_state=GivenSamples(keep_SM))
    return explainer.explain_instance(
        np.ascontiguousarray(image_CHW.transpose(1, 2, 0)),
        classifier,
        top_labels=3,
        hide_color=hide_color,
        num_samples=len(keep_SM),
        segmentation_fn=lambda image: segments_HW,
        random_seed=0,
    )


# -- golden numbers


def check_golden(golden, images, model, which, num_run=None):
    """`num_run`: how many of the 500 samples to run through the model; the others keep the golden probabilities."""
    for i in which:
        segments = segment(images[i], "quickshift")
        np.testing.assert_array_equal(segments, golden[f"{i}_segments"])
        keep = golden[f"{i}_data"].astype(bool)
        plan = SuperpixelPlan(segments_HW=segments, keep_SM=keep[:num_run], baseline=0.0)
        batch = torch.from_numpy(images[i : i + 1])
        (logits,) = PlanRunner(model=model, batch_size=32).run(batch, [(0, plan)])
        probabilities = golden[f"{i}_probs"].astype(np.float64)
        np.testing.assert_allclose(probabilities_of(logits), probabilities[:num_run], rtol=0, atol=1e-5)
        probabilities[:num_run] = probabilities_of(logits)
        top = golden[f"{i}_top_labels"][0]
        fit = fit_local_model(keep, probabilities)
        np.testing.assert_allclose(fit.weights_MK.T, golden[f"{i}_weights_all"], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(top_k_mask(fit.weights_MK[:, top], segments, 2), golden[f"{i}_mask"])
        exact = fit_local_model(keep, golden[f"{i}_probs"])  # the package's own probabilities: only arithmetic left
        np.testing.assert_allclose(exact.weights_MK.T, golden[f"{i}_weights_all"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(exact.weights_MK[:, top], golden[f"{i}_weights_top"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.sort(exact.intercept_K), np.sort(golden[f"{i}_intercept"]), rtol=0, atol=1e-12)
        np.testing.assert_allclose(exact.r2_K[top], golden[f"{i}_score_last"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(exact.local_K[top], golden[f"{i}_local_pred_last"][0], rtol=0, atol=1e-12)


def test_golden_small(golden_small, small_model):
    golden, images = np.load(golden_small / "small_lime.npz"), np.load(golden_small / "small_lrp.npz")["x"]
    check_golden(golden, images, small_model, golden["images"])


def test_golden_radiographs(shared):
    import timm

    golden, images = np.load(shared / "golden/tiny_lime.npz"), np.load(shared / "golden/tiny_lrp.npz")["x"]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    weights = load_file(shared / "models/vit_tiny_cxr3.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    check_golden(golden, images, model, golden["images"], num_run=16)


# -- the package's own run


@pytest.mark.parametrize("hide", ["mean", 0.0, -1.5])
@pytest.mark.parametrize("num_samples", [12, 80])
def test_equals_the_package_run_on_the_same_samples(hide, num_samples):
    """num_samples 12 has fewer samples than the 24 superpixels (scikit-learn then solves the dual problem)."""
    images = np.random.default_rng(0).normal(size=(2, 3, 24, 16))
    model = Linear(3 * 24 * 16)
    segments = [patch_grid((24, 16), patch_size=4), patch_grid((24, 16), patch_size=8)]
    explainer = Lime(num_samples=num_samples, hide=hide, segmentation="grid")
    inputs = make_inputs(model, images, [1, 2], segments={"grid": segments})
    result = explainer.explain(inputs)
    for b, target in enumerate((1, 2)):
        keep = draw_samples(inputs.keys[b].generator("lime"), num_samples, int(segments[b].max()) + 1)
        explanation = lime_package(images[b], segments[b], keep, model, None if hide == "mean" else hide)
        weights = dict(explanation.local_exp[target])
        expected = np.vectorize(weights.get)(segments[b])
        np.testing.assert_allclose(result.maps_Bhw[b].numpy(), expected, rtol=0, atol=1e-9)
        for top_k in (1, 2, 5, 100):
            _, mask = explanation.get_image_and_mask(target, True, num_features=top_k, hide_rest=False)
            masks = Lime(
                num_samples=num_samples, hide=hide, segmentation="grid", output="top_k_mask", top_k=top_k
            ).explain(inputs)
            np.testing.assert_array_equal(masks.maps_Bhw[b].numpy(), mask)


def test_r2_is_the_package_score():
    image = np.random.default_rng(0).normal(size=(3, 16, 16))
    model, segments = Linear(3 * 16 * 16), patch_grid((16, 16), patch_size=4)
    inputs = make_inputs(model, image[None], [0], segments={"grid": [segments]})
    result = Lime(num_samples=60, hide=0.0, segmentation="grid").explain(inputs)
    keep = draw_samples(inputs.keys[0].generator("lime"), 60, 16)
    explainer_score = {}
    for label in range(3):  # the package keeps the score of the last label only
        explainer = LimeImageExplainer(random_state=GivenSamples(keep))
        explained = explainer.explain_instance(
            np.ascontiguousarray(image.transpose(1, 2, 0)),
            lambda x: probabilities_of(model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).detach().numpy()),
            labels=(label,), top_labels=None, hide_color=0, num_samples=60, segmentation_fn=lambda x: segments,
        )  # fmt: skip
        explainer_score[label] = explained.score
    np.testing.assert_allclose(result.extras["r2"], [explainer_score[0]], rtol=0, atol=1e-9)
    assert result.extras["num_segments"].tolist() == [16]


# -- the parts


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 30), st.booleans())
def test_fit_equals_scikit_learn_ridge(seed, num_samples, num_segments, antithetic):
    generator = np.random.default_rng(seed)
    keep = draw_samples(generator, num_samples, num_segments, antithetic)
    probabilities = probabilities_of(generator.normal(size=(num_samples, 4)))
    distances = pairwise_distances(keep.astype(int), keep[:1].astype(int), metric="cosine").ravel()
    weights = np.sqrt(np.exp(-(distances**2) / 0.25**2))
    np.testing.assert_allclose(proximity(keep, 0.25), weights, rtol=1e-12)
    fit = fit_local_model(keep, probabilities, 0.25)
    for k in range(4):
        ridge = Ridge(alpha=1, fit_intercept=True).fit(keep, probabilities[:, k], sample_weight=weights)
        np.testing.assert_allclose(fit.weights_MK[:, k], ridge.coef_, rtol=0, atol=1e-11)
        np.testing.assert_allclose(fit.intercept_K[k], ridge.intercept_, rtol=0, atol=1e-11)
        np.testing.assert_allclose(
            fit.r2_K[k], ridge.score(keep, probabilities[:, k], sample_weight=weights), rtol=0, atol=1e-9
        )


def test_a_constant_probability_has_zero_weights():
    fit = fit_local_model(draw_samples(np.random.default_rng(0), 50, 7), np.full((50, 2), 0.5))
    assert not fit.weights_MK.any()
    assert fit.r2_K.tolist() == [1, 1]
    np.testing.assert_allclose(fit.intercept_K, 0.5, atol=1e-15)


def test_a_linear_probability_is_recovered_up_to_the_ridge():
    keep = draw_samples(np.random.default_rng(0), 4000, 6)
    truth = np.array([0.3, -0.2, 0.1, 0.0, 0.05, -0.05])
    fit = fit_local_model(keep, (0.4 + keep @ truth)[:, None])
    np.testing.assert_allclose(fit.weights_MK[:, 0], truth, atol=2e-3)
    assert fit.r2_K[0] > 0.999


@pytest.mark.parametrize("weights", [[0.5, -0.9, 0.1, 0.0], [-0.1, -0.2, -0.3, -0.4], [0.2, 0.3, 0.4, 0.1]])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mask_equals_the_package_mask(weights, top_k):
    segments = patch_grid((4, 4), patch_size=2)
    explanation = ImageExplanation(np.zeros((4, 4, 3)), segments)
    explanation.local_exp[0] = sorted(enumerate(weights), key=lambda pair: abs(pair[1]), reverse=True)
    _, mask = explanation.get_image_and_mask(0, positive_only=True, num_features=top_k, hide_rest=False)
    np.testing.assert_array_equal(top_k_mask(np.array(weights), segments, top_k), mask)


def test_samples_are_keyed_fair_and_start_with_the_image():
    key = DrawKey(seed=1, image_id="a")
    keep = draw_samples(key.generator("lime"), 4001, 9)
    assert keep[0].all()
    assert np.array_equal(keep, draw_samples(key.generator("lime"), 4001, 9))
    assert not np.array_equal(keep, draw_samples(DrawKey(seed=2, image_id="a").generator("lime"), 4001, 9))
    assert np.abs(keep[1:].mean(0) - 0.5).max() < 0.04  # five standard errors


@pytest.mark.parametrize("num_samples", [2, 3, 10, 11])
def test_antithetic_samples_come_in_complements(num_samples):
    keep = draw_samples(np.random.default_rng(0), num_samples, 5, antithetic=True)
    assert keep.shape == (num_samples, 5)
    assert keep[0].all()
    pairs = (num_samples - 1) // 2
    assert np.array_equal(keep[1 : 1 + 2 * pairs : 2], ~keep[2 : 2 + 2 * pairs : 2])


def test_paint_gives_each_pixel_its_superpixel():
    painted = paint(np.array([5.0, 6.0, 7.0, 8.0]), patch_grid((4, 4), patch_size=2))
    assert painted.tolist() == [[5, 5, 6, 6]] * 2 + [[7, 7, 8, 8]] * 2


# -- the explainer


def test_a_batch_equals_its_singles_whatever_the_packing():
    images = np.random.default_rng(3).normal(size=(3, 3, 16, 16))
    model = Linear(3 * 16 * 16)
    explainer = Lime(num_samples=33, segmentation="grid", segmentation_options={"patch_size": 4})
    whole = explainer.explain(make_inputs(model, images, [0, 1, 2], batch_size=1000))
    for b in (2, 0, 1):
        inputs = make_inputs(model, images, [0, 1, 2], batch_size=7)
        single = ExplainInput(
            model=model, images_BCHW=inputs.images_BCHW[b : b + 1], targets_B=inputs.targets_B[b : b + 1],
            keys=inputs.keys[b : b + 1],
            run_plans=lambda r, b=b, x=inputs: PlanRunner(model=model, batch_size=7).run(x.images_BCHW[b : b + 1], r),
        )  # fmt: skip
        np.testing.assert_allclose(explainer.explain(single).maps_Bhw[0], whole.maps_Bhw[b], rtol=0, atol=1e-12)


def test_all_images_share_full_batches():
    images = np.random.default_rng(3).normal(size=(3, 3, 16, 16))
    batches = []

    class Counting(Linear):
        def forward(self, images):
            batches.append(len(images))
            return super().forward(images)

    explainer = Lime(num_samples=20, segmentation="grid")
    explainer.explain(make_inputs(Counting(3 * 16 * 16), images, [0, 0, 0], batch_size=16))
    assert batches == [16, 16, 16, 12]
    assert explainer.num_forward_passes() == 20


def test_segments_made_beforehand_are_used_and_otherwise_made(small_model, golden_small):
    images = np.load(golden_small / "small_lrp.npz")["x"][:1]
    explainer = Lime(num_samples=10, hide=0.0)
    assert explainer.segmentation == "quickshift"
    made = explainer.explain(make_inputs(small_model, images, [1]))
    given = {"quickshift": [segment(images[0], explainer.segmentation)]}
    handed = explainer.explain(make_inputs(small_model, images, [1], segments=given))
    assert torch.equal(made.maps_Bhw, handed.maps_Bhw)
    assert made.maps_Bhw.shape == (1, 64, 64)
    grid = Lime(num_samples=10, segmentation="grid").explain(make_inputs(small_model, images, [1]))
    assert grid.extras["num_segments"].tolist() == [64], "the ViT's own 8x8 patch grid"


def test_an_image_of_one_superpixel_has_a_constant_map():
    images = np.random.default_rng(3).normal(size=(1, 3, 16, 16))
    result = Lime(num_samples=10, segmentation="grid").explain(make_inputs(Linear(3 * 16 * 16), images, [0]))
    assert torch.isfinite(result.maps_Bhw).all()
    assert len(result.maps_Bhw.unique()) == 1


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'num_samples'"):
        Lime(num_sample=10)
    with pytest.raises(ConfigError, match="segmentation"):
        Lime(segmentation="watershed")
