"""Plans in, perturbed copies out, as slow NumPy loops over copies and pixels in float64; some of every kind of plan."""

from functools import singledispatch

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from xaibatch.perturb.plans import (
    OrderPlan,
    SoftMaskPlan,
    SubsetPlan,
    SuperpixelPlan,
    UniformNoisePlan,
    WindowPlan,
)
from xaibatch.perturb.segmentation import patch_grid
from xaibatch.seeding import DrawKey

CHANNELS, HEIGHT, WIDTH = 3, 12, 10
KEY = DrawKey(seed=7, image_id="image")


def baseline_numpy(image, baseline):
    if baseline == "blur":
        sigma = min(image.shape[1:]) / 16
        return np.stack([gaussian_filter(channel, sigma, mode="reflect", truncate=4.0) for channel in image])
    named = {"black": image.min, "white": image.max, "mean": image.mean}
    return np.full(image.shape, named[baseline]() if baseline in named else float(baseline))


@singledispatch
def perturbed_numpy(plan, image):
    raise NotImplementedError


@perturbed_numpy.register
def _(plan: SubsetPlan, image):
    base, copies = baseline_numpy(image, plan.baseline), []
    for indices in plan.index_SK:
        copy = image.copy()
        for i in indices:
            replace_entry(copy, base, i, plan.entries)
        copies.append(copy)
    return np.stack(copies)


@perturbed_numpy.register
def _(plan: OrderPlan, image):
    base, copies = baseline_numpy(image, plan.baseline), []
    for count in plan.counts_S:
        if plan.direction == "delete":
            copy, source = image.copy(), base
        else:
            copy, source = base.copy(), image
        for i in plan.order_N[:count]:
            replace_entry(copy, source, i, plan.entries)
        copies.append(copy)
    return np.stack(copies)


@perturbed_numpy.register
def _(plan: SuperpixelPlan, image):
    base = segment_mean_numpy(plan, image) if plan.baseline == "segment_mean" else baseline_numpy(image, plan.baseline)
    copies = []
    for keep in plan.keep_SM:
        copy = image.copy()
        for m in range(len(keep)):
            if not keep[m]:
                copy[:, plan.segments_HW == m] = base[:, plan.segments_HW == m]
        copies.append(copy)
    return np.stack(copies)


@perturbed_numpy.register
def _(plan: UniformNoisePlan, image):
    return np.stack([image + plan.noise_CHW(s, image.shape) for s in range(plan.num_samples)])


@perturbed_numpy.register
def _(plan: SoftMaskPlan, image):
    base = baseline_numpy(image, plan.baseline)
    masks = [soft_mask_numpy(g, s, image.shape[1:]) for g, s in zip(plan.grid_Sgg, plan.shift_S2, strict=True)]
    return np.stack([image * mask + base * (1 - mask) for mask in masks])


@perturbed_numpy.register
def _(plan: WindowPlan, image):
    base, copies = baseline_numpy(image, plan.baseline), []
    for top, left in plan.corner_S2:
        copy = image.copy()
        for row in range(max(top, 0), min(top + plan.height, image.shape[1])):
            for column in range(max(left, 0), min(left + plan.width, image.shape[2])):
                copy[:, row, column] = base[:, row, column]
        copies.append(copy)
    return np.stack(copies)


def replace_entry(copy, source, i, entries):
    if entries == "channel":
        copy.reshape(-1)[i] = source.reshape(-1)[i]
    else:
        row, column = divmod(int(i), copy.shape[2])
        copy[:, row, column] = source[:, row, column]


def segment_mean_numpy(plan, image):
    base = np.zeros_like(image)
    for m in np.unique(plan.segments_HW):
        inside = plan.segments_HW == m
        for channel in range(len(image)):
            base[channel, inside] = image[channel, inside].mean()
    return base


def soft_mask_numpy(grid, shift, size):
    """torch's own bilinear upsampling of the whole plane, then the crop."""
    cells = grid.shape[0]
    up = tuple((cells + 1) * int(np.ceil(side / cells)) for side in size)
    plane = nn.functional.interpolate(torch.from_numpy(grid).double()[None, None], up, mode="bilinear")[0, 0].numpy()
    return plane[shift[0] : shift[0] + size[0], shift[1] : shift[1] + size[1]]


def image_and_generator(seed=0, dtype=np.float64):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(CHANNELS, HEIGHT, WIDTH)).astype(dtype), generator


def make_plans(generator, baseline=0.25):
    num = {"pixel": HEIGHT * WIDTH, "channel": CHANNELS * HEIGHT * WIDTH}
    plans = []
    for entries in ("pixel", "channel"):
        index = np.stack([generator.permutation(num[entries])[:17] for _ in range(5)]).astype(np.int32)
        plans.append(SubsetPlan(index_SK=index, entries=entries, baseline=baseline))
        for direction in ("delete", "insert"):
            order = generator.permutation(num[entries]).astype(np.int32)[: num[entries] - 9]
            counts = np.array([0, 1, 30, len(order)], np.int32)
            plans.append(
                OrderPlan(order_N=order, counts_S=counts, entries=entries, baseline=baseline, direction=direction)
            )
    segments = patch_grid((HEIGHT, WIDTH), patch_size=4)
    keep = generator.random((6, segments.max() + 1)) < 0.5
    plans.append(SuperpixelPlan(segments_HW=segments, keep_SM=keep, baseline=baseline))
    plans.append(SuperpixelPlan(segments_HW=segments, keep_SM=keep, baseline="segment_mean"))
    plans.append(UniformNoisePlan(key=KEY, num_samples=4, low=-0.2, high=0.3))
    grid = (generator.random((5, 4, 4)) < 0.5).astype(np.float32)
    shift = np.array([[0, 0], [2, 2], [1, 0], [2, 1], [0, 2]], np.int32)
    plans.append(SoftMaskPlan(grid_Sgg=grid, shift_S2=shift, baseline=baseline))
    corners = np.array([[0, 0], [-2, 3], [10, 9], [4, 4], [HEIGHT, WIDTH]], np.int32)
    plans.append(WindowPlan(corner_S2=corners, height=5, width=3, baseline=baseline))
    return plans


PLAN_NAMES = [
    "subset_pixel", "delete_pixel", "insert_pixel", "subset_channel", "delete_channel", "insert_channel",
    "superpixel", "segment_mean", "noise", "soft_mask", "window",
]  # fmt: skip
