"""Whole runs, from images on disk to Parquet: through Ray and without, on one replica and on two, and the driver's
own speed."""

import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from xaibatch.benchmark.lines import Cell, Line, Part
from xaibatch.benchmark.machine import installed
from xaibatch.benchmark.setting import Setting, paper_config, write_pictures
from xaibatch.benchmark.timing import Spread
from xaibatch.config import EngineConfig, ModelConfig, RunConfig, load_config
from xaibatch.pipeline.estimate import Estimate
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import Engine, evaluate
from xaibatch.pipeline.work import CellReport, FailedCell

NO_RAY = "ray not installed"

_TINY_MODEL = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3}


class Clock:
    """A run's watcher that keeps when it began, when the first replica was ready and when it ended, in seconds."""

    def __init__(self) -> None:
        self.num_cells = 0
        self.ready: float | None = None

    def start(self, job: Job, expected: Estimate, num_cells_done: int) -> None:
        self.started = time.perf_counter()

    def replicas(self, num: int) -> None:
        if num and self.ready is None:
            self.ready = time.perf_counter()

    def done(self, report: CellReport) -> None:
        self.num_cells += 1
        self.last = time.perf_counter()

    def failed(self, cell: FailedCell) -> None:
        raise RuntimeError(f"cell {cell.shard} {cell.stage} failed: {cell.error}")

    def leave(self) -> None:
        """Nothing is shown."""

    def finish(self) -> dict[str, Any]:
        return {}

    @property
    def start_up_s(self) -> float:
        """Until the first replica was ready: Ray itself, processes, imports, the model."""
        assert self.ready is not None
        return self.ready - self.started

    @property
    def working_s(self) -> float:
        """From then until the last cell was finished."""
        assert self.ready is not None
        return self.last - self.ready


def measure_end_to_end(setting: Setting, protocol: RunConfig) -> Part:
    """The protocol as a run, through Ray and in this process in alternation."""
    config = _run_config(setting, protocol)
    num = len(setting.dataset.records[: setting.options.end_to_end_images])
    engines: dict[str, Engine] = {"in one process": partial(run_local, device=setting.device)}
    if installed("ray"):
        engines["through Ray"] = _ray_engine()
    clocks = _alternating(setting, {name: (config, engine) for name, engine in engines.items()})
    lines = [_line(name, clocks[name], num, clocks["in one process"]) for name in engines]
    if not installed("ray"):
        lines.append(Line(name="through Ray", remark=NO_RAY))
    return Part(
        name="end_to_end",
        title=f"the protocol end to end, {num} images, one replica, float32",
        lines=lines,
        notes=(
            "reading, explaining, scoring and writing; working seconds count from the first ready replica to the last "
            "finished cell. Through Ray, superpixels and scores are made in processes beside the replica",
        ),
    )


def measure_scaling(setting: Setting) -> list[Part]:
    """One against two replicas of one thread each, and cells a second of the driver."""
    if not installed("ray"):
        return [Part(name="scaling", title="scaling", lines=[Line(name="replicas and driver", remark=NO_RAY)])]
    protocol, num = paper_config(setting), len(setting.dataset.records[: setting.options.end_to_end_images])
    names = {1: "1 replica", 2: "2 replicas"}
    runs = {
        name: (_run_config(setting, protocol, replicas=count, threads=1), _ray_engine())
        for count, name in names.items()
    }
    clocks = _alternating(setting, runs)
    lines = [_line(name, clocks[name], num, clocks["1 replica"], "times one replica") for name in runs]
    return [
        Part(
            name="scaling",
            title=f"one and two replicas of one thread, the protocol on {num} images",
            lines=lines,
            notes=("CPU tasks (superpixels, scores, writing) share the same cores",),
        ),
        _driver_part(setting),
    ]


def _driver_part(setting: Setting) -> Part:
    """Cells that cost next to nothing: how many a second the driver gets through."""
    num = setting.options.driver_cells // 2
    data = write_pictures(setting.folder / "cells", num, seed=setting.options.seed, side=40)
    config = load_config(
        None,
        {
            "model.name": "vit_tiny_patch16_224",
            "model.options": _TINY_MODEL,
            "model.preprocessing": {"resize_short": 32, "interpolation": "bilinear"},
            "data.path": str(data),
            "data.limit": num,
            "explainers": {"random": {}},
            "metrics": {"effective_complexity": {}},
            "precision.default": "float32",
            "engine.shard_size": 1,
            "engine.replicas": 1,
            "engine.threads": 1,
        },
    )
    engines: dict[str, Engine] = {"in one process": partial(run_local, device="cpu"), "through Ray": _ray_engine()}
    clocks = _alternating(setting, {name: (config, engine) for name, engine in engines.items()})
    lines = []
    for name in engines:
        cells: dict[str, Cell] = {
            "cells": clocks[name][0].num_cells,
            "cells/s": Spread.of([clock.num_cells / clock.working_s for clock in clocks[name]]),
        }
        lines.append(Line(name=name, cells=cells))
    return Part(name="driver", title="cells a second: shards of one small image, a tiny model, one metric", lines=lines)


def _alternating(setting: Setting, runs: Mapping[str, tuple[RunConfig, Engine]]) -> dict[str, list[Clock]]:
    """Every run once a round, each time into a fresh folder."""
    clocks: dict[str, list[Clock]] = {name: [] for name in runs}
    for number in range(setting.options.runs):
        for name, (config, engine) in runs.items():
            folder = _fresh(setting.folder / "end-to-end", f"{number}-{name.replace(' ', '-')}")
            clock = Clock()
            outcome = evaluate(config.model_copy(update={"output": str(folder)}), engine, clock)
            if not outcome.ok:
                raise RuntimeError(f"{name}: {outcome.num_image_failures} images failed")
            clocks[name].append(clock)
    return clocks


def _line(name: str, clocks: list[Clock], num_images: int, base: list[Clock], than: str = "times one process") -> Line:
    """Seconds of the rounds, and the ratio of the base's working seconds to them, round by round."""
    speed = [other.working_s / clock.working_s for clock, other in zip(clocks, base, strict=True)]
    cells: dict[str, Cell] = {
        "start-up s": Spread.of([clock.start_up_s for clock in clocks]),
        "working s": Spread.of([clock.working_s for clock in clocks]),
        "working s an image": Spread.of([clock.working_s / num_images for clock in clocks]).median,
        f"speed, {than}": None if clocks is base else Spread.of(speed),
    }
    return Line(name=name, cells=cells)


def _run_config(setting: Setting, protocol: RunConfig, *, replicas: int = 1, threads: int = 0) -> RunConfig:
    """The protocol on the setting's model and data, one image a shard."""
    engine = EngineConfig(
        shard_size=1,
        replicas=replicas,
        threads=threads or torch.get_num_threads(),
        device=setting.options.device,
    )
    data = setting.config.data.model_copy(update={"limit": setting.options.end_to_end_images})
    model: ModelConfig = setting.config.model
    return protocol.model_copy(update={"model": model, "data": data, "engine": engine})


def _ray_engine() -> Engine:
    from xaibatch.cluster.driver import run_on_ray

    return run_on_ray


def _fresh(parent: Path, name: str) -> Path:
    number = 0
    with suppress(FileNotFoundError):
        number = sum(1 for path in parent.iterdir() if path.name.startswith(name))
    return parent / f"{name}-{number}"
