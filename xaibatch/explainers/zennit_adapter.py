"""A zennit composite in, an explainer class for convolutional timm models out: LRP with the canonizer that it needs.

zennit's rules hook modules. What a model computes outside of modules, such as the sum of a residual block, keeps its
plain gradient, which is wrong for relevance and raises nothing. zennit's own canonizers know torchvision's ResNet;
here are those of timm's, and every model whose modules are not all known is refused.

Shape letters: B images, C channels, H W pixels, K classes.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import create_model
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.drop import DropPath
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from zennit.canonizers import AttributeCanonizer, Canonizer, CompositeCanonizer, SequentialMergeBatchNorm
from zennit.composites import COMPOSITES
from zennit.layer import Sum

from xaibatch.errors import ModelError, UnknownNameError
from xaibatch.explainers.base import Attribution, Explainer, ExplainInput
from xaibatch.explainers.hooked_model import ready_for_hooks
from xaibatch.options import Options

MAIN_PATH: Mapping[type[nn.Module], tuple[str, ...]] = {
    BasicBlock: ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "drop_path"),
    Bottleneck: (
        "conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3", "drop_path",
    ),
}  # fmt: skip
"""The modules of timm's residual blocks in the order of their forward pass, up to the sum."""

LAST_ACTIVATION: Mapping[type[nn.Module], str] = {BasicBlock: "act2", Bottleneck: "act3"}

KNOWN_MODULES = frozenset(
    {ResNet, BasicBlock, Bottleneck, SelectAdaptivePool2d, DropPath, nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU,
     nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.Linear}
)  # fmt: skip
"""Module types (not their subclasses) for which zennit's rules, the canonizers below or the plain gradient are
right."""

SUPPORTED = (
    "timm ResNet, ResNet-D and ResNeXt (timm.models.resnet.ResNet with BasicBlock or Bottleneck, ReLU, BatchNorm2d, "
    "average pooling; no squeeze-excitation, no blur pooling)"
)

