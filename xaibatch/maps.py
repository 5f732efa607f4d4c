"""Token-grid maps to pixel maps and back, in float64 NumPy, so that every worker gets the same numbers.

Shape letters: h w a map's own sides, H W pixels, g token-grid side.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from xaibatch.options import Options


class MapOptions(Options):
    """How a map reaches pixel resolution before it is scored; recorded with every run (DESIGN rule 7)."""

    upsampling: Literal["bilinear", "nearest"] = "bilinear"
    """`bilinear`: half-pixel centres (align_corners=False), as torch and OpenCV; `nearest`: each token's square."""

    normalise: Literal["none", "min_max", "max_abs"] = "none"
    """Per map, after upsampling: none; (m - min) / (max - min); m / max|m|. Never over a batch."""


def pixel_map(map_hw: NDArray[np.floating], size: tuple[int, int], options: MapOptions) -> NDArray[np.float64]:
    """Return the map at `size` (H,W) in float64, upsampled and normalised. A constant map is left as it is."""
    pixels = upsample(np.asarray(map_hw, np.float64), size, options.upsampling)
    if options.normalise == "min_max":
        low, high = pixels.min(), pixels.max()
        return (pixels - low) / (high - low) if high > low else pixels
    if options.normalise == "max_abs":
        peak = np.abs(pixels).max()
        return pixels / peak if peak > 0 else pixels
    return pixels


def upsample(map_hw: NDArray[np.float64], size: tuple[int, int], how: str) -> NDArray[np.float64]:
    """Separable interpolation (h,w) -> (H,W); the identity where the sizes are equal."""
    if map_hw.shape == tuple(size):
        return map_hw
    rows, columns = (_weights(n, m, how) for n, m in zip(map_hw.shape, size, strict=True))
    upsampled: NDArray[np.float64] = rows @ map_hw @ columns.T
    return upsampled


def _weights(num_in: int, num_out: int, how: str) -> NDArray[np.float64]:
    """Interpolation matrix (num_out, num_in) of one axis; each row sums to one."""
    centre = (np.arange(num_out) + 0.5) * num_in / num_out - 0.5
    matrix = np.zeros((num_out, num_in))
    if how == "nearest":
        matrix[np.arange(num_out), np.clip(np.floor(centre + 0.5).astype(int), 0, num_in - 1)] = 1
        return matrix
    centre = np.clip(centre, 0, num_in - 1)
    low = np.minimum(np.floor(centre).astype(int), max(num_in - 2, 0))
    high = np.minimum(low + 1, num_in - 1)
    np.add.at(matrix, (np.arange(num_out), low), 1 - (centre - low))
    np.add.at(matrix, (np.arange(num_out), high), centre - low)
    return matrix


def token_grid(map_hw: NDArray[np.floating], grid: tuple[int, int]) -> NDArray[np.float64]:
    """Mean over each token's square: (H,W) -> (g,g); the identity for a map that is already on the grid."""
    values = np.asarray(map_hw, np.float64)
    if values.shape == tuple(grid):
        return values
    (height, width), (rows, columns) = values.shape, grid
    if height % rows or width % columns:
        raise ValueError(f"a map of {height}x{width} cannot be averaged onto a grid of {rows}x{columns}")
    return values.reshape(rows, height // rows, columns, width // columns).mean((1, 3))


def repeat_agreement(values_RN: NDArray[np.floating]) -> float:
    """Mean Pearson correlation over all pairs of repeats of one map (or its weights), in [-1, 1]; NaN with one repeat,
    or where a repeat has no variation or undefined values.

    >>> repeat_agreement(np.array([[0.0, 1.0, 2.0], [1.0, 3.0, 5.0]]))
    1.0
    """
    num_repeats = len(values_RN)
    if num_repeats < 2 or not np.isfinite(values_RN).all() or (np.ptp(values_RN, axis=1) == 0).any():
        return float("nan")
    matrix = np.atleast_2d(np.corrcoef(values_RN))
    return round(float(matrix[np.triu_indices(num_repeats, 1)].mean()), 12)
