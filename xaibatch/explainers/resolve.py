"""An explainer's name in, its class out: built-in, `captum:`, `zennit:`, a user's `module:function` or an entry
point."""

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Final

from xaibatch.errors import UnknownNameError, UsageError
from xaibatch.explainers.base import EXPLAINERS, Explainer
from xaibatch.explainers.plugin import explainer_from

ENTRY_POINT_GROUP: Final = "xaibatch.explainers"
"""Packages register explainers (functions or Explainer classes) under this group."""


def resolve_explainer(name: str) -> type[Explainer]:
    """Return the explainer class of a name.

    In this order: a registered name (`lime`), an entry point of the group `xaibatch.explainers`, `captum:<Class>`,
    `zennit:<composite>`, and `package.module:function` (or `:Class`). Raises UnknownNameError with the nearest known
    name, and UsageError where an extra package is missing or the user's module cannot be imported.
    """
    if name in EXPLAINERS:
        return EXPLAINERS[name]
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in installed:
        return explainer_from(installed[name].load(), name)
    prefix, colon, rest = name.partition(":")
    if not colon:
        raise UnknownNameError("explainer", name, known_explainers())
    if prefix in _PREFIXES:
        return _PREFIXES[prefix](rest)
    return explainer_from(_load(prefix, rest, name), name)


def known_explainers() -> tuple[str, ...]:
    """Every name that can be listed: registered ones, entry points, and the forms that adapters take."""
    points = (point.name for point in entry_points(group=ENTRY_POINT_GROUP))
    return (*sorted({*EXPLAINERS, *points}), "captum:<Class>", "zennit:<composite>", "package.module:function")


def _load(module_name: str, attribute: str, name: str) -> object:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"explainer {name!r}: cannot import {module_name!r} ({error}); expected package.module:function on the "
            f"Python path, or one of: {', '.join(known_explainers())}"
        ) from None
    except Exception as error:
        raise UsageError(
            f"explainer {name!r}: {module_name!r} fails on import: {type(error).__name__}: {error}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        own = [known for known, item in vars(module).items() if getattr(item, "__module__", None) == module_name]
        public = [known for known in own if not known.startswith("_")]
        raise UnknownNameError(f"function of {module_name}", attribute, public) from None


def _captum(rest: str) -> type[Explainer]:
    _need("captum", "captum")
    from xaibatch.explainers.captum_adapter import captum_explainer

    return captum_explainer(rest)


def _zennit(rest: str) -> type[Explainer]:
    _need("zennit", "zennit")
    from xaibatch.explainers.zennit_adapter import zennit_explainer

    return zennit_explainer(rest)


def _need(module: str, extra: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"explainers {module}:... need the package {module} ({error}): pip install 'xaibatch[{extra}]'"
        ) from None


_PREFIXES: Final[Mapping[str, Callable[[str], type[Explainer]]]] = {"captum": _captum, "zennit": _zennit}
