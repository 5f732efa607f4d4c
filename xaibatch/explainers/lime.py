"""LIME for images: superpixels are shown and hidden, and a local linear model of the probability weighs them.

Shape letters: B images, C channels, H W pixels, S samples, M superpixels, K classes.
"""

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.explainers.base import EXPLAINERS, NOMINAL, Attribution, Explainer, ExplainInput, InputShape
from xaibatch.explainers.explained_output import probabilities
from xaibatch.explainers.lime_fit import draw_samples, fit_local_model, top_k_mask
from xaibatch.explainers.superpixels import SuperpixelOptions, paint, superpixels
from xaibatch.perturb.plans import SuperpixelPlan


class LimeOptions(SuperpixelOptions):
    """Defaults are the `lime` package's, but for the number of samples (the study's 500; the package has 1000)."""

    num_samples: int = Field(default=500, ge=2)
    """Copies per image, the unchanged image among them."""

    hide: Literal["mean"] | float = "mean"
    """What a hidden superpixel becomes: `mean` its own mean colour (lime's default), or a value in normalised units."""

    output: Literal["weights", "top_k_mask"] = "weights"
    """The superpixels' weights painted on their pixels, or 1 on the `top_k` most positive superpixels and 0
    elsewhere."""

    top_k: int = Field(default=2, ge=1)
    """Superpixels in the mask (the study: 2)."""

    kernel_width: float = Field(default=0.25, gt=0)
    """Width of the exponential kernel, in cosine distance."""

    antithetic: bool = False
    """Follow every drawn sample by its complement (see lime_fit.draw_samples)."""


@EXPLAINERS.register("lime")
class Lime(Explainer):
    """LIME (Ribeiro, Singh, Guestrin: "Why should I trust you?", KDD 2016), equal to the `lime` package given the same
    superpixels and samples.

    Maps (B,H,W), per pixel the weight of its superpixel on the target's probability, or the top-k mask. Extras: `r2`,
    the weighted R² of the local model, and `num_segments`. Deviations: samples are keyed by the image instead of
    streamed from one global state, and superpixels are numbered from 0 for every algorithm.
    """

    name = "lime"
    title = "LIME"
    paper = "Ribeiro et al. 2016, KDD, arXiv:1602.04938"
    signed = True
    granularity = "segment"
    needs = "any"
    random = True
    Options = LimeOptions
    options: LimeOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.signed = self.options.output == "weights"

    def explain(self, inputs: ExplainInput) -> Attribution:
        options = self.options
        segments_B = superpixels(inputs, options)
        plans = [
            SuperpixelPlan(
                segments_HW=segments_HW,
                keep_SM=draw_samples(
                    key.generator("lime"), options.num_samples, int(segments_HW.max()) + 1, options.antithetic
                ),
                baseline="segment_mean" if options.hide == "mean" else options.hide,
            )
            for segments_HW, key in zip(segments_B, inputs.keys, strict=True)
        ]
        logits = inputs.run_plans(list(enumerate(plans)))
        maps: list[NDArray[np.float64]] = []
        r2: list[float] = []
        for plan, logits_SK, target in zip(plans, logits, inputs.targets_B.tolist(), strict=True):
            fit = fit_local_model(plan.keep_SM, probabilities(logits_SK), options.kernel_width)
            weights_M = fit.weights_MK[:, target]
            maps.append(
                paint(weights_M, plan.segments_HW)
                if options.output == "weights"
                else top_k_mask(weights_M, plan.segments_HW, options.top_k)
            )
            r2.append(float(fit.r2_K[target]))
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
