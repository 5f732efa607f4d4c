"""A plan and an image in, the changed copies out: (S,C,H,W) on the image's device and in its dtype.

`prepare` does once per plan what every copy needs (rank array, lookup table, resolved baseline) and returns a function
from a range of copies to the copies; `expand` is both steps in one. A new plan kind registers itself with
`prepare.register`.

Every value equals its NumPy definition: means, blurs, noise and soft masks are made in float64 on the CPU and only
then cast to the image's dtype, so that the copies do not depend on the device.

Shape letters: S samples (copies), s the copies of one range, C channels, H W pixels, K entries of a subset, M
superpixels.
"""

from collections.abc import Callable
from functools import singledispatch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xaibatch.perturb.plans import (
    Baseline,
    Entries,
    OrderPlan,
    PerturbationPlan,
    SoftMaskPlan,
    SubsetPlan,
    SuperpixelPlan,
    UniformNoisePlan,
    WindowPlan,
)

Expander = Callable[[int, int], Tensor]
"""(start, stop) -> copies start..stop-1 of one plan, (s,C,H,W)."""

BLUR_SIGMA_OF_SIDE = 1 / 16
"""Standard deviation of the `blur` baseline, in shorter sides of the image (as plans.Baseline documents)."""

BLUR_TRUNCATE = 4.0
"""The blur's kernel is cut at this many standard deviations, as in scipy.ndimage.gaussian_filter."""


def expand(plan: PerturbationPlan, image_CHW: Tensor, start: int, stop: int) -> Tensor:
    """Return the copies start..stop-1 of the plan, (s,C,H,W); ValueError if the plan does not fit the image."""
    return prepare(plan, image_CHW)(start, stop)


@singledispatch
def prepare(plan: object, image_CHW: Tensor) -> Expander:
    """Return the function that makes a range of the plan's copies of this image."""
    raise TypeError(f"no expansion is registered for a plan of type {type(plan).__name__}")


@prepare.register
def _(plan: SubsetPlan, image_CHW: Tensor) -> Expander:
    _check_indices(plan.index_SK, _num_entries(image_CHW, plan.entries), "SubsetPlan.index_SK")
    index_SK = torch.as_tensor(plan.index_SK, dtype=torch.int64, device=image_CHW.device)
    rows = 1 if plan.entries == "channel" else len(image_CHW)
    image_rE = image_CHW.reshape(rows, -1)
    baseline_rE = resolve_baseline(image_CHW, plan.baseline).expand_as(image_CHW).reshape(rows, -1)

    def copies(start: int, stop: int) -> Tensor:
        index_srK = index_SK[start:stop, None].expand(-1, rows, -1)
        copies_srE = image_rE.expand(len(index_srK), -1, -1).clone()
        copies_srE.scatter_(2, index_srK, baseline_rE.expand_as(copies_srE).gather(2, index_srK))
        return copies_srE.view(-1, *image_CHW.shape)

    return copies


@prepare.register
def _(plan: OrderPlan, image_CHW: Tensor) -> Expander:
    num_entries = _num_entries(image_CHW, plan.entries)
    _check_indices(plan.order_N, num_entries, "OrderPlan.order_N")
    rank = np.full(num_entries, num_entries + 1, np.int32)  # an entry that the order does not name is never reached
    rank[plan.order_N] = np.arange(len(plan.order_N), dtype=np.int32)
    shape = image_CHW.shape if plan.entries == "channel" else (1, *image_CHW.shape[1:])
    rank_xHW = torch.as_tensor(rank, device=image_CHW.device).view(shape)
    counts_S = torch.as_tensor(plan.counts_S, device=image_CHW.device)
    baseline = resolve_baseline(image_CHW, plan.baseline)

    def copies(start: int, stop: int) -> Tensor:
        reached = rank_xHW < counts_S[start:stop, None, None, None]
        kept, replaced = (baseline, image_CHW) if plan.direction == "delete" else (image_CHW, baseline)
        return torch.where(reached, kept, replaced)

    return copies


