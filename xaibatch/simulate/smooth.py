"""A random generator and a few control points come in; a smooth random field goes out."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional


def smooth_field(
    rng: np.random.Generator, shape: Sequence[int], num_points: tuple[int, int, int]
) -> NDArray[np.float32]:
    """Trilinear interpolation of uniform draws in [-1, 1] on `num_points` control points along each axis."""
    points = torch.from_numpy(rng.uniform(-1, 1, (1, 1, *num_points)).astype(np.float32))
    field = functional.interpolate(points, tuple(shape), mode="trilinear", align_corners=True)[0, 0]
    return np.asarray(field.numpy(), np.float32)
