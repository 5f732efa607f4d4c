"""The grid of work: from a configuration, which metrics share a cell and what each cell's part is called; no torch.

A cell is (shard, stage). The stage `explain` writes the parts of `failures`, `predictions` and `maps`; every
metric group writes one part of `scores`. A part's name follows from the cell alone: resume is a listing of parts.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from xaibatch.config import RunConfig, method_of
from xaibatch.metrics.base import MapMetric, Metric, PlanMetric, VariantMetric
from xaibatch.metrics.resolve import resolve_metric
from xaibatch.types import Shard

Kind = Literal["map", "plan", "variant", "adapter"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricGroup:
    """Metrics that are scored in one cell because they ask the model the same questions.

    name:      the folder of its parts below `scores/`.
    metrics:   labels, sorted.
    explainer: only for adapter metrics, which run once per explainer; None: all explainers together.
    """

    name: str
    kind: Kind
    metrics: tuple[str, ...]
    explainer: str | None = None

    def part(self, shard: Shard) -> str:
        return f"{self.name}/{shard.name}"


def build_metrics(config: RunConfig) -> dict[str, Metric]:
    """Label -> metric with its options; raises ConfigError or UnknownNameError for what is not known."""
    metrics = {}
    for label, options in config.metrics.items():
        name, keywords = method_of(label, options)
        metrics[label] = resolve_metric(name)(**keywords)
    return metrics


def metric_groups(config: RunConfig, metrics: Mapping[str, Metric]) -> tuple[MetricGroup, ...]:
    """Cut the metrics into groups: all that score maps alone together, equal plans together, adapters one by one."""
    shared: defaultdict[tuple[Kind, str], list[str]] = defaultdict(list)
    groups = []
    for label, metric in metrics.items():
        kind = kind_of(metric)
        if kind == "adapter":
            groups += [
                MetricGroup(name=_folder([label, explainer]), kind=kind, metrics=(label,), explainer=explainer)
                for explainer in config.explainers
            ]
        else:
            shared[kind, "" if kind == "map" else metric.cell_key()].append(label)
    groups += [
        MetricGroup(name=_folder(sorted(labels)), kind=kind, metrics=tuple(sorted(labels)))
        for (kind, _), labels in shared.items()
    ]
    return tuple(sorted(groups, key=lambda group: group.name))


def kind_of(metric: Metric) -> Kind:
    """Which family's cell a metric needs."""
    if isinstance(metric, MapMetric):
        return "map"
    if isinstance(metric, PlanMetric):
        return "plan"
    return "variant" if isinstance(metric, VariantMetric) else "adapter"


def _folder(labels: list[str]) -> str:
    """A readable folder name; long ones end in a hash so that they stay unique and legal."""
    text = re.sub(r"[^A-Za-z0-9_.+-]", "-", "+".join(labels))
    if len(text) > 80 or text != "+".join(labels):
        text = f"{text[:60]}-{hashlib.sha256('+'.join(labels).encode()).hexdigest()[:8]}"
    return text
