"""Inputs of explainers, and a small ResNet to explain."""

import numpy as np
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from xaibatch.explainers.base import ExplainInput
from xaibatch.seeding import DrawKey


def make_inputs(model, images, targets, ids=None):
    ids = ids or [f"image-{b}" for b in range(len(images))]
    return ExplainInput(
        model=model,
        images_BCHW=images,
        targets_B=torch.as_tensor(targets),
        keys=tuple(DrawKey(seed=0, image_id=name) for name in ids),
        run_plans=lambda requests: [],
    )


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def make_resnet(block=BasicBlock, seed=0, layers=(1, 1, 1, 1), **options):
    """A timm ResNet in float64 whose batch norms do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet(block, list(layers), num_classes=4, **options).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    return model


def make_images(num=2, side=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, 3, side, side)))
