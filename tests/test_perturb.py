"""Plans expanded on a device equal their slow NumPy definition."""

import numpy as np
import pytest
import torch

from tests.perturb_oracle import (
    HEIGHT,
    KEY,
    PLAN_NAMES,
    WIDTH,
    baseline_numpy,
    image_and_generator,
    make_plans,
    perturbed_numpy,
)
from xaibatch.perturb.expand import expand, prepare, resolve_baseline, soft_masks
from xaibatch.perturb.plans import SoftMaskPlan, SubsetPlan, SuperpixelPlan, UniformNoisePlan
from xaibatch.perturb.segmentation import patch_grid
from xaibatch.seeding import DrawKey


@pytest.mark.parametrize("baseline", [0.25, "black", "white", "mean", "blur"])
@pytest.mark.parametrize("which", range(len(PLAN_NAMES)), ids=PLAN_NAMES)
def test_expand_equals_slow_definition(which, baseline):
    image, generator = image_and_generator()
    plan = make_plans(generator, baseline)[which]
    expected = perturbed_numpy(plan, image)
    copies = expand(plan, torch.from_numpy(image), 0, plan.num_samples).numpy()
    # exact but for the last bits of sums (means, blur, bilinear weights)
    np.testing.assert_allclose(copies, expected, rtol=0, atol=1e-14)
    for start, stop in ((0, 1), (1, 3), (plan.num_samples - 1, plan.num_samples)):
        np.testing.assert_array_equal(expand(plan, torch.from_numpy(image), start, stop).numpy(), copies[start:stop])


@pytest.mark.parametrize("which", range(len(PLAN_NAMES)), ids=PLAN_NAMES)
def test_expand_in_float32_is_the_cast_definition(which):
    image, generator = image_and_generator(dtype=np.float32)
    plan = make_plans(generator, "mean")[which]
    expected = perturbed_numpy(plan, image.astype(np.float64)).astype(np.float32)
    copies = expand(plan, torch.from_numpy(image), 0, plan.num_samples)
    assert copies.dtype == torch.float32
    # only the soft mask multiplies after its cast to float32
    np.testing.assert_allclose(copies.numpy(), expected, rtol=0, atol=5e-7 if PLAN_NAMES[which] == "soft_mask" else 0)


def test_superpixel_copies_equal_lime_package_copies():
    """LimeImageExplainer.data_labels makes the copies; the classifier only looks at them."""
    from lime.lime_image import LimeImageExplainer

    image, _ = image_and_generator()
    segments = patch_grid((HEIGHT, WIDTH), patch_size=4)
    seen = []

    def classifier(images):
        seen.extend(images)
        return np.zeros((len(images), 2))

    explainer = LimeImageExplainer(random_state=3)
    image_hwc = np.ascontiguousarray(image.transpose(1, 2, 0))
    data, _ = explainer.data_labels(image_hwc, np.full_like(image_hwc, 0.5), segments, classifier, 20)
    plan = SuperpixelPlan(segments_HW=segments, keep_SM=data.astype(bool), baseline=0.5)
    copies = expand(plan, torch.from_numpy(image), 0, 20).numpy()
    np.testing.assert_array_equal(copies, np.stack(seen).transpose(0, 3, 1, 2))


def test_noise_depends_on_the_key_and_sample_only():
    image, _ = image_and_generator()
    plan = UniformNoisePlan(key=KEY, num_samples=6, low=-1.0, high=1.0)
    longer = UniformNoisePlan(key=KEY, num_samples=60, low=-1.0, high=1.0)
    other = UniformNoisePlan(key=DrawKey(seed=7, image_id="other"), num_samples=6, low=-1.0, high=1.0)
    copies = expand(plan, torch.from_numpy(image), 4, 6)
    assert torch.equal(copies, expand(longer, torch.from_numpy(image), 4, 6))
    assert not torch.equal(copies, expand(other, torch.from_numpy(image), 4, 6))
    assert not torch.equal(copies[0], copies[1])


def test_soft_mask_of_ones_shows_the_image():
    image, _ = image_and_generator()
    plan = SoftMaskPlan(grid_Sgg=np.ones((2, 4, 4), np.float32), shift_S2=np.zeros((2, 2), np.int32), baseline=9.0)
    np.testing.assert_allclose(soft_masks(plan, (HEIGHT, WIDTH), 0, 2).numpy(), 1.0, atol=1e-15)
    np.testing.assert_allclose(expand(plan, torch.from_numpy(image), 0, 1)[0].numpy(), image, atol=1e-14)


def test_blur_of_a_side_smaller_than_the_kernel_equals_scipy():
    image = np.random.default_rng(1).normal(size=(1, 3, 200))
    blurred = resolve_baseline(torch.from_numpy(image[:, :, :3].copy()), "blur").numpy()
    np.testing.assert_allclose(blurred, baseline_numpy(image[:, :, :3], "blur"), atol=1e-14)


@pytest.mark.parametrize(
    "plan",
    [
        SubsetPlan(index_SK=np.array([[0, HEIGHT * WIDTH]], np.int32), entries="pixel", baseline=0.0),
        SubsetPlan(index_SK=np.array([[-1]], np.int32), entries="channel", baseline=0.0),
        SuperpixelPlan(segments_HW=np.zeros((3, 3), np.int32), keep_SM=np.ones((1, 1), bool), baseline=0.0),
        SuperpixelPlan(segments_HW=np.ones((HEIGHT, WIDTH), np.int32), keep_SM=np.ones((1, 1), bool), baseline=0.0),
        SoftMaskPlan(
            grid_Sgg=np.ones((1, 4, 4), np.float32), shift_S2=np.full((1, 2), 99, np.int32), baseline=0.0
        ),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(plan):
    image, _ = image_and_generator()
    with pytest.raises(ValueError, match=r"fit|allowed"):
        expand(plan, torch.from_numpy(image), 0, 1)


def test_unknown_plan_kind_is_named():
    with pytest.raises(TypeError, match="str"):
        prepare("no plan", torch.zeros(1, 2, 2))
