"""What the driver costs at scale: `python jobs/simulate_driver.py` runs the engine with a replica that only pretends.

Everything but the model and the images is real: Ray, the graph of tasks, the window, the parts, the listing. Shards,
explainers and metrics are cut as a run over a million images with six explainers and five metrics would be; the
shards' images are left out, so that a cell takes milliseconds and the driver's own processor time shows. It is
measured at two sizes, which must agree for the extrapolation to hold. `tests/test_engine_scale.py` runs it small.
"""

import argparse
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from xaibatch.cluster.connect import connected
from xaibatch.cluster.driver import run_on_ray
from xaibatch.cluster.replica import Replica, Segments, Spent
from xaibatch.config import RunConfig, load_config
from xaibatch.data.preprocess import Preprocessing
from xaibatch.pipeline.job import Answer, GroupPlan, Job, ShardExplanations
from xaibatch.pipeline.work import CellReport, FailedCell, listings, pending
from xaibatch.results.parts import RunFolder, part_bytes
from xaibatch.results.schema import TABLES
from xaibatch.types import Failure, ImageBatch, ImageRecord, Shard

EXPLAINERS = (
    "transformer_lrp",
    "lime",
    "attention_rollout_mean",
    "attention_rollout_min",
    "attention_rollout_max",
    "random",
)
METRICS = ("faithfulness_correlation", "pixel_flipping", "avg_sensitivity", "effective_complexity", "sparseness")
SHARD_SIZE = 16
NUM_IMAGES = 1_000_000
NUM_GPUS = 100
SHARDS_IN_FLIGHT = 2


class Pretending(Replica):
    """Answers at once and about nothing: no image of its shards can be read."""

    def load(self) -> tuple[str, tuple[str, ...]]:
        return "none", ()

    def explain(
        self, shard: Shard, batch: ImageBatch, failures: tuple[Failure, ...], *segments: Segments
    ) -> tuple[ShardExplanations, Spent]:
        nothing = ShardExplanations(
            ids=(), labels_B=np.zeros(0, np.int64), patients=(), shape_CHW=(3, 224, 224), logits_BK=np.zeros((0, 3))
        )
        return nothing, Spent(seconds={"model": 0.0})

    def answer(
        self, shard: Shard, plan: GroupPlan, label: str, *segments: Segments
    ) -> tuple[tuple[Answer, ...], Spent]:
        return (), Spent(seconds={"model": 0.0})


class Counting:
    """A Progress that samples the driver's memory."""

    def __init__(self) -> None:
        self.num_done = self.num_failed = self.peak_rss = 0

    def done(self, report: CellReport) -> None:
        self.num_done += 1
        if self.num_done % 100 == 0:
            self.peak_rss = max(self.peak_rss, resident_bytes())

    def failed(self, cell: FailedCell) -> None:
        self.num_failed += 1

    def replicas(self, num: int) -> None:
        pass


def job_of(output: Path, open_shards: int = 1) -> Job:
    config: RunConfig = load_config(
        None,
        {
            "explainers": {name: {} for name in EXPLAINERS},
            "metrics": {name: {} for name in METRICS},
            "engine.shard_size": SHARD_SIZE,
            "engine.shards_in_flight": open_shards,
            "engine.replicas": 1,
            "engine.threads": 1,
        },
    )
    return Job(
        config=config,
        folder=RunFolder(str(output)),
        class_names=("covid", "normal", "pneumonia"),
        preprocessing=Preprocessing(image_size=(224, 224)),
        precisions={},
        patch_size=16,
        random_explainers=frozenset({"lime", "random"}),
        granularities=dict.fromkeys(EXPLAINERS, "token"),
        run_id="simulated",
    )


