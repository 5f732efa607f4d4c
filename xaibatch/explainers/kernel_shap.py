"""KernelSHAP for images: Shapley values of superpixels from a weighted regression over shown and hidden subsets.

Shape letters: B images, H W pixels, S coalitions, M superpixels, K classes.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from xaibatch.explainers.base import EXPLAINERS, NOMINAL, Attribution, Explainer, ExplainInput, InputShape
from xaibatch.explainers.explained_output import Output, explained_output
from xaibatch.explainers.shapley_fit import additive_r2, draw_coalitions, solve_shapley
from xaibatch.explainers.superpixels import SuperpixelOptions, paint, superpixels
from xaibatch.perturb.plans import Baseline, SuperpixelPlan


class KernelShapOptions(SuperpixelOptions):
    """The number of copies is that of `lime`, so that the two compare at equal cost."""

    num_samples: int = Field(default=500, ge=3)
    """Copies per image, everything shown and everything hidden among them; from 2^M on the values are exact."""

    paired: bool = True
    """Follow every drawn coalition by its complement (Covert & Lee 2021), which lowers the variance."""

    baseline: Baseline | Literal["segment_mean"] = "segment_mean"
    """What a hidden superpixel becomes: its own mean colour, or a Baseline of the whole image."""

    output: Output = "logit"
    """The value that is shared out among the superpixels. Logits add up more nearly than probabilities do."""


@EXPLAINERS.register("kernel_shap")
class KernelShap(Explainer):
    """KernelSHAP (Lundberg & Lee, NeurIPS 2017) with the constrained solution and paired sampling of Covert & Lee
    (AISTATS 2021).

    Maps (B,H,W), per pixel the Shapley value of its superpixel; over superpixels they add up exactly to the target's
    output with everything shown less that with everything hidden. Extras: `r2` of the additive model,
    `num_segments`. Deviation from the `shap` package: coalitions are drawn from the kernel instead of filled in from
    the outer sizes, and no L1 selection of features.
    """

    name = "kernel_shap"
    title = "KernelSHAP"
    paper = "Lundberg & Lee 2017, arXiv:1705.07874; Covert & Lee 2021, arXiv:2012.01536"
    signed = True
    granularity = "segment"
    needs = "any"
    random = True
    Options = KernelShapOptions
    options: KernelShapOptions

    def explain(self, inputs: ExplainInput) -> Attribution:
        options = self.options
        plans, weights = [], []
        for segments_HW, key in zip(superpixels(inputs, options), inputs.keys, strict=True):
            keep_SM, weights_S = draw_coalitions(
                key.generator("kernel_shap"), options.num_samples, int(segments_HW.max()) + 1, options.paired
            )
            plans.append(SuperpixelPlan(segments_HW=segments_HW, keep_SM=keep_SM, baseline=options.baseline))
            weights.append(weights_S)
        logits = inputs.run_plans(list(enumerate(plans)))
        maps, r2 = [], []
        for plan, weights_S, logits_SK, target in zip(plans, weights, logits, inputs.targets_B.tolist(), strict=True):
            values_S1 = explained_output(logits_SK, target, options.output)[:, None]
            shapley_M1 = solve_shapley(plan.keep_SM, values_S1, weights_S)
            maps.append(paint(shapley_M1[:, 0], plan.segments_HW))
            r2.append(float(additive_r2(plan.keep_SM, values_S1, weights_S, shapley_M1)[0]))
        return Attribution(
            maps_Bhw=torch.from_numpy(np.stack(maps)).to(inputs.images_BCHW),
            extras={
                "r2": np.array(r2, np.float64),
                "num_segments": np.array([plan.keep_SM.shape[1] for plan in plans], np.float64),
            },
        )

    def cost(self) -> str:
        return f"{self.options.num_samples} forward"

    def num_forward_passes(self, shape: InputShape = NOMINAL) -> int:
        return self.options.num_samples

    @property
    def segmentation(self) -> str | None:
        return self.options.spec
