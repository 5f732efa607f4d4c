"""Options in, the same model, images, labels and jobs for everything that is compared out.

Shape letters: B images, C channels, H W pixels, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import xaibatch.explainers
import xaibatch.metrics  # noqa: F401  both register the built-in methods
from xaibatch.benchmark.machine import installed
from xaibatch.benchmark.options import BenchmarkOptions
from xaibatch.cli.evaluate import config_path
from xaibatch.config import RunConfig, load_config
from xaibatch.data.dataset import DataSet, open_dataset
from xaibatch.data.load import load_shard
from xaibatch.data.sampling import sample
from xaibatch.errors import DataError
from xaibatch.models.classifier import Classifier
from xaibatch.models.token_grid import token_grid_of
from xaibatch.pipeline.facts import configured_model
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.record import describe_explainers
from xaibatch.pipeline.session import Session
from xaibatch.results.parts import RunFolder
from xaibatch.types import Shard

CLASS_NAMES = ("covid", "normal", "pneumonia")

_PICTURE_SIDE = 320


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every part measures on. `folder` is a temporary one for pictures and run folders."""

    options: BenchmarkOptions
    folder: Path
    config: RunConfig
    dataset: DataSet
    model: Classifier
    images_BCHW: Tensor
    """All images, normalised float32, on the device."""
    labels_B: NDArray[np.int64]
    """True classes; 0 where unknown."""
    targets_B: NDArray[np.int64]
    """Predicted classes, which are explained."""

    @property
    def device(self) -> str:
        return self.options.device

    @property
    def segmentation(self) -> str:
        """LIME's own superpixels, or the patch grid where the package that wraps them is missing."""
        return "quickshift" if installed("lime") and installed("skimage") else "grid"

    def shard(self, num_images: int | None = None) -> Shard:
        """The first images as one shard."""
        return Shard(index=0, records=self.dataset.records[:num_images])

    def run_config(self, explainers: Mapping[str, Any], metrics: Mapping[str, Any], **changes: Any) -> RunConfig:
        """The configuration of a run with these explainers and metrics on this model and data."""
        return self.config.model_copy(update={"explainers": dict(explainers), "metrics": dict(metrics), **changes})

    def job(
        self,
        explainers: Mapping[str, Any],
        metrics: Mapping[str, Any],
        precisions: Mapping[str, str] | None = None,
        **changes: Any,
    ) -> Job:
        """A job as a run would settle it; `changes` replace sections of the configuration."""
        config = self.run_config(explainers, metrics, **changes)
        image_size = self.model.preprocessing.image_size
        grid = token_grid_of(self.model, image_size)
        facts = describe_explainers(config, image_size, grid.shape)
        folder = RunFolder(str(self.folder / "run"))
        folder.create()
        labels = (*explainers, *metrics)
        return Job(
            config=config,
            folder=folder,
            class_names=self.model.class_names,
            preprocessing=self.model.preprocessing,
            precisions=precisions or dict.fromkeys(labels, "float32"),
            patch_size=grid.side,
            grid=grid,
            random_explainers=frozenset(label for label, fact in facts.items() if fact["random"]),
            granularities={label: fact["granularity"] for label, fact in facts.items()},
        )

    def session(self, job: Job) -> Session:
        """A session on the benchmark's own model."""
        return Session(job, device=self.device, model=self.model)

    def images(self, num_images: int) -> Tensor:
        """`num_images` images, the set's own repeated as often as needed."""
        repeats = -(-num_images // len(self.images_BCHW))
        return self.images_BCHW.repeat(repeats, 1, 1, 1)[:num_images]


def prepare(options: BenchmarkOptions, folder: Path) -> Setting:
    """Load or make the images, load the model; raises UsageError for data or a model that cannot be had."""
    data = options.data
    if data is None:
        data = str(write_pictures(folder / "pictures", options.images, seed=options.seed))
    settings = {
        "model.name": options.model,
        "model.checkpoint": options.checkpoint,
        "model.options": options.model_options,
        "model.preprocessing": options.preprocessing,
        "data.path": data,
        "data.limit": options.images,
        "precision.default": "float32",
        "seed": options.seed,
        "engine.device": options.device,
    }
    config = load_config(None, settings)
    dataset = sample(open_dataset(data), options.images, options.seed)
    model = configured_model(config, dataset.class_names).to(options.device)
    batch, failures = load_shard(Shard(index=0, records=dataset.records), model.preprocessing, model.class_names)
    if failures:
        raise DataError(f"cannot read {failures[0].image_id!r}: {failures[0].message}")
    images_BCHW = torch.as_tensor(batch.images_BCHW, device=options.device)
    with torch.inference_mode():
        targets_B = model(images_BCHW).argmax(1).cpu().numpy()
    return Setting(
        options=options,
        folder=folder,
        config=config,
        dataset=dataset,
        model=model,
        images_BCHW=images_BCHW,
        labels_B=np.maximum(batch.labels_B, 0),
        targets_B=targets_B,
    )


def smaller(setting: Setting, num_images: int) -> Setting:
    """The same on the first images only."""
    return replace(
        setting,
        dataset=replace(setting.dataset, records=setting.dataset.records[:num_images]),
        images_BCHW=setting.images_BCHW[:num_images],
        labels_B=setting.labels_B[:num_images],
        targets_B=setting.targets_B[:num_images],
    )


def write_pictures(folder: Path, num_images: int, seed: int, side: int = _PICTURE_SIDE) -> Path:
    """Write grey PNGs into one folder a class: smooth random blobs with grain, so that superpixels have edges to find.
    At least one a class, so that the number of classes does not depend on how many are measured."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side
    for number in range(max(num_images, len(CLASS_NAMES))):
        picture = np.zeros((side, side))
        for _ in range(24):
            y, x, size, height = (*generator.random(2), generator.uniform(0.03, 0.25), generator.normal())
            picture += height * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * size**2))
        picture = 128 + 40 * picture / picture.std() + generator.normal(0, 6, picture.shape)
        path = folder / CLASS_NAMES[number % len(CLASS_NAMES)] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def paper_config(setting: Setting) -> RunConfig:
    """The study's configuration, with the setting's number of LIME samples and superpixels that can be made here."""
    config = load_config(config_path("paper"))
    explainers = {label: dict(options) for label, options in config.explainers.items()}
    explainers["lime"] |= {"num_samples": setting.options.num_samples, "segmentation": setting.segmentation}
    return config.model_copy(update={"explainers": explainers})
