"""Patches as superpixels: the model's tokens or squares of any size in, the patch number of every pixel out, and sums
over segments.

Shape letters: H W pixels, M segments.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xaibatch.maps import TokenGrid
from xaibatch.metrics.base import ImageView


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches 0..num-1 that a plan may hide, int32 (H,W); pixels that belong to none have the number `num`."""

    segments_HW: NDArray[np.int32]
    num: int

    @property
    def num_segments(self) -> int:
        """The patches, and one more segment, which is never hidden, where pixels belong to none."""
        return int(self.segments_HW.max()) + 1


def patches_of(view: ImageView, patch_size: int | None = None) -> Patches:
    """The squares of `patch_size` pixels on a centred grid, as Quantus lays them; None: the model's own tokens."""
    size = (view.shape_CHW[1], view.shape_CHW[2])
    if patch_size is None:
        return Patches(token_segments(size, view.tokens), view.tokens.rows * view.tokens.columns)
    segments_HW = patch_grid(size, patch_size)
    return Patches(segments_HW, int(segments_HW.max()) + 1)


def num_patches(shape_CHW: tuple[int, int, int], grid: TokenGrid, patch_size: int | None = None) -> int:
    """How many patches `patches_of` finds on an image of this shape and tokens."""
    if patch_size is None:
        return grid.rows * grid.columns
    return -(-shape_CHW[1] // patch_size) * -(-shape_CHW[2] // patch_size)


def token_segments(size: tuple[int, int], grid: TokenGrid) -> NDArray[np.int32]:
    """Number of the token that each pixel lies in, row-major from 0, int32 (H,W); rows * columns where none does.

    >>> token_segments((2, 5), TokenGrid(1, 2, 2, 2)).tolist()
    [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2]]
    """
    rows, columns = (np.arange(side) // step for side, step in zip(size, grid.patch, strict=True))
    inside = (rows < grid.rows)[:, None] & (columns < grid.columns)
    numbers = np.where(inside, rows[:, None] * grid.columns + columns, grid.rows * grid.columns)
    return numbers.astype(np.int32)


def patch_grid(size: tuple[int, int], patch_size: int) -> NDArray[np.int32]:
    """Number of the `patch_size` square that each pixel lies in, row-major from 0, int32 (H,W).

    Where a side is not a multiple, the grid is centred and its border patches are cut (Quantus pads the image instead,
    with the smaller half of the padding before the first pixel; the squares that cover the image are the same).

    >>> patch_grid((4, 5), 2).tolist()[0]
    [0, 0, 1, 1, 2]
    """
    rows, columns = ((np.arange(side) + (-side % patch_size) // 2) // patch_size for side in size)
    grid: NDArray[np.int32] = (rows[:, None] * (columns[-1] + 1) + columns).astype(np.int32)
    return grid


def sums_by_segment(values_HW: NDArray[np.floating], segments_HW: NDArray[np.int32]) -> NDArray[np.float64]:
    """Sum of the values over each segment 0..M-1, float64 (M,)."""
    return np.bincount(segments_HW.ravel(), np.asarray(values_HW, np.float64).ravel()).astype(np.float64)
