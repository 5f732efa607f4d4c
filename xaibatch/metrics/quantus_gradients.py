"""A model in, the same model out whose forward pass records gradients where it must, even if its caller forbade it.

Quantus predicts under `torch.no_grad`, where a model that registers tensor hooks inside its forward pass (relevance
and attention-gradient code does) fails with "cannot register a hook on a tensor that doesn't require gradient".
Quantus wraps every model it is given in its own PyTorchModel and refuses one that is wrapped already, so the mending
sits in the module.
"""

import copy
from typing import Any

import torch
from torch import nn

_REFUSAL = "cannot register a hook"
"""What torch says in a forward pass that needs gradients and has none."""


def gradients_allowed(model: nn.Module) -> nn.Module:
    """A shallow copy of `model` (same weights, same layers and names) whose forward pass may register tensor hooks.

    The copy's class is made from the model's own, so deep copies, randomised copies and hidden-layer look-ups behave as
    for the model itself, which is left as it was. Gradients are switched on once a forward pass was refused for want of
    them; outputs then carry a graph, which Quantus detaches. Quantus's hidden-layer look-up (Relative Representation
    Stability) does not detach, so it still fails for a model with such hooks.
    """
    kind = type(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.wants_gradients:
            try:
                return kind.forward(self, *args, **kwargs)
            except RuntimeError as error:
                if _REFUSAL not in str(error):
                    raise
                self.wants_gradients = True
        with torch.enable_grad():
            return kind.forward(self, *args, **kwargs)

    allowed = copy.copy(model)
    allowed.__class__ = type(f"{kind.__name__}WithGradients", (kind,), {"forward": forward, "wants_gradients": False})
    return allowed
