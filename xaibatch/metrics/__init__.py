"""Metrics: one file a family, registered by name; importing this package registers all built-in ones (no torch)."""

from xaibatch.metrics import complexity, faithfulness_correlation, sensitivity
from xaibatch.metrics.base import METRICS, MapMetric, Metric, PlanMetric, VariantMetric
from xaibatch.metrics.resolve import resolve_metric

__all__ = [
    "METRICS",
    "MapMetric",
    "Metric",
    "PlanMetric",
    "VariantMetric",
    "complexity",
    "faithfulness_correlation",
    "resolve_metric",
    "sensitivity",
]
