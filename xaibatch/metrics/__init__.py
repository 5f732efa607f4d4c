"""Metrics: one file a family, registered by name; importing this package registers all built-in ones (no torch)."""

from xaibatch.metrics import (
    causal,
    complexity,
    deletion,
    faithfulness_correlation,
    infidelity,
    localisation,
    randomisation,
    regions,
    road,
    sensitivity,
    sensitivity_n,
    stability,
    stepwise,
)
from xaibatch.metrics.base import METRICS, MapMetric, Metric, PlanMetric, VariantMetric
from xaibatch.metrics.resolve import resolve_metric

__all__ = [
    "METRICS",
    "MapMetric",
    "Metric",
    "PlanMetric",
    "VariantMetric",
    "causal",
    "complexity",
    "deletion",
    "faithfulness_correlation",
    "infidelity",
    "localisation",
    "randomisation",
    "regions",
    "resolve_metric",
    "road",
    "sensitivity",
    "sensitivity_n",
    "stability",
    "stepwise",
]
