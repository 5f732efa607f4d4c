"""Native metrics and stock Quantus on the same images, maps, model and draws; what the metric tests share.

The model computes in float64 and Quantus hands it float32 images, so both sides agree to rounding of float64.
Shape letters: B images, C channels, H W pixels, K classes, S copies.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import xaibatch.perturb.expand_imputation  # noqa: F401  registers its plan kinds
from xaibatch.errors import NotScoredError
from xaibatch.maps import MapOptions, pixel_map
from xaibatch.metrics.base import (
    ImageView,
    MapMetric,
    MapView,
    Metric,
    NoisyVariant,
    PlanMetric,
    TargetVariant,
    TwinVariant,
    VariantMetric,
    VariantView,
)
from xaibatch.perturb.expand import expand
from xaibatch.seeding import DrawKey

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import quantus

SIDE, NUM_CLASSES = 32, 3


class DoubleNet(nn.Module):
    """A small classifier of patches that computes in float64 whatever it is given."""

    def __init__(self, channels: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patches = nn.Conv2d(channels, 12, 4, 4)
        self.hidden = nn.Linear(12 * (SIDE // 4) ** 2, 24)
        self.head = nn.Linear(24, NUM_CLASSES)
        self.double().eval()

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        features = torch.nn.functional.gelu(self.patches(images_BCHW.double())).flatten(1)
        return self.head(torch.tanh(self.hidden(features))) * 3


def some_images(num: int, channels: int = 3, seed: int = 1) -> np.ndarray:
    """Smooth pictures with noise, float32 (B,C,H,W), roughly normalised."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(size=(num, channels, 6, 6))
    smooth = [[pixel_map(plane, (SIDE, SIDE), MapOptions()) for plane in image] for image in coarse]
    return (np.array(smooth) + 0.2 * generator.normal(size=(num, channels, SIDE, SIDE))).astype(np.float32)


def _signed(generator: np.random.Generator, num: int) -> np.ndarray:
    return generator.normal(size=(num, SIDE, SIDE))


