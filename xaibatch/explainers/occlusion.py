"""Occlusion: how far the target's output falls when a window of the image, or one patch of the ViT, is covered.

Shape letters: B images, H W pixels, R C rows and columns of window positions, S samples.
"""

from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from xaibatch.explainers.base import EXPLAINERS, NOMINAL, Attribution, Explainer, ExplainInput, InputShape
from xaibatch.explainers.explained_output import Output, explained_output
from xaibatch.models.token_grid import token_grid_of
from xaibatch.options import Options
from xaibatch.perturb.plans import Baseline, WindowPlan


class PatchOcclusionOptions(Options):
    """What covers the image, and which output is watched."""

    baseline: Baseline = 0.0
    """What covers the window: 0 in normalised units is the grey of the paper."""

    output: Output = "probability"
    """The paper watches the probability of the class."""


class OcclusionOptions(PatchOcclusionOptions):
    """The sliding window."""

    window: int = Field(default=32, ge=1)
    """Side of the square in pixels."""

    stride: int = Field(default=16, ge=1)
    """Step in pixels, at most `window`; the last position of a row or column is moved inwards, so that every pixel is
    covered."""

    @model_validator(mode="after")
    def _leaves_no_gap(self) -> "OcclusionOptions":
        if self.stride > self.window:
            raise ValueError(
                f"stride {self.stride} is larger than window {self.window}: some pixels would never be covered"
            )
        return self


@EXPLAINERS.register("occlusion")
class Occlusion(Explainer):
    """Occlusion sensitivity (Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014,
    sec. 4.2).

    Maps (B,H,W): at each pixel the mean fall of the target's output over the windows that cover it (positive: it
    supports the target). The paper draws the output itself at each window position; its sign is turned here.
    """

    name = "occlusion"
    title = "Occlusion (sliding window)"
    paper = "Zeiler & Fergus 2014, arXiv:1311.2901"
    signed = True
    granularity = "pixel"
    needs = "any"
    Options = OcclusionOptions
    options: OcclusionOptions

    def explain(self, inputs: ExplainInput) -> Attribution:
        height, width = inputs.images_BCHW.shape[2:]
        window = (min(self.options.window, height), min(self.options.window, width))
        tops_R = window_positions(height, window[0], self.options.stride)
        lefts_C = window_positions(width, window[1], self.options.stride)
        falls = output_falls(inputs, self.options, tops_R, lefts_C, window)
        maps = [spread_over_windows(falls_RC, (height, width), tops_R, lefts_C, window) for falls_RC in falls]
        return Attribution(maps_Bhw=torch.from_numpy(np.stack(maps)).to(inputs.images_BCHW))

    def cost(self) -> str:
        return f"{self.num_forward_passes()} forward at {NOMINAL.size[0]} pixels"

    def num_forward_passes(self, shape: InputShape = NOMINAL) -> int:
        window, stride = self.options.window, self.options.stride
        return 1 + prod(len(window_positions(side, min(window, side), stride)) for side in shape.size)


@EXPLAINERS.register("occlusion_patch")
class PatchOcclusion(Explainer):
    """Occlusion of one ViT patch at a time: the sliding window with side and step of a patch, on the token grid.

    Maps (B,g,v): the fall of the target's output when that patch is covered.
    """

    name = "occlusion_patch"
    title = "Occlusion (one patch at a time)"
    paper = "Zeiler & Fergus 2014, arXiv:1311.2901, on the patch grid"
    signed = True
    granularity = "token"
    needs = "any"
    Options = PatchOcclusionOptions
    options: PatchOcclusionOptions

    def explain(self, inputs: ExplainInput) -> Attribution:
        height, width = inputs.images_BCHW.shape[2:]
        grid = token_grid_of(inputs.model, (height, width))
        tops_R, lefts_C = (np.arange(num) * step for num, step in zip(grid.shape, grid.patch, strict=True))
        falls = output_falls(inputs, self.options, tops_R, lefts_C, grid.patch)
        return Attribution(maps_Bhw=torch.from_numpy(np.stack(falls)).to(inputs.images_BCHW))

    def cost(self) -> str:
        return "one forward per patch"

    def num_forward_passes(self, shape: InputShape = NOMINAL) -> int:
        return 1 + prod(shape.grid)


def window_positions(pixels: int, window: int, stride: int) -> NDArray[np.int64]:
    """Return the first pixel of each window along one axis; every pixel lies in at least one window if stride <=
    window.

    >>> window_positions(10, 4, 3).tolist(), window_positions(11, 4, 3).tolist()
    ([0, 3, 6], [0, 3, 6, 7])
    """
    return np.unique(np.append(np.arange(0, pixels - window + 1, stride), pixels - window))


def output_falls(
    inputs: ExplainInput,
    options: PatchOcclusionOptions,
    tops_R: NDArray[np.int64],
    lefts_C: NDArray[np.int64],
    window: tuple[int, int],
) -> list[NDArray[np.float64]]:
    """Return, per image, the unchanged image's output less that with the window at (row, column), float64 (R,C)."""
    corner_S2 = np.stack(np.meshgrid(tops_R, lefts_C, indexing="ij"), -1).reshape(-1, 2)
    outside = np.array([inputs.images_BCHW.shape[2:]])  # a window there leaves the image as it is
    plan = WindowPlan(
        corner_S2=np.concatenate([outside, corner_S2]).astype(np.int32),
        height=window[0],
        width=window[1],
        baseline=options.baseline,
    )
    logits = inputs.run_plans([(b, plan) for b in range(len(inputs.images_BCHW))])
    falls = []
    for logits_SK, target in zip(logits, inputs.targets_B.tolist(), strict=True):
        values_S = explained_output(logits_SK, target, options.output)
        falls.append((values_S[0] - values_S[1:]).reshape(len(tops_R), len(lefts_C)))
    return falls


def spread_over_windows(
    falls_RC: NDArray[np.float64],
    size: tuple[int, int],
    tops_R: NDArray[np.int64],
    lefts_C: NDArray[np.int64],
    window: tuple[int, int],
) -> NDArray[np.float64]:
    """Return the mean of the windows that cover each pixel, float64 (H,W); every pixel must be covered."""
    rows_RH, columns_CW = (
        ((first[:, None] <= np.arange(pixels)) & (np.arange(pixels) < first[:, None] + length)).astype(np.float64)
        for first, pixels, length in zip((tops_R, lefts_C), size, window, strict=True)
    )
    mean_HW: NDArray[np.float64] = rows_RH.T @ falls_RC @ columns_CW / np.outer(rows_RH.sum(0), columns_CW.sum(0))
    return mean_HW