def index(num_images: int) -> list[Shard]:
    """A data set's shards with ids and paths of usual length."""
    records = [
        ImageRecord(
            image_id=f"covid/image-{i:07d}.png", path=f"s3://bucket/chest/covid/image-{i:07d}.png", label="covid"
        )
        for i in range(num_images)
    ]
    return [
        Shard(index=number, records=tuple(records[start : start + SHARD_SIZE]))
        for number, start in enumerate(range(0, num_images, SHARD_SIZE))
    ]


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def run_cells(num_shards: int, open_shards: int) -> dict[str, Any]:
    """Run pretended cells; the driver's processor time (all its threads) and the growth of its memory."""
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(Path(folder) / "run", open_shards)
        job.folder.create()
        work = pending(job, [Shard(index=number, records=()) for number in range(num_shards)])
        progress = Counting()
        rss, cpu, wall = resident_bytes(), time.process_time(), time.perf_counter()
        failed = run_on_ray(job, work, progress, actor=Pretending)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        assert not failed and progress.num_done == sum(shard_work.num_cells for shard_work in work)
        assert not pending(job, [shard_work.shard for shard_work in work])
        return {
            "num_shards": num_shards,
            "num_cells": progress.num_done,
            "driver_cpu_ms_per_cell": 1e3 * cpu / progress.num_done,
            "wall_ms_per_cell": 1e3 * wall / progress.num_done,
            "memory_growth_mib": (progress.peak_rss - rss) / 2**20,
        }


def list_parts(num_shards: int) -> dict[str, Any]:
    """Time of a resume's listing over a finished run of that many shards: each part is read and checked."""
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(Path(folder) / "run")
        job.folder.create()
        shards = index(num_shards * SHARD_SIZE)
        names = [shard.name for shard in shards]
        cells = [group.part(shard) for group in job.groups for shard in shards]
        for table, parts in (("failures", names), ("predictions", names), ("maps", names), ("scores", cells)):
            for part in parts:
                path = Path(job.folder.path(table, f"{part}.parquet"))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(part_bytes(table, part, TABLES[table].empty_table(), run_id=job.run_id))
        cpu = wall = float("inf")
        for _ in range(3):  # the best of them: others may keep the machine busy
            cpu_before, wall_before = time.process_time(), time.perf_counter()
            assert pending(job, shards, listed=listings(job, "contents")) == []
            cpu, wall = min(cpu, time.process_time() - cpu_before), min(wall, time.perf_counter() - wall_before)
        num_parts = num_shards * (3 + len(job.groups))
        return {"num_parts": num_parts, "cpu_us_per_part": 1e6 * cpu / num_parts, "wall_s": wall}


def index_bytes(num_images: int) -> float:
    """Memory of the driver's index and work list, bytes an image."""
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(Path(folder) / "run")
        before = resident_bytes()
        work = pending(job, index(num_images))
        grown = resident_bytes() - before
        assert len(work) == -(-num_images // SHARD_SIZE)
        return grown / num_images


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs=2, default=(400, 1200), help="the two sizes that are run")
    parser.add_argument("--parts", type=int, nargs=2, default=(4000, 12000), help="shards of the two listings")
    parser.add_argument("--images", type=int, default=1_000_000, help="images of the index whose memory is measured")
    # the shards in flight of a hundred replicas, here all on one: the driver waits on as many references
    parser.add_argument("--open-shards", type=int, default=NUM_GPUS * SHARDS_IN_FLIGHT, help="shards open at a time")
    asked = parser.parse_args(arguments)
    bytes_an_image = index_bytes(asked.images)
    listings = [list_parts(num) for num in asked.parts]
    with tempfile.TemporaryDirectory() as folder, connected(job_of(Path(folder)).config.engine):
        run_cells(20, asked.open_shards)  # workers start
        runs = [run_cells(num, asked.open_shards) for num in asked.shards]
    num_groups = len(job_of(Path(tempfile.gettempdir())).groups)
    num_cells = NUM_IMAGES // SHARD_SIZE * (1 + num_groups)
    cost = runs[-1]["driver_cpu_ms_per_cell"] / 1e3
    found = {
        "runs": runs,
        "listings": listings,
        "index_bytes_per_image": bytes_an_image,
        "million_images": {
            "num_cells": num_cells,
            "driver_cpu_minutes": num_cells * cost / 60,
            "cells_per_second_of_one_core": 1 / cost,
            "listing_cpu_s": (num_cells + 2 * NUM_IMAGES // SHARD_SIZE) * listings[-1]["cpu_us_per_part"] / 1e6,
            "index_mib": NUM_IMAGES * bytes_an_image / 2**20,
            # below this time of a GPU for one shard, a hundred of them would outrun the driver
            "shortest_shard_s_for_100_gpus": NUM_GPUS * (1 + num_groups) * cost,
        },
    }
    stream = io.StringIO()
    json.dump(found, stream, indent=2)
    print(stream.getvalue())
    return found


if __name__ == "__main__":
    main()
