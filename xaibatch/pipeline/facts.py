"""What is settled about the model before a run starts: classes, preprocessing, checksum, speed and precisions."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from xaibatch.config import EMBEDDED, RunConfig, method_of
from xaibatch.data.dataset import DataSet
from xaibatch.data.labels import label_indices
from xaibatch.embedded import model_path
from xaibatch.explainers.resolve import resolve_explainer
from xaibatch.models.classifier import Classifier
from xaibatch.models.load import load_model
from xaibatch.models.vit import plain_vit

CONV_PATCH = 16
"""Side in pixels of the grid that maps of models without tokens are stored on."""

_RATE_BATCH, _RATE_RUNS = 16, 3


def settle_model(config: RunConfig, dataset: DataSet) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the model once and describe it; the second record says which precision every label uses and why.

    Raises ModelError for a model or checkpoint that does not fit, DataError for labels that the model does not have.
    """
    model = configured_model(config, dataset.class_names)
    _check_readable(config, model)
    label_indices([record.label for record in dataset.records], model.class_names)
    facts = {
        "name": config.model.name,
        "class_names": list(model.class_names),
        "preprocessing": model.preprocessing.model_dump(mode="json"),
        "source": asdict(model.source),
        "patch_size": patch_size(model),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_passes_per_second": round(forward_rate(model), 2) if not torch.cuda.is_available() else None,
    }
    return facts, settle_precisions(config)


def _check_readable(config: RunConfig, model: Classifier) -> None:
    """Refuse, before any work, a model that a configured explainer cannot read (ModelError lists what is supported)."""
    for label, options in config.explainers.items():
        name, keywords = method_of(label, options)
        if resolve_explainer(name)(**keywords).needs == "vit":
            plain_vit(model)


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


def patch_size(model: nn.Module) -> int:
    """Side of a token in pixels; CONV_PATCH for models without a square patch embedding."""
    backbone = getattr(model, "backbone", model)
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", (CONV_PATCH, CONV_PATCH))
    return int(size[0]) if isinstance(size, tuple | list) and size[0] == size[1] else CONV_PATCH


@torch.inference_mode()
def forward_rate(model: Classifier) -> float:
    """Images a second through the model on this process's CPU threads (median of a few batches after a warm-up)."""
    images_BCHW = torch.zeros(_RATE_BATCH, 3, *model.preprocessing.image_size)
    model(images_BCHW)
    seconds = []
    for _ in range(_RATE_RUNS):
        start = time.perf_counter()
        model(images_BCHW)
        seconds.append(time.perf_counter() - start)
    return _RATE_BATCH / sorted(seconds)[_RATE_RUNS // 2]


def settle_precisions(config: RunConfig) -> dict[str, Any]:
    """The precision of every label; see `xaibatch.pipeline.calibrate` for `auto`."""
    asked = config.precision.default
    chosen = "float32" if asked == "auto" else asked
    return {"asked": asked, "chosen": dict.fromkeys((*config.explainers, *config.metrics), chosen)}