RELEVANCE_COMPOSITES = frozenset(
    {"epsilon_alpha2_beta1", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box", "epsilon_plus", "epsilon_plus_flat"}
)
"""Composites of LRP rules: the relevance that enters is the target's logit; for the others it is 1 (a gradient)."""

_SIGNED = RELEVANCE_COMPOSITES | {"beta_smooth", "deconvnet", "guided_backprop"}
_OWN_ARGUMENTS = frozenset({"self", "layer_map", "first_map", "canonizers", "low", "high", "zero_params"})


class ZennitExplainer(Explainer):
    """LRP or a modified gradient of a convolutional timm model by a composite of zennit (Anders et al. 2021)."""

    paper = "Anders et al. 2021, arXiv:2106.13200; Bach et al. 2015, PLOS ONE 10(7)"
    granularity = "pixel"
    needs = "gradients"
    composite: ClassVar[str]

    def explain(self, inputs: ExplainInput) -> Attribution:
        """Return maps (B,H,W), the sum over channels. The model is restored afterwards, an exception included."""
        check_supported(inputs.model)
        images_BCHW = inputs.images_BCHW.detach().clone().requires_grad_()
        arguments = dict(self.options)
        if "low" in inspect.signature(COMPOSITES[self.composite]).parameters:
            arguments |= _box(inputs.images_BCHW, arguments.pop("low_value"), arguments.pop("high_value"))
        composite = COMPOSITES[self.composite](**arguments, canonizers=[TimmResNetCanonizer()])
        with ready_for_hooks(inputs.model), composite.context(inputs.model) as canonical:
            logits_BK: Tensor = canonical(images_BCHW)
            start_BK = torch.zeros_like(logits_BK).scatter_(1, inputs.targets_B[:, None], 1.0)
            if self.composite in RELEVANCE_COMPOSITES:
                start_BK = start_BK * logits_BK.detach()
            (relevance_BCHW,) = torch.autograd.grad(logits_BK, images_BCHW, start_BK)
        return Attribution(maps_Bhw=relevance_BCHW.sum(1))

    def cost(self) -> str:
        return "1 forward + 1 modified backward"


class TimmResNetCanonizer(CompositeCanonizer):  # type: ignore[misc]
    """Merges batch norms into the convolutions before them and makes the residual sum of timm's blocks a module."""

    def __init__(self) -> None:
        super().__init__([SequentialMergeBatchNorm(), _ResidualSum()])

    def copy(self) -> Canonizer:
        return TimmResNetCanonizer()


class _ResidualSum(AttributeCanonizer):  # type: ignore[misc]
    """Gives timm's residual blocks a forward pass whose sum is zennit's `Sum` module, on which a rule can be put."""

    def __init__(self) -> None:
        super().__init__(self._attributes)

    @staticmethod
    def _attributes(name: str, module: nn.Module) -> dict[str, Any] | None:
        if type(module) not in MAIN_PATH:
            return None
        return {"forward": partial(_summed_forward, module), "canonizer_sum": Sum()}


def _summed_forward(block: Any, x: Tensor) -> Tensor:
    """timm's forward pass of a residual block without squeeze-excitation."""
    shortcut = x if block.downsample is None else block.downsample(x)
    branch = x
    for name in MAIN_PATH[type(block)]:
        layer = getattr(block, name, None)
        branch = branch if layer is None else layer(branch)
    summed: Tensor = block.canonizer_sum(torch.stack([shortcut, branch], dim=-1))
    activated: Tensor = getattr(block, LAST_ACTIVATION[type(block)])(summed)
    return activated


def zennit_explainer(composite: str) -> type[ZennitExplainer]:
    """Return the explainer class for `zennit:<composite>`; its options are the composite's own numbers."""
    if composite not in COMPOSITES:
        raise UnknownNameError("zennit composite", composite, COMPOSITES)
    parameters = inspect.signature(COMPOSITES[composite].__init__).parameters
    fields: dict[str, Any] = {
        name: (float, parameter.default) for name, parameter in parameters.items() if name not in _OWN_ARGUMENTS
    }
    if "low" in parameters:
        fields |= {"low_value": (float | None, None), "high_value": (float | None, None)}
    camel = "".join(word.capitalize() for word in composite.split("_"))
    attributes: dict[str, Any] = {
        "name": f"zennit:{composite}",
        "title": f"{camel} (zennit)",
        "signed": composite in _SIGNED,
        "composite": composite,
        "Options": create_model(f"{camel}Options", __base__=Options, **fields),
        "__doc__": f"zennit's composite {composite} on convolutional timm models.",
    }
    return type(f"Zennit{camel}", (ZennitExplainer,), attributes)


def check_supported(model: nn.Module) -> None:
    """Raise ModelError naming the first module for which the relevance would be wrong."""
    backbone = getattr(model, "backbone", model)
    if type(backbone) is not ResNet:
        raise ModelError(f"zennit: {type(backbone).__name__} is not supported. Supported: {SUPPORTED}")
    for name, module in backbone.named_modules():
        if type(module) not in KNOWN_MODULES:
            raise ModelError(
                f"zennit: {name} is a {type(module).__name__}, which is not supported. Supported: {SUPPORTED}"
            )


def _box(images_BCHW: Tensor, low: float | None, high: float | None) -> dict[str, Tensor]:
    """The bounds of pixel values for the ZBox rule; each image's own minimum and maximum where none is given."""
    bounds = {"low": images_BCHW.amin((1, 2, 3), keepdim=True), "high": images_BCHW.amax((1, 2, 3), keepdim=True)}
    for name, value in (("low", low), ("high", high)):
        if value is not None:
            bounds[name] = torch.full_like(bounds[name], value)
    return {name: bound.expand_as(images_BCHW).detach() for name, bound in bounds.items()}
