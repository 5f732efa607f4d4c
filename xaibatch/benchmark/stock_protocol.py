"""One image in, the study's explanations and scores out, put together from stock pieces as the original scripts were.

Batch one throughout, LIME in the package's batches of ten, one Quantus call per explainer and metric; Quantus's Average
Sensitivity explains every noisy copy anew with the explainer's own function, LIME included.

Shape letters: B images (one), C channels, H W pixels, K classes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from xaibatch.benchmark.stock_gradients import rollout
from xaibatch.benchmark.stock_quantus import stock_score
from xaibatch.benchmark.stock_relevance import reference_lrp
from xaibatch.benchmark.stock_sampling import lime_package
from xaibatch.config import RunConfig

NEEDED_PACKAGES = ("lime", "quantus")

QUANTUS: Final[Mapping[str, tuple[str, Mapping[str, str]]]] = {
    "faithfulness_correlation": (
        "FaithfulnessCorrelation",
        {
            "nr_runs": "num_runs",
            "subset_size": "subset_size",
            "perturb_baseline": "baseline",
            "normalise": "normalise",
        },
    ),
    "avg_sensitivity": (
        "AvgSensitivity",
        {"nr_samples": "num_samples", "lower_bound": "radius", "normalise": "normalise"},
    ),
    "effective_complexity": ("EffectiveComplexity", {"eps": "eps", "normalise": "normalise"}),
}
"""Quantus class and the names of its options, by label of the study's configuration."""


class CountingModel(nn.Module):
    """The model, and how many images went through it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.num_images = 0
        self.eval()
        first: Any = getattr(self.backbone, "patch_embed", self.backbone)
        self.handle = first.register_forward_pre_hook(self._count)

    @property
    def backbone(self) -> Any:
        """The timm model."""
        return getattr(self.model, "backbone", self.model)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.model(images_BCHW)
        return logits_BK

    def _count(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.num_images += len(inputs[0])

    def close(self) -> None:
        """Stop counting."""
        self.handle.remove()


class StockProtocol:
    """The study's explainers and metrics with the options of its configuration."""

    def __init__(self, model: nn.Module, config: RunConfig, device: str) -> None:
        self.model = model
        self.device = device
        self.explain_one = _explainers(config)
        self.metrics = _metrics(config)
        self.num_refused = 0

    def run(self, image_CHW: Tensor, label: int) -> dict[tuple[str, str], float]:
        """Scores of one image by (explainer, metric); those that Quantus refuses are left out and counted."""
        x_BCHW = image_CHW[None].cpu().numpy()
        maps = {name: self._map(name, image_CHW) for name in self.explain_one}
        scores = {}
        for name, map_HW in maps.items():
            for metric, (quantus_name, options) in self.metrics.items():
                try:
                    result = stock_score(
                        quantus_name,
                        options,
                        model=self.model,
                        x_BCHW=x_BCHW,
                        y_B=np.array([label]),
                        maps_B1HW=map_HW[None, None],
                        explain_func=self._explain_func(name),
                        batch_size=1,
                        device=self.device,
                    )
                except AssertionError:  # an all-zero map: Quantus refuses it, and saves itself the work
                    self.num_refused += 1
                    continue
                scores[name, metric] = float(np.asarray(result, np.float64).reshape(-1)[0])
        return scores

    def _map(self, name: str, image_CHW: Tensor) -> NDArray[np.float32]:
        """The map of the class predicted for this very input, at pixel resolution, from 0 to 1."""
        with torch.no_grad():
            target = int(self.model(image_CHW[None]).argmax())
        native = torch.as_tensor(np.asarray(self.explain_one[name](self.model, image_CHW, target).cpu()))
        size = (image_CHW.shape[1], image_CHW.shape[2])
        pixels = functional.interpolate(native[None, None].float(), size, mode="bilinear")[0, 0].numpy()
        low, high = pixels.min(), pixels.max()
        scaled: NDArray[np.float32] = (pixels - low) / (high - low) if high > low else pixels
        return scaled

    def _explain_func(self, name: str) -> Callable[..., NDArray[np.float32]]:
        def explain(model: Any, inputs: Any, targets: Any, **_: Any) -> NDArray[np.float32]:
            images = torch.as_tensor(np.asarray(inputs, np.float32), device=self.device)
            return np.stack([self._map(name, image_CHW) for image_CHW in images])[:, None]

        return explain


def _explainers(config: RunConfig) -> Mapping[str, Callable[[Any, Tensor, int], Tensor]]:
    """(model, image, target) -> map, by label; KeyError for an explainer that the study does not have."""
    known: dict[str, Callable[[Any, Tensor, int], Tensor]] = {}
    for label, options in config.explainers.items():
        if label == "transformer_lrp":
            known[label] = lambda model, image_CHW, target: reference_lrp(model, image_CHW[None], target)
        elif label == "lime":
            known[label] = partial(_lime, num_samples=options["num_samples"], top_k=options["top_k"])
        else:
            fusion = {"attention_rollout_mean": "mean", "attention_rollout_min": "min", "attention_rollout_max": "max"}
            known[label] = partial(_rollout, fusion=fusion[label], discard_ratio=options["discard_ratio"])
    return known


def _metrics(config: RunConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Quantus class and options by label; KeyError for a metric that the study does not have."""
    return {label: _in_quantus(label, options) for label, options in config.metrics.items()}


def _in_quantus(label: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    name, renamed = QUANTUS[label]
    return name, {theirs: options[ours] for theirs, ours in renamed.items()}


def _lime(model: Any, image_CHW: Tensor, target: int, *, num_samples: int, top_k: int) -> Tensor:
    return torch.as_tensor(lime_package(model, image_CHW, target, num_samples=num_samples, top_k=top_k))


def _rollout(model: Any, image_CHW: Tensor, target: int, *, fusion: Any, discard_ratio: float) -> Tensor:
    return rollout(model, image_CHW[None], target, fusion=fusion, discard_ratio=discard_ratio)
