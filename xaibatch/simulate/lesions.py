"""Lung geometry and a random generator come in; a density to add to the lung, and nowhere else, goes out.

Shape letters: Z head to feet, Y front to back, X patient's right to left; N candidate voxels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from xaibatch.simulate.options import COVID_LIKE, NORMAL, PNEUMONIA_LIKE, FilmOptions, LesionOptions
from xaibatch.simulate.smooth import smooth_field
from xaibatch.simulate.volume import LOBES, ChestVolume

_EDGE = 0.12  # width of the soft rim, as a share of the radius
_REACH = 1.6  # a patch is computed out to this many radii; beyond, the rim is below a thousandth
_MIN_LUNG_PATH_MM = 105.0  # centres lie where the beam crosses this much lung, so not behind the liver
_FISSURE_BLUR_MM = 1.7


@dataclass(frozen=True, slots=True)
class LungGeometry:
    """Where lesions may go: room left in each voxel, and candidate centres.

    room_ZYX:      float32, density that can be added until soft tissue (1.03) is reached; 0 outside the lung.
    peripheral_N3: voxels 3 to 16 mm below the pleura, in the lower 62% of the lung, away from the mediastinum.
    inner_N3:      per lobe, voxels more than 8 mm below the pleura.
    """

    lobes_ZYX: NDArray[np.uint8]
    room_ZYX: NDArray[np.float32]
    spacing_mm: NDArray[np.float64]
    midline_x: float
    peripheral_N3: NDArray[np.int64]
    inner_N3: Mapping[int, NDArray[np.int64]]

    @classmethod
    def of(cls, volume: ChestVolume) -> "LungGeometry":
        lung = volume.lobes_ZYX > 0
        spacing = volume.spacing_mm
        depth_mm = ndimage.distance_transform_edt(lung, sampling=spacing)
        inside = np.argwhere(lung)
        first, last = inside[:, 0].min(), inside[:, 0].max()
        midline = float(inside[:, 2].mean())
        clear = (lung.sum(1) * spacing[1] > _MIN_LUNG_PATH_MM)[:, None]
        height = ((np.arange(lung.shape[0]) - first) / (last - first))[:, None, None]
        lateral = np.abs(np.arange(lung.shape[2]) - midline) * spacing[2] > 55
        peripheral = lung & clear & lateral & (depth_mm > 3) & (depth_mm < 16) & (height > 0.38)
        return cls(
            volume.lobes_ZYX,
            ((1.03 - volume.water_ZYX).clip(0) * lung).astype(np.float32),
            spacing,
            midline,
            np.argwhere(peripheral),
            {k: np.argwhere((volume.lobes_ZYX == k) & clear & (depth_mm > 8)) for k in LOBES},
        )


def lesion_density(
    label: str, geometry: LungGeometry, options: LesionOptions, film: FilmOptions, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return the added density (Z,Y,X), water = 1, of one class; zeros for `normal`.

    Drawn again, up to `options.max_draws` times, while it darkens less of the film than the class's `min_area_cm2`;
    the largest of the draws is kept.
    """
    if label == NORMAL:
        return np.zeros(geometry.room_ZYX.shape, np.float32)
    draw = {COVID_LIKE: _ground_glass, PNEUMONIA_LIKE: _consolidation}[label]
    wanted = options.ground_glass if label == COVID_LIKE else options.consolidation
    pixel_cm2 = geometry.spacing_mm[0] * geometry.spacing_mm[2] / 100
    best, best_area = np.zeros(geometry.room_ZYX.shape, np.float32), -1.0
    for _ in range(options.max_draws):
        added = draw(geometry, options, rng)
        attenuation = film.water_per_mm * geometry.spacing_mm[1] * added.sum(1)
        area = float((attenuation > wanted.min_attenuation).sum() * pixel_cm2)
        if area > best_area:
            best, best_area = added, area
        if area >= wanted.min_area_cm2:
            break
    return best


def _ground_glass(geometry: LungGeometry, options: LesionOptions, rng: np.random.Generator) -> NDArray[np.float32]:
    settings = options.ground_glass
    added = np.zeros(geometry.room_ZYX.shape, np.float32)
    on_left = geometry.peripheral_N3[:, 2] > geometry.midline_x
    for side in (False, True):
        places = geometry.peripheral_N3[on_left == side]
        count = int(rng.integers(settings.num_per_lung[0], settings.num_per_lung[1] + 1))
        for place in places[rng.choice(len(places), count, replace=False)]:
            radii, density = rng.uniform(*settings.radius_mm, 3), rng.uniform(*settings.density)
            _add_patch(added, geometry, place, radii, density, settings.roughness, rng)
    return added


def _consolidation(geometry: LungGeometry, options: LesionOptions, rng: np.random.Generator) -> NDArray[np.float32]:
    settings = options.consolidation
    added = np.zeros(geometry.room_ZYX.shape, np.float32)
    lobe = int(rng.choice(LOBES))
    places = geometry.inner_N3[lobe]
    place = places[rng.integers(len(places))]
    radii, density = rng.uniform(*settings.radius_mm, 3), rng.uniform(*settings.density)
    _add_patch(added, geometry, place, radii, density, settings.roughness, rng, lobe=lobe)
    return added


def _add_patch(
    added_ZYX: NDArray[np.float32],
    geometry: LungGeometry,
    centre_3: Sequence[int] | NDArray[np.int64],
    radii_mm: NDArray[np.float64],
    density: float,
    roughness: float,
    rng: np.random.Generator,
    lobe: int | None = None,
) -> None:
    """Take the maximum of `added_ZYX` and a soft, lumpy, textured ellipsoid, in place and within its box only."""
    box = tuple(
        slice(max(0, int(c - _REACH * r / mm)), int(c + _REACH * r / mm) + 1)
        for c, r, mm in zip(centre_3, radii_mm, geometry.spacing_mm, strict=True)
    )
    part = added_ZYX[box]
    axes = [
        ((np.arange(s.start, s.start + n) - c) * mm / r).astype(np.float32)
        for s, n, c, mm, r in zip(box, part.shape, centre_3, geometry.spacing_mm, radii_mm, strict=True)
    ]
    radius = np.sqrt(axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2)
    radius = radius + roughness * smooth_field(rng, part.shape, (5, 5, 5))
    texture = 0.8 + 0.35 * smooth_field(rng, part.shape, (13, 13, 13))
    patch = density * texture / (1 + np.exp((radius - 1) / _EDGE))
    if lobe is not None:
        inside = (geometry.lobes_ZYX[box] == lobe).astype(np.float32)
        patch = patch * ndimage.gaussian_filter(inside, _FISSURE_BLUR_MM / geometry.spacing_mm)
    added_ZYX[box] = np.maximum(part, np.minimum(patch, geometry.room_ZYX[box]))
