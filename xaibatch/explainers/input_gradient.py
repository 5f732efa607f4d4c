"""Input times gradient: a trace in, each pixel's value times the gradient of the explained logit out.

Shrikumar et al., "Not Just a Black Box: Learning Important Features Through Propagating Activation Differences", 2016.
Pixels are in the model's normalised units, so a mid-grey pixel (zero) gets nothing.

Shape letters: B images, P patches, I values of a patch, g v grid, H W pixels.
"""

from typing import Any, Literal

from torch import Tensor

from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput, Granularity
from xaibatch.models.forward import to_patches
from xaibatch.models.trace import Part
from xaibatch.options import Options


class InputGradientOptions(Options):
    """What the map shows."""

    level: Literal["patch", "patch_abs", "pixel"] = "patch"
    """`patch`: sum over each patch's pixels and channels, (B,g,v); `patch_abs`: sum of absolute values, (B,g,v);
    `pixel`: sum over channels, (B,H,W)."""


@EXPLAINERS.register("input_gradient")
class InputGradient(Explainer):
    """Input times gradient; signed except for `patch_abs`."""

    name = "input_gradient"
    title = "Input × gradient"
    paper = "Shrikumar, Greenside, Shcherbina, Kundaje: Not Just a Black Box, 2016"
    signed = True
    granularity: Granularity = "token"
    needs = "vit"
    Options = InputGradientOptions
    options: InputGradientOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.signed = self.options.level != "patch_abs"
        self.granularity = "pixel" if self.options.level == "pixel" else "token"

    def explain(self, inputs: ExplainInput) -> Attribution:
        return Attribution(maps_Bhw=inputs.trace.map(self.relevance))

    def cost(self) -> str:
        return "1 forward + 1 backward"

    def relevance(self, part: Part) -> Tensor:
        """The map of a trace's part."""
        relevance_BCHW = part.record.images_BCHW * part.image_gradient
        if self.options.level == "pixel":
            return relevance_BCHW.sum(1)
        relevance_BPI = to_patches(relevance_BCHW, part.layers)
        return part.on_grid((relevance_BPI.abs() if self.options.level == "patch_abs" else relevance_BPI).sum(-1))
