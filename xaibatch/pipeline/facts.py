"""What is settled about the model before a run starts: classes, preprocessing, checksum, speed and precisions."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from xaibatch.config import EMBEDDED, RunConfig, method_of
from xaibatch.data.dataset import DataSet
from xaibatch.data.labels import label_indices
from xaibatch.data.preprocess import FROM_TIMM
from xaibatch.embedded import model_path
from xaibatch.errors import ChangedWeightsError, ModelError
from xaibatch.explainers.base import EXPLAINERS
from xaibatch.explainers.resolve import resolve_explainer
from xaibatch.models.classifier import Classifier
from xaibatch.models.load import FROM_DATA, FROM_INDICES, load_model
from xaibatch.models.token_grid import token_grid_of
from xaibatch.models.vit import plain_vit
from xaibatch.perturb.segmentation import segment
from xaibatch.pipeline.job import Job

_LOG = logging.getLogger(__name__)

_TRIAL_SIDE = 32
"""Side in pixels of the image that superpixels are tried on."""

_RATE_BATCH, _RATE_RUNS = {"cpu": 16, "cuda": 256}, 3


def settle_model(config: RunConfig, dataset: DataSet) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the model once and describe it; the second record says which precision every label uses and why.

    Raises ModelError for a model or checkpoint that does not fit, DataError for labels that the model does not have.
    """
    model = configured_model(config, dataset.class_names)
    for line in unrecorded(model):
        _LOG.warning(line)
    _check_readable(config, model)
    label_indices([record.label for record in dataset.records], model.class_names)
    grid = token_grid_of(model, model.preprocessing.image_size)
    facts = {
        "name": config.model.name,
        "class_names": list(model.class_names),
        "preprocessing": model.preprocessing.model_dump(mode="json"),
        "source": asdict(model.source),
        "patch_size": grid.side,
        "token_grid": asdict(grid),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_passes_per_second": round(forward_rate(model), 2) if not torch.cuda.is_available() else None,
    }
    return facts, settle_precisions(config)


def unrecorded(model: Classifier) -> Iterator[str]:
    """Sentences on what the checkpoint does not say about itself and was taken from elsewhere."""
    if model.source.kind != "checkpoint":
        return
    if model.source.classes_from in (FROM_DATA, FROM_INDICES):
        yield (
            f"the checkpoint names no classes: its outputs are taken for {', '.join(model.class_names)}, in this order "
            f"(from {model.source.classes_from}). If that is wrong, every label and prediction is: "
            '--set "model.class_names=[...]"'
        )
    preprocessing = model.preprocessing
    if preprocessing.source == FROM_TIMM:
        yield (
            f"the checkpoint records no preprocessing: timm's for {model.name} is used (shorter side to "
            f"{preprocessing.resize_short}, mean {_numbers(preprocessing.mean)}, standard deviation "
            f"{_numbers(preprocessing.std)}). If it was trained otherwise: --set model.preprocessing.KEY=VALUE"
        )


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _check_readable(config: RunConfig, model: Classifier) -> None:
    """Refuse, before any work, a model that a configured explainer cannot read (ModelError lists what is supported),
    and superpixels that cannot be made of its images (ConfigError)."""
    for label, options in config.explainers.items():
        name, keywords = method_of(label, options)
        explainer = resolve_explainer(name)(**keywords)
        if explainer.needs == "vit":
            try:
                plain_vit(model)
            except ModelError as error:
                others = ", ".join(sorted(name for name in EXPLAINERS if EXPLAINERS[name].needs != "vit"))
                raise ModelError(
                    f"explainer {label!r}: {error}. Explainers for every timm model: {others}, captum:<Class>, "
                    "zennit:<composite> (--explainers)"
                ) from None
        if explainer.segmentation is not None:
            shape_CHW = (model.preprocessing.channels, _TRIAL_SIDE, _TRIAL_SIDE)
            segment(np.random.default_rng(0).random(shape_CHW, np.float32), explainer.segmentation)


def configured_model(config: RunConfig, data_class_names: Sequence[str] = ()) -> Classifier:
    """The model that a configuration names; the data's labels serve where nothing else names the classes."""
    return load_model(
        config.model.name,
        checkpoint=str(model_path()) if config.model.checkpoint == EMBEDDED else config.model.checkpoint,
        class_names=config.model.class_names,
        data_class_names=data_class_names or None,
        pretrained=config.model.pretrained,
        preprocessing=config.model.preprocessing,
        model_options=config.model.options,
    )


def model_of(job: Job) -> Classifier:
    """The model of a run, wherever and whenever a process of it starts. Raises ChangedWeightsError where the checkpoint
    is no longer the one that the run began with."""
    model = configured_model(job.config, job.class_names)
    found = model.source.sha256 or ""
    if job.weights_sha256 and found != job.weights_sha256:
        raise ChangedWeightsError(str(job.config.model.checkpoint), job.weights_sha256, found)
    return model


@torch.inference_mode()
def forward_rate(model: Classifier) -> float:
    """Images a second through the model where it lies (median of a few batches after a warm-up)."""
    device = next(model.parameters()).device
    num_images = _RATE_BATCH.get(device.type, 16)
    images_BCHW = torch.zeros(num_images, model.preprocessing.channels, *model.preprocessing.image_size, device=device)
    model(images_BCHW).cpu()
    seconds = []
    for _ in range(_RATE_RUNS):
        start = time.perf_counter()
        model(images_BCHW).cpu()  # the answer's arrival ends the work of a GPU too
        seconds.append(time.perf_counter() - start)
    return num_images / sorted(seconds)[_RATE_RUNS // 2]


def settle_precisions(config: RunConfig) -> dict[str, Any]:
    """The precision of every label; see `xaibatch.pipeline.calibrate` for `auto`."""
    asked = config.precision.default
    chosen = "float32" if asked == "auto" else asked
    return {"asked": asked, "chosen": dict.fromkeys((*config.explainers, *config.metrics), chosen)}
