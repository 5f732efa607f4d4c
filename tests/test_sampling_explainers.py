"""What all explainers that sample the model promise, also of outputs that do not vary; LIME's convergence."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.sampled_models import SIDE, Wavy, make_images, make_inputs
from xaibatch.explainers.base import EXPLAINERS, ExplainInput, InputShape
from xaibatch.explainers.explained_output import explained_output, probabilities
from xaibatch.explainers.kernel_shap import KernelShap
from xaibatch.explainers.lime import Lime
from xaibatch.explainers.lime_convergence import equal_error_sizes, measure_convergence
from xaibatch.explainers.occlusion import Occlusion, PatchOcclusion
from xaibatch.explainers.rise import Rise
from xaibatch.maps import repeat_agreement
from xaibatch.perturb.runner import PlanRunner
from xaibatch.perturb.segmentation import patch_grid
from xaibatch.seeding import DrawKey


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
