"""Entries ordered by relevance, what to change step by step, and the area under the outputs: shared by ordered metrics.

Shape letters: C channels, H W pixels, N entries, S steps.
"""

from math import inf
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.maps import TokenGrid
from xaibatch.metrics.base import ImageView
from xaibatch.metrics.reading import MapReading, OutputReading
from xaibatch.metrics.ties import ordered
from xaibatch.options import Options
from xaibatch.perturb.plans import Baseline, Entries


class Steps(MapReading, OutputReading):
    """Options of every metric that changes entries step by step in the order of their relevance.

    Entries of equal relevance (see `ties.TIE`) are taken by position. Quantus leaves their order to NumPy's unstable
    sort, which differs between processors; under `channel` the channels of a pixel are always such ties.
    """

    entries: Entries = "channel"
    """What is ordered: `channel` entries of C*H*W with their pixel's relevance (Quantus 0.6), or whole pixels."""
    features_in_step: int | None = Field(None, ge=1)
    """Entries changed in one step; None: one token of the model (patch_size^2 pixels, all their channels). Quantus
    takes 1, which means 150,528 forward passes for an image of 224 pixels."""
    baseline: Baseline = "black"
    """What a removed entry becomes, from the unchanged image. Quantus takes `mean` from the copy changed so far."""

    def entries_in_step(self, shape_CHW: tuple[int, int, int], patch_size: int) -> int:
        """Entries changed in one step of an image of this shape."""
        num_channels = shape_CHW[0] if self.entries == "channel" else 1
        return self.features_in_step or patch_size**2 * num_channels

    def counts(self, shape_CHW: tuple[int, int, int], patch_size: int) -> NDArray[np.int32]:
        """Entries changed after each step, int32 (S,); the last step has what is left."""
        num_channels, height, width = shape_CHW
        num_entries = height * width * (num_channels if self.entries == "channel" else 1)
        step = self.entries_in_step(shape_CHW, patch_size)
        return np.minimum(np.arange(step, num_entries + step, step), num_entries).astype(np.int32)


def relevance_by_entry(
    values_HW: NDArray[np.float64], shape_CHW: tuple[int, int, int], entries: Entries
) -> NDArray[np.float64]:
    """The map's value of every entry, float64 (N,)."""
    return np.tile(values_HW.ravel(), shape_CHW[0]) if entries == "channel" else values_HW.ravel()


def order_of(relevance_N: NDArray[np.float64], which: Literal["descending", "ascending"]) -> NDArray[np.int32]:
    """Entries from most to least relevant, or the reverse; those equal but for rounding by position, int32 (N,)."""
    return ordered(-relevance_N if which == "descending" else relevance_N).astype(np.int32)


def sums_by_step(ordered_N: NDArray[np.float64], counts_S: NDArray[np.int32]) -> NDArray[np.float64]:
    """Sum of what each step adds, float64 (S,); `ordered_N` in the order of the steps."""
    starts = np.concatenate([[0], counts_S[:-1]])
    return np.add.reduceat(ordered_N, starts)


def trapezoid(curve_S: NDArray[np.float64]) -> float:
    """Area under a curve with one unit between neighbours (NumPy's own function has had two names).

    >>> trapezoid(np.array([1.0, 0.0, 2.0]))
    1.5
    """
    return float((curve_S[1:] + curve_S[:-1]).sum() / 2)


class Area(Options):
    """How a curve of outputs becomes one number."""

    auc: Literal["unit", "steps"] = "unit"
    """`unit`: the curve's mean height (trapezoid rule), comparable between numbers of steps; `steps`: its area with one
    unit a step, which is Quantus's number."""

    def area(self, curve_S: NDArray[np.float64]) -> float:
        """The area under the curve; a single point is its own height."""
        if len(curve_S) < 2:
            return float(curve_S.sum())
        area = trapezoid(curve_S)
        return area / (len(curve_S) - 1) if self.auc == "unit" else area

    def area_bounds(self, lowest: float, highest: float) -> tuple[float, float]:
        """Lowest and highest area under a curve of any length between two heights.

        >>> Area(auc="steps").area_bounds(0.0, 1.0)
        (0.0, inf)
        """
        if self.auc == "unit":
            return lowest, highest
        return -inf if lowest < 0 else 0.0, inf if highest > 0 else 0.0


def num_steps(options: Steps, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
    """Steps of an image of this shape and tokens."""
    return len(options.counts(shape_CHW, grid.side))


def order_key(options: Steps, direction: str) -> str:
    """Equal for metrics that change the same entries in the same order."""
    fields = ("entries", "features_in_step", "baseline", "abs", "normalise")
    return f"order:{direction}:" + ":".join(str(getattr(options, field)) for field in fields)


def counts_of(options: Steps, view: ImageView) -> NDArray[np.int32]:
    """Entries changed after each step for this image."""
    return options.counts(view.shape_CHW, view.patch_size)