@prepare.register
def _(plan: SuperpixelPlan, image_CHW: Tensor) -> Expander:
    if plan.segments_HW.shape != tuple(image_CHW.shape[1:]):
        raise ValueError(f"segments of {plan.segments_HW.shape} do not fit an image of {tuple(image_CHW.shape[1:])}")
    _check_indices(plan.segments_HW, plan.keep_SM.shape[1], "SuperpixelPlan.segments_HW")
    segments_P = torch.as_tensor(plan.segments_HW.reshape(-1), dtype=torch.int64, device=image_CHW.device)
    keep_SM = torch.as_tensor(plan.keep_SM, device=image_CHW.device)
    if plan.baseline == "segment_mean":
        baseline = _segment_means(plan.segments_HW, plan.keep_SM.shape[1], image_CHW)
    else:
        baseline = resolve_baseline(image_CHW, plan.baseline)

    def copies(start: int, stop: int) -> Tensor:
        keep_sHW = keep_SM[start:stop].index_select(1, segments_P).view(-1, 1, *image_CHW.shape[1:])
        return torch.where(keep_sHW, image_CHW, baseline)

    return copies


@prepare.register
def _(plan: UniformNoisePlan, image_CHW: Tensor) -> Expander:
    exact_CHW = image_CHW.detach().cpu().double().numpy()
    channels, height, width = exact_CHW.shape

    def copies(start: int, stop: int) -> Tensor:
        noisy_sCHW = torch.empty((stop - start, channels, height, width), dtype=image_CHW.dtype)
        for row, sample in enumerate(range(start, stop)):
            noisy_sCHW[row] = torch.from_numpy(exact_CHW + plan.noise_CHW(sample, (channels, height, width)))
        return noisy_sCHW.to(image_CHW.device)

    return copies


@prepare.register
def _(plan: SoftMaskPlan, image_CHW: Tensor) -> Expander:
    height, width = image_CHW.shape[1:]
    baseline = resolve_baseline(image_CHW, plan.baseline)

    def copies(start: int, stop: int) -> Tensor:
        masks_sHW = soft_masks(plan, (height, width), start, stop, image_CHW.device)
        masks_s1HW = masks_sHW.to(image_CHW.dtype)[:, None]
        return image_CHW * masks_s1HW + baseline * (1 - masks_s1HW)

    return copies


@prepare.register
def _(plan: WindowPlan, image_CHW: Tensor) -> Expander:
    height, width = image_CHW.shape[1:]
    corner_S2 = torch.as_tensor(plan.corner_S2, device=image_CHW.device)
    rows_H = torch.arange(height, device=image_CHW.device)
    columns_W = torch.arange(width, device=image_CHW.device)
    baseline = resolve_baseline(image_CHW, plan.baseline)

    def copies(start: int, stop: int) -> Tensor:
        top_s1, left_s1 = corner_S2[start:stop, :1], corner_S2[start:stop, 1:]
        rows_sH = (rows_H >= top_s1) & (rows_H < top_s1 + plan.height)
        columns_sW = (columns_W >= left_s1) & (columns_W < left_s1 + plan.width)
        return torch.where((rows_sH[:, :, None] & columns_sW[:, None, :])[:, None], baseline, image_CHW)

    return copies


def resolve_baseline(image_CHW: Tensor, baseline: Baseline) -> Tensor:
    """Return the baseline (see plans.Baseline) in the image's dtype and on its device; broadcasts against the image."""
    if baseline == "black":
        return image_CHW.min().view(1, 1, 1)
    if baseline == "white":
        return image_CHW.max().view(1, 1, 1)
    if baseline == "mean":
        exact = np.mean(image_CHW.detach().cpu().double().numpy(), dtype=np.float64)
        return image_CHW.new_tensor(float(exact)).view(1, 1, 1)
    if baseline == "blur":
        return _blurred(image_CHW)
    return image_CHW.new_tensor(float(baseline)).view(1, 1, 1)


