"""Models with re-initialised layers, for randomisation metrics: a model and a WeightsVariant in, a copy out."""

import copy
from typing import TypeVar

import torch
from torch import nn

from xaibatch.metrics.base import WeightsVariant
from xaibatch.seeding import keyed_generator

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def layer_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules with own parameters that can re-initialise themselves, in definition (forward) order."""
    return tuple(
        name
        for name, module in model.named_modules()
        if hasattr(module, "reset_parameters") and any(True for _ in module.parameters(recurse=False))
    )


def randomised(model: ModuleT, variant: WeightsVariant) -> ModuleT:
    """Return a copy whose layers were re-initialised by their own `reset_parameters` (Adebayo et al., NeurIPS 2018).

    Order `top_down` resets the last `num_layers` layers, `bottom_up` the first ones, `independent` only layer number
    `num_layers` from the top (1 is the head); -1 resets all. Draws are keyed by (seed, layer name): a layer's new
    weights do not depend on which other layers are reset. The model itself and the global random state are left alone.
    Parameters outside such modules (class token, position embedding) stay, as in Quantus.
    """
    changed = copy.deepcopy(model)
    names = layer_names(changed)
    if variant.order != "bottom_up":
        names = names[::-1]
    if variant.order == "independent" and variant.num_layers >= 0:
        chosen = names[variant.num_layers - 1 : variant.num_layers]
    else:
        chosen = names if variant.num_layers < 0 else names[: variant.num_layers]
    modules = dict(changed.named_modules())
    for name in chosen:
        seed = int(keyed_generator(variant.seed, "", "randomise", 0, name).integers(2**63 - 1))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = modules[name]
            device = next(module.parameters(recurse=False)).device
            module.to("cpu").reset_parameters()
            module.to(device)
    return changed
