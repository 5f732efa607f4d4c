"""What a run will cost, said before it starts: forward passes from the plans' sizes, seconds from a measured rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xaibatch.metrics.base import VariantMetric
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.work import ShardWork

TRACE_WORTH = 7
"""Forward passes that tracing an image and its relevance passes are worth, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """num_forward_passes counts perturbed copies, predictions and traces; seconds is None where no rate is known."""

    num_images: int
    num_cells: int
    num_forward_passes: int
    seconds: float | None


def estimate(job: Job, work: Sequence[ShardWork], record: Mapping[str, Any]) -> Estimate:
    """Count the pending cells' forward passes and divide their worth by the record's `forward_passes_per_second`."""
    explain, extra = _explain_passes(record)
    passes = worth = 0
    for shard_work in work:
        num_images = len(shard_work.shard.records)
        num_explanations, num_passes = 1, 0
        for group in shard_work.groups:
            variants, copies = _group_size(job, group)
            num_explanations += variants * job.config.repeats
            num_passes += copies * job.config.repeats
        num_passes += num_explanations * explain
        passes += num_images * num_passes
        worth += num_images * (num_passes + num_explanations * extra)
    rate = record.get("model", {}).get("forward_passes_per_second")
    return Estimate(
        num_images=sum(len(shard_work.shard.records) for shard_work in work),
        num_cells=sum(shard_work.num_cells for shard_work in work),
        num_forward_passes=passes,
        seconds=worth / rate if rate else None,
    )


def _explain_passes(record: Mapping[str, Any]) -> tuple[int, int]:
    """Forward passes that one explanation by all explainers counts, and what its trace is worth beyond that."""
    traced = any(facts["needs"] != "any" for facts in record["explainers"].values())
    copies = sum(facts["num_forward_passes"] for facts in record["explainers"].values())
    return 1 + int(traced) + copies, (TRACE_WORTH - 1) * int(traced)


def _group_size(job: Job, group: MetricGroup) -> tuple[int, int]:
    """Variants to explain and perturbed copies to run, per image and repeat."""
    metric = job.metrics[group.metrics[0]]
    if isinstance(metric, VariantMetric):
        return metric.num_variants(), 0
    shape_CHW = (job.preprocessing.channels, *job.preprocessing.image_size)
    return 0, metric.num_forward_passes(len(job.config.explainers), shape_CHW, job.patch_size)
