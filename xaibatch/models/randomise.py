"""Models with re-initialised layers, for randomisation metrics: a model and a WeightsVariant in, a copy out."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from xaibatch.errors import ConfigError
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
    `num_layers` from the top (1 is the head); -1 resets all. Draws are keyed by (seed, layer name) and made in float32:
    a layer's new weights depend neither on which other layers are reset nor on the precision of the run. The model
    itself and the global random state are left alone. Parameters outside such modules (class token, position embedding)
    stay, as in Quantus. Raises ConfigError for a number of layers that the model does not have.
    """
    return next(iter(randomised_in_turn(model, [variant])))


def randomised_in_turn(model: ModuleT, variants: Iterable[WeightsVariant]) -> Iterator[ModuleT]:
    """Yield each variant's model as `randomised` makes it; one is valid until the next is asked for.

    A variant of the seed and layers of the one before it, and more layers after them, changes that one's model further
    instead of a new copy: the stages of a cascade together cost one re-initialisation of the model.
    """
    changed, done, seed = model, tuple[str, ...](), 0
    for variant in variants:
        names = _chosen(layer_names(model), variant)
        if not done or seed != variant.seed or done != names[: len(done)]:
            changed = model  # lets the changed model before go: never three at once
            changed, done, seed = copy.deepcopy(model), (), variant.seed
        modules = dict(changed.named_modules())
        for name in names[len(done) :]:
            _reset(modules[name], int(keyed_generator(seed, "", "randomise", 0, name).integers(2**63 - 1)))
        done = names
        yield changed


def _reset(module: Any, seed: int) -> None:
    """Give a layer new weights, drawn on the CPU in float32 from torch's own generator with this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        before = next(module.parameters(recurse=False))
        device, dtype = before.device, before.dtype
        module.to("cpu", torch.float32).reset_parameters()
        module.to(device, dtype)


def _chosen(names: tuple[str, ...], variant: WeightsVariant) -> tuple[str, ...]:
    """The layers that a variant re-initialises."""
    if variant.order != "bottom_up":
        names = names[::-1]
    num = max(1, round(variant.share * len(names))) if variant.num_layers is None else variant.num_layers
    if num == -1:
        return names
    if not 1 <= num <= len(names):
        raise ConfigError(f"stage {num} of a randomisation metric: the model has 1 to {len(names)} layers (-1: all)")
    return names[num - 1 : num] if variant.order == "independent" else names[:num]
