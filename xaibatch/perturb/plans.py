"""Perturbation plans: compact, image-free descriptions of changed copies of one image; NumPy only.

A plan never contains an image. `xaibatch.perturb.expand` turns a plan and an image into the copies on a device, and
`xaibatch.perturb.runner` packs the copies of many plans into full batches and returns logits.

Shape letters: S samples (copies), K entries of a subset, N entries of an order, M superpixels, H W pixels.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from xaibatch.seeding import DrawKey

Baseline = float | Literal["black", "white", "mean", "blur"]
"""What a removed entry becomes, in the units of the normalised image: a number, or computed from the image itself:
`black` its minimum, `white` its maximum, `mean` its mean (over channels and pixels, as Quantus has them), `blur` the
Gaussian-blurred image (sigma: 1/16 of the shorter side)."""

Entries = Literal["pixel", "channel"]
"""What an index counts: `pixel` 0..H*W-1 (all channels change together) or `channel` 0..C*H*W-1 (one channel entry)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubsetPlan:
    """Copy s has the entries `index_SK[s]` replaced by the baseline."""

    index_SK: NDArray[np.int32]
    entries: Entries
    baseline: Baseline

    @property
    def num_samples(self) -> int:
        return len(self.index_SK)


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderPlan:
    """Copy s has the first `counts_S[s]` entries of `order_N` replaced (`delete`), or all *others* (`insert`)."""

    order_N: NDArray[np.int32]
    counts_S: NDArray[np.int32]
    entries: Entries
    baseline: Baseline
    direction: Literal["delete", "insert"] = "delete"

    @property
    def num_samples(self) -> int:
        return len(self.counts_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class SuperpixelPlan:
    """Copy s shows the superpixels with `keep_SM[s]` and has the baseline elsewhere (LIME, KernelSHAP, IROF).

    `segments_HW` numbers the superpixels 0..M-1. The baseline may also be `segment_mean`: each superpixel's own mean
    colour, per channel (what the `lime` package does without a hide colour).
    """

    segments_HW: NDArray[np.int32]
    keep_SM: NDArray[np.bool_]
    baseline: Baseline | Literal["segment_mean"]

    @property
    def num_samples(self) -> int:
        return len(self.keep_SM)


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformNoisePlan:
    """Copy s is the image plus uniform noise in [low, high), drawn per channel entry from the key (float64, then cast).

    The noise of copy s comes from `key.generator(f"noise:{s}")`, so that any worker can redraw a single copy.
    """

    key: DrawKey
    num_samples: int
    low: float
    high: float

    def noise_CHW(self, sample: int, shape: tuple[int, int, int]) -> NDArray[np.float64]:
        return self.key.generator(f"noise:{sample}").uniform(self.low, self.high, shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftMaskPlan:
    """Copy s is image * m_s + baseline * (1 - m_s), m_s upsampled bilinearly from a random grid and cropped (RISE).

    `grid_Sgg` holds the low-resolution masks (values 0..1), each upsampled with half-pixel centres to
    (g + 1) * ceil(H / g) by (g + 1) * ceil(W / g) pixels; `shift_S2` is the offset (rows, columns) in pixels of the
    image's window into that.
    """

    grid_Sgg: NDArray[np.float32]
    shift_S2: NDArray[np.int32]
    baseline: Baseline

    @property
    def num_samples(self) -> int:
        return len(self.grid_Sgg)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowPlan:
    """Copy s has the rectangle of `height` by `width` pixels with its top left corner at `corner_S2[s]` (row, column)
    replaced by the baseline (occlusion). What lies outside the image is ignored: a corner at (H, W) changes nothing.
    """

    corner_S2: NDArray[np.int32]
    height: int
    width: int
    baseline: Baseline

    @property
    def num_samples(self) -> int:
        return len(self.corner_S2)


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianNoisePlan:
    """Copy s is the image plus normal noise of this mean and standard deviation, drawn per channel entry from the key.

    Drawn like the uniform noise: `key.generator(f"{purpose}:{s}")`, float64, added and only then cast. `purpose` names
    who adds it, for a metric's noise must not be an explainer's own (SmoothGrad).
    """

    key: DrawKey
    purpose: str
    num_samples: int
    mean: float
    std: float

    def noise_CHW(self, sample: int, shape: tuple[int, int, int]) -> NDArray[np.float64]:
        return self.key.generator(f"{self.purpose}:{sample}").normal(self.mean, self.std, shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class FillPlan:
    """Copy s has the entries `index_GK[group_S[s]]` set to the number `value_S[s]` (Nguyen and Martinez 2020).

    Shape letter: G groups of entries, each used by several copies with different values.
    """

    index_GK: NDArray[np.int32]
    group_S: NDArray[np.int32]
    value_S: NDArray[np.float64]
    entries: Entries

    @property
    def num_samples(self) -> int:
        return len(self.group_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImputationPlan:
    """Copy s has the first `counts_S[s]` pixels of `order_N` imputed from their neighbours (ROAD, Rong et al. 2022).

    Each removed pixel becomes the weighted mean of its eight neighbours (1/6 the four nearest, 1/12 the diagonal ones,
    scaled up at the border), solved for all removed pixels together per channel, plus normal noise of deviation
    `noise_std` drawn as (channels, count) from `key.generator(f"imputation:{s}")`.
    """

    order_N: NDArray[np.int32]
    counts_S: NDArray[np.int32]
    noise_std: float
    key: DrawKey

    @property
    def num_samples(self) -> int:
        return len(self.counts_S)

    def noise_CK(self, sample: int, num_channels: int) -> NDArray[np.float64]:
        """The noise added to the imputed pixels of copy `sample`, in the order of `order_N`."""
        generator = self.key.generator(f"imputation:{sample}")
        return self.noise_std * generator.standard_normal((num_channels, int(self.counts_S[sample])))


PerturbationPlan = (
    SubsetPlan
    | OrderPlan
    | SuperpixelPlan
    | UniformNoisePlan
    | GaussianNoisePlan
    | SoftMaskPlan
    | WindowPlan
    | FillPlan
    | ImputationPlan
)
