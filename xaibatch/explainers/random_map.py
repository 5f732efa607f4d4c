"""The control: a map of uniform random numbers on the token grid, which no metric should prefer."""

import numpy as np
import torch

from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput
from xaibatch.models.token_grid import token_grid_of
from xaibatch.options import Options


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
        height, width = inputs.images_BCHW.shape[2:]
        shape = token_grid_of(inputs.model, (height, width)).shape
        maps = np.stack([key.generator("random_map").random(shape) for key in inputs.keys])
        return Attribution(maps_Bhw=torch.as_tensor(maps).to(inputs.images_BCHW))

    def cost(self) -> str:
        return "no forward"
