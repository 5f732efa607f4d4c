"""What a run will cost, said before it starts: forward passes from the plans' sizes, seconds from a measured rate."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from xaibatch.metrics.base import VariantMetric
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.work import ShardWork

TRACE_WORTH: Final = 7
"""Forward passes that tracing an image and its relevance passes are worth, about."""

PREDICTING: Final = "prediction and trace"


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What the cells that are still to be done will ask of the model.

    num_forward_passes: perturbed copies, predictions and traces; `by_label` has them per explainer and metric group
                        (labels joined by +), the variants of a metric with all that explaining them takes.
    worth:              the same in the time of a forward pass each, a trace being worth TRACE_WORTH.
    seconds:            `worth` at the rate that was measured; None where no rate is known.
    uncounted:          labels that call the model themselves, which these numbers hold in part or not at all.
    """

    num_images: int
    num_cells: int
    num_forward_passes: int
    seconds: float | None
    worth: int = 0
    by_label: Mapping[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()


def estimate(job: Job, work: Sequence[ShardWork], record: Mapping[str, Any]) -> Estimate:
    """Count the pending cells' forward passes and divide their worth by the record's `forward_passes_per_second`."""
    repeats = job.config.repeats
    copies = {label: facts["num_forward_passes"] for label, facts in record["explainers"].items()}
    traced = any(facts["needs"] == "vit" for facts in record["explainers"].values())
    explanation = 1 + int(traced) + sum(copies.values())
    passes: Counter[str] = Counter()
    num_traces = 0
    for shard_work in work:
        num_images = len(shard_work.shard.records)
        passes[PREDICTING] += num_images * (1 + int(traced))
        num_traces += num_images * int(traced)
        for label, num_copies in copies.items():
            passes[label] += num_images * num_copies * (repeats if label in job.random_explainers else 1)
        for group in shard_work.groups:
            num_variants, num_copies = _group_size(job, group)
            passes["+".join(group.metrics)] += num_images * repeats * (num_variants * explanation + num_copies)
            num_traces += num_images * repeats * num_variants * int(traced)
    worth = passes.total() + (TRACE_WORTH - 1) * num_traces
    rate = record.get("model", {}).get("forward_passes_per_second")
    return Estimate(
        num_images=sum(len(shard_work.shard.records) for shard_work in work),
        num_cells=sum(shard_work.num_cells for shard_work in work),
        num_forward_passes=passes.total(),
        seconds=worth / rate if rate else None,
        worth=worth,
        by_label={label: num for label, num in passes.items() if num},
        uncounted=_uncounted(job, work, record),
    )


def _uncounted(job: Job, work: Sequence[ShardWork], record: Mapping[str, Any]) -> tuple[str, ...]:
    """Explainers that run the model themselves (Captum, zennit, plug-ins) and metrics that Quantus scores."""
    adapters = {label for shard in work for group in shard.groups if group.kind == "adapter" for label in group.metrics}
    foreign = [label for label, facts in record["explainers"].items() if ":" in facts["method"]]
    return (*foreign, *(label for label in job.config.metrics if label in adapters))


def _group_size(job: Job, group: MetricGroup) -> tuple[int, int]:
    """Variants to explain and perturbed copies to run, per image and repeat."""
    metric = job.metrics[group.metrics[0]]
    if isinstance(metric, VariantMetric):
        return metric.num_variants(), 0
    shape_CHW = (job.preprocessing.channels, *job.preprocessing.image_size)
    return 0, metric.num_forward_passes(len(job.config.explainers), shape_CHW, job.tokens)
