"""A user's own function in, an explainer class out.

The function gets the model (eval mode), the normalised images and the explained classes, and returns one map an image:

>>> def mean_gradient(model, images_BCHW, targets_B, *, power: float = 1.0):
...     '''|gradient of the target's logit|, averaged over channels.'''
...     images = images_BCHW.detach().requires_grad_()
...     logits = model(images)
...     (gradient,) = torch.autograd.grad(logits.gather(1, targets_B[:, None]).sum(), images)
...     return gradient.abs().mean(1) ** power
>>> mean_gradient.signed = False
>>> MeanGradient = explainer_from(mean_gradient, "my_package.saliency:mean_gradient")
>>> MeanGradient(power=2).options
MeanGradientOptions(power=2.0)

On the command line it is `--explainers my_package.saliency:mean_gradient`; a package may also give it a short name
with an entry point of the group `xaibatch.explainers`. Keyword arguments are options, checked against their
annotations. One called `keys` receives the images' DrawKeys instead: take random numbers from `key.generator("my
purpose")`.

Shape letters: B images, C channels, H W pixels, h w the map's own sides.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, create_model
from torch import Tensor

from xaibatch.errors import UsageError
from xaibatch.explainers.base import Attribution, Explainer, ExplainInput
from xaibatch.options import Options

NUM_FIXED_ARGUMENTS = 3
"""model, images_BCHW, targets_B: passed by position."""

KEYS_ARGUMENT = "keys"
"""An argument of this name gets the DrawKeys of the images and declares the explainer as random."""


class FunctionExplainer(Explainer):
    """Calls a user's function; see the module's description."""

    function: ClassVar[Callable[..., Any]]

    def explain(self, inputs: ExplainInput) -> Attribution:
        """Return what the function returned; UsageError if that is not one finite-or-NaN map (h,w) per image."""
        keywords: dict[str, Any] = dict(self.options)
        if self.random:
            keywords[KEYS_ARGUMENT] = inputs.keys
        maps = type(self).function(inputs.model, inputs.images_BCHW, inputs.targets_B, **keywords)
        if isinstance(maps, np.ndarray):
            maps = torch.from_numpy(maps)
        num_images = len(inputs.images_BCHW)
        if not isinstance(maps, Tensor) or maps.ndim != 3 or len(maps) != num_images:
            received = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise UsageError(
                f"explainer {self.name!r} returned {received}; expected an array or tensor of {num_images} maps (B,h,w)"
            )
        return Attribution(maps_Bhw=maps.detach())


def explainer_from(item: object, name: str) -> type[Explainer]:
    """Return an explainer class for a function, or the class itself if `item` is one.

    The function may carry the attributes `title`, `paper`, `signed` (default True), `granularity` (`pixel`) and `needs`
    (`gradients`), with the meaning they have in Explainer. Raises UsageError for anything that cannot be called so.
    """
    if isinstance(item, type) and issubclass(item, Explainer):
        return item
    if not callable(item):
        raise UsageError(f"explainer {name!r} is a {type(item).__name__}; expected a function or an Explainer class")
    short = name.rpartition(":")[2].rpartition(".")[2]
    camel = "".join(word.capitalize() for word in short.split("_"))
    parameters = _option_parameters(item, name)
    attributes: dict[str, Any] = {
        "name": name,
        "title": getattr(item, "title", short),
        "paper": getattr(item, "paper", "user's own"),
        "signed": getattr(item, "signed", True),
        "granularity": getattr(item, "granularity", "pixel"),
        "needs": getattr(item, "needs", "gradients"),
        "random": KEYS_ARGUMENT in parameters,
        "function": staticmethod(item),
        "Options": _options_model(f"{camel}Options", parameters),
        "__doc__": item.__doc__,
        "__module__": item.__module__,
    }
    return type(camel, (FunctionExplainer,), attributes)


def _option_parameters(function: Callable[..., Any], name: str) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    fixed = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if len(fixed) < NUM_FIXED_ARGUMENTS and not any(p.kind is p.VAR_POSITIONAL for p in fixed):
        raise UsageError(
            f"explainer {name!r} must take (model, images_BCHW, targets_B, **options), it takes {tuple(parameters)}"
        )
    taken = {p.name for p in fixed[:NUM_FIXED_ARGUMENTS]}
    return {key: p for key, p in parameters.items() if key not in taken and p.kind is not p.VAR_POSITIONAL}


def _options_model(title: str, parameters: Mapping[str, inspect.Parameter]) -> type[Options]:
    """A checked option record with one field per keyword argument; `**options` accepts any further name."""
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    fields: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if key == KEYS_ARGUMENT or parameter.kind is parameter.VAR_KEYWORD:
            continue
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[key] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    base = _OpenOptions if is_open else Options
    return create_model(title, __base__=base, **fields)


class _OpenOptions(Options):
    model_config = ConfigDict(frozen=True, extra="allow")
