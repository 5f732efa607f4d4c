"""The control: a map of uniform random numbers on the token grid, which no metric should prefer."""

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput
from xaibatch.options import Options

PATCH_SIZE = 16
"""Side in pixels of a token where the model has no patch embedding of its own."""


@EXPLAINERS.register("random")
class RandomMap(Explainer):
    """Independent uniform numbers in [0,1) per token, from each image's key, (B,g,v)."""

    name = "random"
    title = "Random map"
    paper = "none: the control against which a metric's value is read"
    signed = False
    granularity = "token"
    needs = "any"
    random = True
    Options = Options

    def explain(self, inputs: ExplainInput) -> Attribution:
        grid = token_grid(inputs.model, inputs.images_BCHW.shape[-2:])
        maps = np.stack([key.generator("random_map").random(grid) for key in inputs.keys])
        return Attribution(maps_Bhw=torch.as_tensor(maps).to(inputs.images_BCHW))

    def cost(self) -> str:
        return "no forward"


def token_grid(model: nn.Module, size: torch.Size) -> tuple[int, int]:
    """Rows and columns of a ViT's patches for images of `size` (H,W); squares of PATCH_SIZE pixels for other models."""
    vit = model if isinstance(model, VisionTransformer) else getattr(model, "backbone", model)
    patch = vit.patch_embed.patch_size if isinstance(vit, VisionTransformer) else (PATCH_SIZE, PATCH_SIZE)
    return max(1, size[0] // patch[0]), max(1, size[1] // patch[1])
