"""A metric's name in, its class out: built-in names, `quantus:<Name>`, entry points, `package.module:Class`."""

import importlib
from importlib.metadata import entry_points
from typing import Final

from xaibatch.errors import ConfigError, UnknownNameError, UsageError
from xaibatch.metrics.base import METRICS, Metric

ENTRY_POINTS = "xaibatch.metrics"
"""Group of entry points through which an installed package offers metrics by name."""

QUANTUS_PREFIX = "quantus:"

REFUSED: Final = {
    "sufficiency": "it compares an image's map with the maps of all images of the data set, and a score here hangs on "
    "its image alone. quantus:Sufficiency compares the images of one shard (its scores change with engine.shard_size)"
}
"""Published metrics that are not offered under a name of their own, and why."""


def resolve_metric(name: str) -> type[Metric]:
    """Return the class that makes the metric `name` from its options.

    `quantus:<Name>` names a Quantus class (`quantus:FaithfulnessCorrelation`); Quantus itself is imported when the
    metric is scored. Raises UnknownNameError with the nearest known name, ConfigError for a `module:Class` that cannot
    be imported or is no metric, UsageError for a name in REFUSED.
    """
    if name in METRICS:
        return METRICS[name]
    if name in REFUSED:
        raise UsageError(f"there is no metric {name!r}: {REFUSED[name]}")
    if name.startswith(QUANTUS_PREFIX):
        from xaibatch.metrics.quantus_adapter import quantus_metric

        return quantus_metric(name.removeprefix(QUANTUS_PREFIX))
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in offered:
        return _checked(offered[name].load(), name)
    if ":" in name:
        return _imported(name)
    raise UnknownNameError("metric", name, [*METRICS, *offered, f"{QUANTUS_PREFIX}<Name>"])


def _imported(name: str) -> type[Metric]:
    module, _, attribute = name.partition(":")
    try:
        return _checked(getattr(importlib.import_module(module), attribute), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"metric {name!r} cannot be imported: {error}") from None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"metric {name!r}: {module!r} fails on import: {type(error).__name__}: {error}") from error


def _checked(item: object, name: str) -> type[Metric]:
    if isinstance(item, type) and issubclass(item, Metric):
        return item
    raise ConfigError(f"metric {name!r} is {item!r}, expected a subclass of xaibatch.metrics.base.Metric")
