"""A model in, the same model made ready for libraries that hook its modules; as it was afterwards."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def ready_for_hooks(model: nn.Module) -> Iterator[None]:
    """No gradient of a parameter, no change in place, no warning that hooks will be removed again.

    A module that works in place overwrites what a hook of the module before it, or its own, still needs: some libraries
    raise, others read the overwritten value.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    in_place: list[Any] = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in in_place:
            module.inplace = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Setting (forward, )?backward hooks", category=UserWarning)
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in in_place:
            module.inplace = True
