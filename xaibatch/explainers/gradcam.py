"""GradCAM for a ViT: a trace in, the last block's normalised features weighted by their mean gradient out.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017,
eq. 1-2, on the patch tokens at the output of the last block's first norm, the layer that is customary for ViTs (after
it, the class token alone carries the gradient). Class and register tokens are left out.

Shape letters: B images, P patches, D channels, g v grid.
"""

from typing import Any

from torch import Tensor

from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput
from xaibatch.models.trace import Part
from xaibatch.options import Options


class GradCAMOptions(Options):
    """Whether evidence against the class is cut off."""

    relu: bool = True
    """Set negative sums to zero, as published (eq. 2); false: keep them, the map is then signed."""


@EXPLAINERS.register("gradcam")
class GradCAM(Explainer):
    """Gradient-weighted features, (B,g,v); neither normalised nor upsampled here."""

    name = "gradcam"
    title = "GradCAM"
    paper = (
        "Selvaraju et al.: Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017"
    )
    signed = False
    granularity = "token"
    needs = "vit"
    Options = GradCAMOptions
    options: GradCAMOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.signed = not self.options.relu

    def explain(self, inputs: ExplainInput) -> Attribution:
        maps = inputs.trace.map(weighted_features)
        return Attribution(maps_Bhw=maps.clamp(min=0) if self.options.relu else maps)

    def cost(self) -> str:
        return "1 forward + 1 backward"


def weighted_features(part: Part) -> Tensor:
    """Σ_d F[p,d] · mean over patches of ∂logit/∂F[·,d], before the ReLU, (B,g,v)."""
    num_prefix = part.layers.num_prefix
    weights_BD = part.last_norm1_gradient[:, num_prefix:].mean(1)
    features_BPD = part.blocks[-1].n1_BND[:, num_prefix:]
    return part.on_grid((features_BPD @ weights_BD[:, :, None])[:, :, 0])
