"""A model in, the same model out whose forward pass records gradients even where the caller has switched them off.

Quantus predicts under `torch.no_grad`, where a model that registers tensor hooks inside its forward pass (relevance
and attention-gradient code does) fails with "cannot register a hook on a tensor that doesn't require gradient".
Quantus wraps every model it is given in its own PyTorchModel and refuses one that is wrapped already, so the mending
sits in the module.
"""

import copy
from typing import Any

import torch
from torch import nn


def gradients_allowed(model: nn.Module) -> nn.Module:
    """A shallow copy of `model` (same weights, same layers and names) with gradients switched on during forward.

    The copy's class is made from the model's own, so deep copies, randomised copies and hidden-layer look-ups behave as
    for the model itself, which is left as it was. Outputs carry a graph; Quantus detaches them.
    """
    kind = type(model)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return kind.forward(self, *args, **kwargs)

    allowed = copy.copy(model)
    allowed.__class__ = type(f"{kind.__name__}WithGradients", (kind,), {"forward": forward})
    return allowed
