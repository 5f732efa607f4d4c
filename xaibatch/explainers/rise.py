"""RISE: the average of random soft masks, each weighed by the target's probability for the masked image.

Shape letters: B images, H W pixels, S masks, g cells of a mask's side.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from xaibatch.explainers.base import EXPLAINERS, NOMINAL, Attribution, Explainer, ExplainInput, InputShape
from xaibatch.explainers.explained_output import explained_output
from xaibatch.options import Options
from xaibatch.perturb.expand import soft_mask_cell, soft_masks
from xaibatch.perturb.plans import Baseline, SoftMaskPlan
from xaibatch.seeding import DrawKey

MASKS_AT_ONCE = 64
"""Masks that are held at pixel resolution while the average is taken; bounds memory, does not change the result."""


class RiseOptions(Options):
    """Defaults are the paper's for VGG16 (section 4.1)."""

    num_masks: int = Field(default=4000, ge=1)
    """Masks, that is copies per image."""

    grid_size: int = Field(default=7, ge=2)
    """Cells a side of the low-resolution binary masks."""

    keep_probability: float = Field(default=0.5, gt=0, lt=1)
    """Probability that a cell shows the image; also the expectation of every mask pixel."""

    baseline: Baseline = 0.0
    """What a masked image fades to; 0 in normalised units as in the authors' code (a product of image and mask)."""

    normalisation: Literal["expectation", "mask_mean"] = "expectation"
    """Divide each pixel's sum by num_masks * keep_probability (the paper's eq. 6), or by the sum of the masks really
    drawn there, which makes it a weighted mean of probabilities and removes the variance of the denominator."""


@EXPLAINERS.register("rise")
class Rise(Explainer):
    """RISE (Petsiuk, Das, Saenko: "RISE", BMVC 2018, eq. 6).

    Maps (B,H,W), non-negative: the expected probability of the target given that the pixel is shown. Deviation from the
    authors' code: masks differ from image to image (keyed by it) instead of one set for all, and bilinear upsampling
    with clamped edges, as torch has it, instead of scikit-image's mirrored ones; an output that does not vary gives a
    map of zeros.
    """

    name = "rise"
    title = "RISE"
    paper = "Petsiuk et al. 2018, arXiv:1806.07421"
    signed = False
    granularity = "pixel"
    needs = "any"
    random = True
    Options = RiseOptions
    options: RiseOptions

    def explain(self, inputs: ExplainInput) -> Attribution:
        size = (inputs.images_BCHW.shape[2], inputs.images_BCHW.shape[3])
        plans = [draw_masks(key, size, self.options) for key in inputs.keys]
        logits = inputs.run_plans(list(enumerate(plans)))
        maps = []
        for plan, logits_SK, target in zip(plans, logits, inputs.targets_B.tolist(), strict=True):
            probability_S = explained_output(logits_SK, target, "probability")
            if plan.num_samples > 1 and np.ptp(probability_S) == 0:
                probability_S = np.zeros_like(probability_S)  # else the map shows how often each pixel was covered
            expectation = self.options.keep_probability if self.options.normalisation == "expectation" else None
            device = inputs.images_BCHW.device
            maps.append(rise_map(plan, probability_S, size, expectation=expectation, device=device))
        return Attribution(maps_Bhw=torch.stack(maps).to(inputs.images_BCHW))

    def cost(self) -> str:
        return f"{self.options.num_masks} forward"

    def num_forward_passes(self, shape: InputShape = NOMINAL) -> int:
        return self.options.num_masks


def draw_masks(key: DrawKey, size: tuple[int, int], options: RiseOptions) -> SoftMaskPlan:
    """Return one image's masks: Bernoulli grids, each with its own offset of less than a cell."""
    generator = key.generator("rise")
    cells = options.grid_size
    grid_Sgg = generator.random((options.num_masks, cells, cells)) < options.keep_probability
    shifts = [generator.integers(0, soft_mask_cell(cells, side), options.num_masks) for side in size]
    return SoftMaskPlan(
        grid_Sgg=grid_Sgg.astype(np.float32),
        shift_S2=np.stack(shifts, 1).astype(np.int32),
        baseline=options.baseline,
    )


def rise_map(
    plan: SoftMaskPlan,
    probability_S: NDArray[np.float64],
    size: tuple[int, int],
    *,
    expectation: float | None,
    device: torch.device | None = None,
) -> Tensor:
    """Return sum_s p_s m_s / (S * expectation), float64 (H,W) (eq. 6); `expectation` None divides by sum_s m_s
    instead."""
    weighted_HW = torch.zeros(size, dtype=torch.float64, device=device)
    shown_HW = torch.zeros_like(weighted_HW)
    probability = torch.as_tensor(probability_S, device=device)
    for start in range(0, plan.num_samples, MASKS_AT_ONCE):
        stop = min(start + MASKS_AT_ONCE, plan.num_samples)
        masks_sHW = soft_masks(plan, size, start, stop, device)
        weighted_HW += torch.einsum("s,shw->hw", probability[start:stop], masks_sHW)
        shown_HW += masks_sHW.sum(0)
    return weighted_HW / (shown_HW if expectation is None else plan.num_samples * expectation)