def soft_masks(
    plan: SoftMaskPlan, size: tuple[int, int], start: int, stop: int, device: torch.device | None = None
) -> Tensor:
    """Return the masks m_s of the copies start..stop-1, float64 (s,H,W), values 0..1 (1 shows the image)."""
    grid_sgg = torch.as_tensor(plan.grid_Sgg[start:stop], dtype=torch.float64, device=device)
    shifts = plan.shift_S2[start:stop].astype(np.int64)
    weights = []
    for axis, pixels in enumerate(size):
        table = _upsampling_table(plan.grid_Sgg.shape[1 + axis], pixels)
        rows = shifts[:, axis, None] + np.arange(pixels)
        _check_indices(rows, len(table), "SoftMaskPlan.shift_S2 + pixel")
        weights.append(torch.as_tensor(table, device=device)[torch.as_tensor(rows, device=device)])
    rows_sHg, columns_sWg = weights
    return rows_sHg @ grid_sgg @ columns_sWg.transpose(1, 2)


def soft_mask_cell(num_cells: int, pixels: int) -> int:
    """Pixels of a cell of a SoftMaskPlan's grid along one axis; a shift of 0..cell-1 always fits."""
    return -(-pixels // num_cells)


def _upsampling_table(num_cells: int, pixels: int) -> NDArray[np.float64]:
    """Bilinear weights ((g+1)*cell, g) of one axis, half-pixel centres, edges clamped; two non-zeros a row at most."""
    num_out = (num_cells + 1) * soft_mask_cell(num_cells, pixels)
    centre = np.clip((np.arange(num_out) + 0.5) * num_cells / num_out - 0.5, 0, num_cells - 1)
    return np.maximum(0.0, 1.0 - np.abs(centre[:, None] - np.arange(num_cells)))


def _blurred(image_CHW: Tensor) -> Tensor:
    """The Gaussian-blurred image; the border is mirrored with the edge pixel repeated (d c b a | a b c d)."""
    exact_CHW = image_CHW.detach().cpu().double().numpy()
    sigma = BLUR_SIGMA_OF_SIDE * min(exact_CHW.shape[1:])
    rows, columns = (_blur_matrix(side, sigma) for side in exact_CHW.shape[1:])
    return torch.from_numpy(rows @ exact_CHW @ columns.T).to(image_CHW)


def _blur_matrix(side: int, sigma: float) -> NDArray[np.float64]:
    radius = int(BLUR_TRUNCATE * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    source = (np.arange(side)[:, None] + offsets) % (2 * side)
    source = np.where(source < side, source, 2 * side - 1 - source)
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.arange(side)[:, None], source), kernel)
    return matrix


def _segment_means(segments_HW: NDArray[np.int32], num_segments: int, image_CHW: Tensor) -> Tensor:
    """Each pixel's superpixel mean, per channel, (C,H,W)."""
    labels = segments_HW.reshape(-1)
    pixels_CP = image_CHW.detach().cpu().double().numpy().reshape(len(image_CHW), -1)
    sums_CM = np.stack([np.bincount(labels, weights=channel, minlength=num_segments) for channel in pixels_CP])
    means_CM = sums_CM / np.maximum(np.bincount(labels, minlength=num_segments), 1)
    return torch.from_numpy(means_CM[:, segments_HW]).to(image_CHW)


def _num_entries(image_CHW: Tensor, entries: Entries) -> int:
    pixels = image_CHW.shape[1] * image_CHW.shape[2]
    return pixels if entries == "pixel" else len(image_CHW) * pixels


def _check_indices(index: NDArray[np.integer], num: int, what: str) -> None:
    if index.size and (index.min() < 0 or index.max() >= num):
        raise ValueError(f"{what} holds {index.min()}..{index.max()}, allowed are 0..{num - 1}")