def _tokens(generator: np.random.Generator, num: int) -> np.ndarray:
    coarse = generator.random((num, SIDE // 4, SIDE // 4)) ** 3
    return np.stack([pixel_map(grid, (SIDE, SIDE), MapOptions(normalise="min_max")) for grid in coarse])


def _ties(generator: np.random.Generator, num: int) -> np.ndarray:
    return generator.integers(-1, 5, (num, SIDE, SIDE)) / 4


def _segments(generator: np.random.Generator, num: int) -> np.ndarray:
    blocks = generator.integers(0, 2, (num, 4, 4)).astype(float)
    blocks[:, 0, 0], blocks[:, 0, 1] = 0.0, 1.0
    return np.kron(blocks, np.ones((SIDE // 4, SIDE // 4)))


MAP_KINDS: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "signed": _signed,
    "tokens": _tokens,
    "ties": _ties,
    "segments": _segments,
}
"""Random signed values; an upsampled token grid; six levels only (exact in float32); a mask of superpixels."""


def some_maps(kind: str, num: int, seed: int = 2) -> np.ndarray:
    """Maps of one kind whose largest magnitude is 1, float32 (B,H,W): Quantus's normalisation over the call is then
    the same as ours per image, and float32 is what it is given by explainers."""
    maps = MAP_KINDS[kind](np.random.default_rng(seed), num)
    return (maps / np.abs(maps).max((1, 2), keepdims=True)).astype(np.float32)


def some_masks(num: int, seed: int = 3) -> np.ndarray:
    """One rectangle per image, bool (B,H,W)."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((num, SIDE, SIDE), bool)
    for mask in masks:
        top, left = generator.integers(0, SIDE - 12, 2)
        mask[top : top + generator.integers(3, 12), left : left + generator.integers(3, 12)] = True
    return masks


def key_of(row: int, repeat: int = 0) -> DrawKey:
    return DrawKey(seed=7, image_id=f"image-{row}", repeat=repeat)


def gradient_map(model: nn.Module, images: Any, targets: Any) -> np.ndarray:
    """Gradient times input summed over channels, float64 (B,H,W): an explainer both sides can call."""
    with torch.enable_grad():
        x = torch.as_tensor(np.asarray(images, np.float32)).double().requires_grad_()
        logits = model(x)
        logits[torch.arange(len(x)), torch.as_tensor(np.asarray(targets))].sum().backward()
        assert x.grad is not None
        return (x * x.grad).sum(1).detach().numpy()


class Bench:
    """One model, images, labels and maps, to be scored by both sides."""

    def __init__(
        self,
        num: int = 3,
        kind: str = "signed",
        channels: int = 3,
        maps: np.ndarray | None = None,
        masks: np.ndarray | None = None,
        patch_size: int = 8,
    ) -> None:
        self.model = DoubleNet(channels)
        self.x = some_images(num, channels)
        self.logits = self.forward(self.x)
        self.y = (self.logits.argmax(1) + np.arange(num)) % NUM_CLASSES
        self.maps = some_maps(kind, num) if maps is None else maps
        self.masks = masks
        self.twins: np.ndarray | None = None
        self.patch_size = patch_size

    def forward(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.as_tensor(x)).numpy()

    def view(self, row: int, repeat: int = 0, map_options: MapOptions | None = None) -> MapView:
        return MapView(
            key=key_of(row, repeat),
            shape_CHW=self.x.shape[1:],
            label=int(self.y[row]),
            predicted=int(self.logits[row].argmax()),
            logits_K=self.logits[row],
            image_CHW=self.x[row],
            twin_CHW=None if self.twins is None else self.twins[row],
            masks={} if self.masks is None else {"lesion": self.masks[row], "lung": self.masks[row]},
            patch_size=self.patch_size,
            explainer="gradient",
            target=int(self.y[row]),
            map_hw=self.maps[row],
            map_options=map_options or MapOptions(),
        )

    def image_view(self, row: int) -> ImageView:
        view = self.view(row)
        known = {name: getattr(view, name) for name in ImageView.__dataclass_fields__ if name != "target"}
        return ImageView(**known, target=int(self.y[row]))

    def run(self, row: int, plan: Any) -> np.ndarray:
        """Logits (S,K) of a plan's float32 copies, not rounded to float32 themselves."""
        return self.forward(expand(plan, torch.as_tensor(self.x[row]), 0, plan.num_samples).numpy())

    def native(self, metric: Metric, row: int, repeat: int = 0) -> float:
        """The native score of one image; NotScoredError where it has none."""
        view = self.view(row, repeat)
        if isinstance(metric, MapMetric):
            return metric.score(view)
        if isinstance(metric, PlanMetric):
            plan = metric.plan(view if metric.plan_uses_map else self.image_view(row))
            return metric.score(view, plan, self.run(row, plan))
        assert isinstance(metric, VariantMetric)
        return metric.score(view, tuple(self.answer(row, ask) for ask in metric.variants(self.image_view(row))))

    def answer(self, row: int, ask: Any) -> VariantView:
        """The gradient map of a variant; targets stay the image's own class, as Quantus has them."""
        image, target = torch.as_tensor(self.x[row]), int(self.y[row])
        if isinstance(ask, NoisyVariant):
            image = expand(ask.plan, image, ask.sample, ask.sample + 1)[0]
        elif isinstance(ask, TargetVariant):
            target = ask.target
        elif isinstance(ask, TwinVariant):
            assert self.twins is not None
            image = torch.as_tensor(self.twins[row])
        map_hw = gradient_map(self.model, image[None], [target])[0]
        return VariantView(
            map_hw=map_hw, pixels_HW=map_hw, logits_K=self.forward(image[None].numpy())[0], target=target
        )

    def natives(self, metric: Metric) -> list[float]:
        return [self.native(metric, row) for row in range(len(self.x))]

    def explained(self) -> "Bench":
        """The same bench with the gradient maps of its own images."""
        self.maps = gradient_map(self.model, self.x, self.y)
        return self

    def quantus(
        self, name: str, rows: Sequence[int] | None = None, call: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        """What stock Quantus returns for these rows in one call."""
        rows = list(range(len(self.x)) if rows is None else rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric = getattr(quantus, name)(
                disable_warnings=True, display_progressbar=False, return_aggregate=False, **options
            )
            return metric(
                model=self.model,
                x_batch=self.x[rows].copy(),
                y_batch=self.y[rows].copy(),
                a_batch=self.maps[rows][:, None].copy(),
                s_batch=None if self.masks is None else self.masks[rows][:, None].copy(),
                explain_func=lambda model, inputs, targets, **_: gradient_map(model, inputs, targets)[:, None],
                channel_first=True,
                batch_size=len(rows),
                **(call or {}),
            )


REFERENCE = 2e-5
"""Both sides compute in float64 from float32 images and maps; Quantus sums float32 maps in float32."""


def near(ours: Any, theirs: Any, tolerance: float = REFERENCE) -> None:
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=tolerance, atol=tolerance)


@contextmanager
def stable_sorting() -> Iterator[None]:
    """Ties by position, as ours: NumPy's default sort leaves their order to the processor."""
    argsort = np.argsort

    def stable(values: Any, axis: int = -1, **_: Any) -> np.ndarray:
        return argsort(values, axis=axis, kind="stable")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "argsort", stable)
        patch.setattr(np, "trapz", np.trapezoid, raising=False)  # Quantus 0.6 needs it, NumPy 2.4 removed it
        yield


@contextmanager
def replayed(function: str, draws: Iterator[np.ndarray] | Sequence[np.ndarray]) -> Iterator[None]:
    """Quantus's next calls of `numpy.random.<function>` return these arrays, one a call, reshaped to what is asked."""
    stream = iter(draws)

    def drawn(*args: Any, size: Any = None, **_: Any) -> Any:
        array = next(stream)
        return array.reshape(size) if size is not None else array

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, function, drawn)
        yield


def status_of(score: Callable[[], float]) -> str:
    """The status of a score that is not defined."""
    with pytest.raises(NotScoredError) as caught:
        score()
    assert caught.value.reason
    return caught.value.status
