"""A small model with a wavy answer, and inputs for explainers that sample it."""

import numpy as np
import torch
from torch import nn

from xaibatch.explainers.base import ExplainInput
from xaibatch.perturb.runner import PlanRunner
from xaibatch.seeding import DrawKey

SIDE = 12


class Wavy(nn.Module):
    """A small float64 classifier whose classes mix pixels non-linearly."""

    def __init__(self, height=SIDE, width=SIDE, num_classes=3):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        inputs = 3 * height * width
        self.first = nn.Parameter(torch.randn(inputs, 20, generator=generator).double() / inputs**0.5)
        self.second = nn.Parameter(torch.randn(20, num_classes, generator=generator).double())

    def forward(self, images):
        return torch.tanh(2 * images.flatten(1) @ self.first) @ self.second


def make_images(num=2, height=SIDE, width=SIDE, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, 3, height, width)))


def make_inputs(model, images, targets, batch_size=50, segments=None, ids=None):
    runner = PlanRunner(model=model, batch_size=batch_size)
    ids = ids or [f"image-{b}" for b in range(len(images))]
    return ExplainInput(
        model=model,
        images_BCHW=images,
        targets_B=torch.as_tensor(targets),
        keys=tuple(DrawKey(seed=0, image_id=i) for i in ids),
        run_plans=lambda requests: runner.run(images, requests),
        segments=segments or {},
    )


def logits_of(model, image_CHW):
    with torch.no_grad():
        return model(torch.as_tensor(image_CHW)[None]).numpy()[0]
