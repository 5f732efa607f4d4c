"""A model in, the same model out whose forward pass records gradients where it must, even if its caller forbade it.

Quantus predicts under `torch.no_grad`, where a model that registers tensor hooks inside its forward pass (relevance
and attention-gradient code does) fails with "cannot register a hook on a tensor that doesn't require gradient".
Quantus wraps every model it is given in its own PyTorchModel and refuses one that is wrapped already, so the mending
sits in the module.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

_REFUSAL = "cannot register a hook"
"""What torch says in a forward pass that needs gradients and has none."""

_NOT_READABLE = "Can't call numpy() on Tensor that requires grad"
"""What torch says to a hook that would turn an output with a graph into an array."""


def gradients_allowed(model: nn.Module) -> nn.Module:
    """A shallow copy of `model` (same weights, same layers and names) whose forward pass may register tensor hooks.

    The copy's class is made from the model's own, so deep copies, randomised copies and hidden-layer look-ups behave as
    for the model itself, which is left as it was. Whether gradients are needed is tried once, with a forward pass of
    the first images; outputs then carry a graph, which Quantus detaches. Its hidden-layer look-up (Relative
    Representation Stability) does not: hooks on layers that cannot read an output with a graph are given one without.
    """
    kind = type(model)
    own_hooks = {name: frozenset(module._forward_hooks) for name, module in model.named_modules()}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.wants_gradients is None:
            with torch.no_grad(), _only(own_hooks, self):
                try:
                    kind.forward(self, *args, **kwargs)
                    self.wants_gradients = False
                except RuntimeError as error:
                    if _REFUSAL not in str(error):
                        raise
                    self.wants_gradients = True
        if not self.wants_gradients:
            return kind.forward(self, *args, **kwargs)
        with torch.enable_grad(), _readable_outputs(self):
            return kind.forward(self, *args, **kwargs)

    allowed = copy.copy(model)
    allowed.__class__ = type(f"{kind.__name__}WithGradients", (kind,), {"forward": forward, "wants_gradients": None})
    return allowed


@contextmanager
def _only(own_hooks: Mapping[str, frozenset[int]], model: nn.Module) -> Iterator[None]:
    """Put forward hooks aside that were registered since: they shall see the real pass alone."""
    put_aside = []
    for name, module in model.named_modules():
        new = {key: hook for key, hook in module._forward_hooks.items() if key not in own_hooks.get(name, ())}
        for key in new:
            del module._forward_hooks[key]
        put_aside.append((module, new))
    try:
        yield
    finally:
        for module, new in put_aside:
            module._forward_hooks.update(new)


@contextmanager
def _readable_outputs(model: nn.Module) -> Iterator[None]:
    """Let forward hooks that call `numpy()` see detached outputs; other hooks see them as they are."""
    hooked = [module for module in model.modules() if module._forward_hooks]
    before = [dict(module._forward_hooks) for module in hooked]
    for module in hooked:
        for key, hook in module._forward_hooks.items():
            module._forward_hooks[key] = partial(_read, hook)
    try:
        yield
    finally:
        for module, hooks in zip(hooked, before, strict=True):
            module._forward_hooks.update(hooks)


def _read(hook: Callable[..., Any], *arguments: Any) -> Any:
    """Call a forward hook, again with a detached output where the first call wanted to turn it into an array."""
    try:
        return hook(*arguments)
    except RuntimeError as error:
        if _NOT_READABLE not in str(error) or not isinstance(arguments[-1], torch.Tensor):
            raise
        return hook(*arguments[:-1], arguments[-1].detach())
