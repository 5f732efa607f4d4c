"""Pose options and a random generator come in; the points of the CT that each ray of the film crosses go out.

Shape letters: D depth samples along a ray, H W film pixels, 3 = (x, y, z) in the order of torch's `grid_sample`.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from xaibatch.simulate.lesions import LungGeometry
from xaibatch.simulate.options import PoseOptions
from xaibatch.simulate.smooth import smooth_field

_MESH = (17, 45, 45)  # the mapping is smooth: computed on this mesh, then interpolated
_BODY_TO_DETECTOR_MM = 200.0
_HEART_MM = (22.0, 50.0)  # left of the midline, below the middle of the lungs
_HEART_RADIUS_MM = 42.0
_LOWER_MM = 4.0  # films are centred a little below the middle of the lungs


def ray_points(geometry: LungGeometry, size: int, options: PoseOptions, rng: np.random.Generator) -> Tensor:
    """Sample positions (D,H,W,3), float32 in [-1, 1] of the volume's extent, of a cone beam from behind (PA).

    The patient is rolled, pitched, rotated, scaled, smoothly warped and shifted at random; the heart grows or shrinks.
    """
    shape = geometry.room_ZYX.shape
    spacing_z, spacing_y, spacing_x = geometry.spacing_mm
    num_d, num_v, num_u = _MESH
    field_mm, source_mm = rng.uniform(*options.field_of_view_mm), rng.uniform(*options.source_distance_mm)
    angles = np.deg2rad(rng.normal(0, options.tilt_sd_degrees))
    v, u = np.meshgrid(*(np.linspace(-0.5, 0.5, n) * field_mm for n in (num_v, num_u)), indexing="ij")
    depth = np.linspace(-shape[1] / 2, shape[1] / 2 - 1, num_d)[:, None, None] * spacing_y
    magnified = (source_mm - _BODY_TO_DETECTOR_MM + depth) / source_mm
    axes = [u * magnified, v * magnified, np.broadcast_to(depth, _MESH)]
    for (i, j), angle in zip(((0, 1), (1, 2), (0, 2)), angles, strict=True):
        c, s = np.cos(angle), np.sin(angle)
        axes[i], axes[j] = c * axes[i] - s * axes[j], s * axes[i] + c * axes[j]
    low, high = zip(options.width_scale, options.height_scale, options.depth_scale, strict=True)
    scales = rng.uniform(low, high)
    knots = ((3, 5, 5), (3, 5, 5), (3, 4, 4))
    x, z, y = (
        axis / scale + options.warp_mm * smooth_field(rng, _MESH, n)
        for axis, scale, n in zip(axes, scales, knots, strict=True)
    )
    zoom = -rng.uniform(*options.heart_zoom)
    from_heart_x, from_heart_z = x - _HEART_MM[0], z - _HEART_MM[1]
    pull = zoom * np.exp(-(from_heart_x**2 + from_heart_z**2) / (2 * _HEART_RADIUS_MM**2))
    x, z = x + pull * from_heart_x, z + pull * from_heart_z
    shift_x, shift_z = rng.normal(0, options.shift_sd_mm, 2)
    rows = np.flatnonzero((geometry.lobes_ZYX > 0).any((1, 2)))
    voxel_z = (z + shift_z + _LOWER_MM) / spacing_z + (rows[0] + rows[-1]) / 2
    voxel_x = (x + shift_x) / spacing_x + geometry.midline_x
    voxel_y = y / spacing_y + (shape[1] - 1) / 2
    half_z, half_y, half_x = ((n - 1) / 2 for n in shape)
    mesh = np.stack([voxel_x / half_x - 1, voxel_y / half_y - 1, voxel_z / half_z - 1]).astype(np.float32)
    fine = functional.interpolate(
        torch.from_numpy(mesh)[None], (shape[1], size, size), mode="trilinear", align_corners=True
    )
    return fine[0].permute(1, 2, 3, 0)


def path_lengths(volumes_CZYX: Tensor, points_DHW3: Tensor, step_mm: float, num_slabs: int = 8) -> Tensor:
    """Line integrals (C,H,W) in mm of each volume along the rays; beyond the volume its border continues."""
    total = torch.zeros(volumes_CZYX.shape[0], *points_DHW3.shape[1:3])
    for slab in points_DHW3.chunk(num_slabs):
        sampled = functional.grid_sample(volumes_CZYX[None], slab[None], padding_mode="border", align_corners=True)
        total += sampled[0].sum(1)
    return total * step_mm
