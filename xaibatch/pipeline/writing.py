"""From a shard's explanations and scores to its Parquet parts; written so that the last part written means done."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from xaibatch.data.index import relative_to
from xaibatch.maps import on_tokens, repeat_agreement
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import Job, ShardExplanations
from xaibatch.pipeline.scoring import map_status
from xaibatch.results import schema
from xaibatch.types import Score, Shard


def write_explanations(job: Job, shard: Shard, explained: ShardExplanations) -> None:
    """Write the parts of `failures` (also without rows: that there were none is a result), `predictions` and `maps`."""
    _write(job, "failures", shard.name, schema.failures_table(explained.failures, run=job.run))
    _write(
        job,
        "predictions",
        shard.name,
        schema.predictions_table(
            ids=explained.ids,
            labels_B=explained.labels_B,
            patients=explained.patients,
            logits_BK=explained.logits_BK,
            run=job.run,
            class_names=job.class_names,
            paths={record.image_id: relative_to(job.data_root, record.path) for record in shard.records},
        ),
    )
    rows = []
    agreements = _agreements(job, explained)
    for (label, repeat), maps in sorted(explained.maps.items()):
        for row, image_id in enumerate(explained.ids):
            missing = (label, repeat, image_id) in explained.missing
            rows.append(
                {
                    "run": job.run,
                    "image_id": image_id,
                    "explainer": label,
                    "repeat": repeat,
                    "target": job.class_names[int(maps.targets_B[row])],
                    "granularity": job.granularities[label],
                    "status": "error" if missing else map_status(maps.maps_Bhw[row]),
                    "extras": [
                        *((name, float(values[row])) for name, values in sorted(maps.extras.items())),
                        *([("repeat_agreement", agreements[label][row])] if label in agreements else []),
                    ],
                    **schema.map_row(_grid(job, maps.maps_Bhw[row], explained.shape_CHW)),
                }
            )
    _write(job, "maps", shard.name, schema.maps_table(rows))


def write_scores(
    job: Job, group: MetricGroup, shard: Shard, explained: ShardExplanations, scores: Sequence[Score]
) -> None:
    """Write the group's part of `scores`; every row carries what is known of its image."""
    images = {
        image_id: {
            "patient": explained.patients[row],
            "label": _name(job, int(explained.labels_B[row])),
            "predicted": schema.predicted_class(explained.logits_BK[row], job.class_names),
        }
        for row, image_id in enumerate(explained.ids)
    }
    targets = {
        (image_id, label, repeat): job.class_names[
            int(explained.maps[label, job.map_repeat(label, repeat)].targets_B[row])
        ]
        for row, image_id in enumerate(explained.ids)
        for label in job.config.explainers
        for repeat in range(job.config.repeats)
    }
    _write(job, "scores", group.part(shard), schema.scores_table(scores, run=job.run, images=images, targets=targets))


def _write(job: Job, table: str, part: str, rows: pa.Table) -> None:
    job.folder.write_part(table, part, rows, run_id=job.run_id)


def _agreements(job: Job, explained: ShardExplanations) -> dict[str, list[float]]:
    """For explainers that draw random numbers and were repeated: how far each image's repeats agree."""
    if job.config.repeats < 2:
        return {}
    found = {}
    for label in job.random_explainers:
        repeats = [explained.maps[label, repeat].maps_Bhw for repeat in range(job.config.repeats)]
        found[label] = [
            repeat_agreement(np.stack([maps[row].ravel() for maps in repeats])) for row in range(len(explained.ids))
        ]
    return found


def _name(job: Job, label: int) -> str | None:
    return job.class_names[label] if label >= 0 else None


def _grid(job: Job, map_hw: np.ndarray, shape_CHW: tuple[int, int, int]) -> np.ndarray:
    """The map on the token grid; a map of another size than the image's pixels is already one."""
    height, width = shape_CHW[1:]
    if map_hw.shape != (height, width):
        return np.asarray(map_hw, np.float64)
    return on_tokens(map_hw, job.tokens)
