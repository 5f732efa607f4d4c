"""Token-grid maps to pixel maps and back, in float64 NumPy, so that every worker gets the same numbers.

Shape letters: h w a map's own sides, H W pixels, g v rows and columns of the token grid.
"""

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Where a model's tokens lie on its images: rows and columns of patches, from the upper left corner on.

    The patches may leave a rest of the image uncovered, which the model does not see, or reach beyond it.
    """

    rows: int
    columns: int
    patch_height: int
    patch_width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.patch_height, self.patch_width

    @property
    def side(self) -> int:
        """The longer side of a patch in pixels: that of the squares which metrics take for tokens."""
        return max(self.patch)

    @property
    def covered(self) -> tuple[int, int]:
        """Height and width in pixels of what the patches cover."""
        return self.rows * self.patch_height, self.columns * self.patch_width


def fitting_grid(size: tuple[int, int], side: int) -> TokenGrid:
    """The squares of `side` pixels that fit into an image of `size` (H,W), at least one: for a model of which no more
    is known."""
    rows, columns = (max(1, pixels // side) for pixels in size)
    return TokenGrid(rows, columns, side, side)


class PlacedMapOptions(MapOptions):
    """The options of a run whose model's tokens are known."""

    grid: TokenGrid | None = None
    """Maps of this shape are laid on the pixels that its patches cover; others, and all without it, on the image."""


def pixel_map(map_hw: NDArray[np.floating], size: tuple[int, int], options: MapOptions) -> NDArray[np.float64]:
    """Return the map at `size` (H,W) in float64, upsampled and normalised. A constant map is left as it is."""
    pixels = on_pixels(map_hw, size, options)
    if options.normalise == "min_max":
        low, high = pixels.min(), pixels.max()
        return (pixels - low) / (high - low) if high > low else pixels
    if options.normalise == "max_abs":
        peak = np.abs(pixels).max()
        return pixels / peak if peak > 0 else pixels
    return pixels


def on_pixels(map_hw: NDArray[np.floating], size: tuple[int, int], options: MapOptions) -> NDArray[np.float64]:
    """Return the map at `size` (H,W) in float64, not normalised; zero on pixels that no token covers.

    >>> options = PlacedMapOptions(upsampling="nearest", grid=TokenGrid(1, 2, 2, 2))
    >>> on_pixels(np.array([[1.0, 2.0]]), (2, 5), options)[0].tolist()
    [1.0, 1.0, 2.0, 2.0, 0.0]
    """
    values = np.asarray(map_hw, np.float64)
    grid = options.grid if isinstance(options, PlacedMapOptions) else None
    if grid is None or values.shape != grid.shape or grid.covered == tuple(size):
        return upsample(values, size, options.upsampling)
    pixels = np.zeros(size)
    on_patches = upsample(values, grid.covered, options.upsampling)[: size[0], : size[1]]
    pixels[: on_patches.shape[0], : on_patches.shape[1]] = on_patches
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


def on_tokens(map_HW: NDArray[np.floating], grid: TokenGrid) -> NDArray[np.float64]:
    """Mean over each token's patch, (H,W) -> (g,v), of the pixels that lie in the image; the identity for a map that is
    already on the grid.

    >>> on_tokens(np.array([[1.0, 3.0, 5.0], [1.0, 3.0, 7.0]]), TokenGrid(1, 2, 2, 2)).tolist()
    [[2.0, 6.0]]
    """
    values = np.asarray(map_HW, np.float64)
    if values.shape == grid.shape:
        return values
    seen = values[: grid.covered[0], : grid.covered[1]]
    cells = grid.rows, grid.patch_height, grid.columns, grid.patch_width
    if seen.shape == grid.covered:
        return seen.reshape(cells).mean((1, 3))
    beyond = [(0, whole - side) for whole, side in zip(grid.covered, seen.shape, strict=True)]
    sums, counts = (np.pad(part, beyond).reshape(cells).sum((1, 3)) for part in (seen, np.ones(seen.shape)))
    means: NDArray[np.float64] = sums / counts
    return means


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
