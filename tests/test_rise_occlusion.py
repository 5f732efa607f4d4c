"""RISE and occlusion against slow float64 rewrites and Captum."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.sampled_models import Wavy, logits_of, make_images, make_inputs
from xaibatch.errors import ConfigError
from xaibatch.explainers.occlusion import Occlusion, PatchOcclusion, window_positions
from xaibatch.explainers.rise import Rise, draw_masks, rise_map
from xaibatch.seeding import DrawKey

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
