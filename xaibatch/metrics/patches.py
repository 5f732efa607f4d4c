"""Square patches as superpixels: an image size in, the patch number of every pixel out, and sums over segments.

Shape letters: H W pixels, M segments.
"""

import numpy as np
from numpy.typing import NDArray


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
