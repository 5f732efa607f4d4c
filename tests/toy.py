"""A data set and a model small enough for tests: random blobs in three class folders, a two-block ViT on 32 pixels."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xaibatch.config import RunConfig, load_config
from xaibatch.pipeline.estimate import Estimate
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.work import CellReport, FailedCell

CLASSES = ("covid", "normal", "pneumonia")

MODEL = {
    "model.name": "vit_tiny_patch16_224",
    "model.options": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "model.preprocessing": {"resize_short": 32, "interpolation": "bilinear"},
}
"""An untrained vit with seeded weights: 4x4 tokens, 48 wide, two blocks."""


def toy_images(folder: Path, num_per_class: int = 4, seed: int = 0) -> Path:
    """Write `num_per_class` grey PNGs of 40x36 pixels a class; the class shows as the place of a bright blob."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:40, :36]
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(num_per_class):
            centre = generator.normal((12 + 8 * label, 18), 2)
            blob = np.exp(-((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / 40)
            image = 90 + 100 * blob + generator.normal(0, 12, blob.shape)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def toy_config(data: Path, output: Path, **settings: Any) -> RunConfig:
    """A small run on a toy data set; keyword arguments with `__` for dots replace settings."""
    content: dict[str, Any] = {
        **MODEL,
        "model.untrained": "model__checkpoint" not in settings,
        "data.path": str(data),
        "output": str(output),
        "explainers": {
            "transformer_lrp": {},
            "lime": {"num_samples": 24, "segmentation": "grid"},
            "attention_rollout_max": {"discard_ratio": 0.5},
            "random": {},
        },
        "metrics": {
            "faithfulness_correlation": {"num_runs": 8, "subset_size": 100},
            "avg_sensitivity": {"num_samples": 2},
            "effective_complexity": {"eps": 0.1},
        },
        "precision.default": "float32",
        "engine.shard_size": 4,
        "engine.batch_size": 16,
        "engine.explain_batch_size": 4,
        "engine.device": "cpu",
    }
    return load_config(None, content | {key.replace("__", "."): value for key, value in settings.items()})


class Watch:
    """A Watcher that keeps what it was told."""

    def __init__(self) -> None:
        self.reports: list[CellReport] = []
        self.failures: list[FailedCell] = []
        self.left = False

    def start(self, job: Job, expected: Estimate, num_cells_done: int) -> None:
        self.expected, self.num_cells_done = expected, num_cells_done

    def replicas(self, num_ready: int) -> None:
        self.num_replicas = num_ready

    def done(self, report: CellReport) -> None:
        self.reports.append(report)

    def failed(self, cell: FailedCell) -> None:
        self.failures.append(cell)

    def leave(self) -> None:
        self.left = True

    def finish(self) -> dict[str, Any]:
        return {"num_forward_passes": sum(report.num_forward_passes for report in self.reports)}
