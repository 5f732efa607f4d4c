"""A seed and an image index come in; a film, its lesion-free twin and exact masks go out, the same on every worker.

Shape letters: H W film pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from xaibatch.seeding import keyed_generator
from xaibatch.simulate import marks
from xaibatch.simulate.film import Exposure, FilmPrinter
from xaibatch.simulate.lesions import LungGeometry, lesion_density
from xaibatch.simulate.options import NORMAL, SimulationOptions
from xaibatch.simulate.pose import path_lengths, ray_points
from xaibatch.simulate.volume import ChestVolume

_LUNG_PATH_MM = 12.0  # a pixel belongs to the lung where its ray crosses more lung than this


@dataclass(frozen=True, slots=True)
class Radiograph:
    """One simulated film.

    image_HW, twin_HW: uint8 grey; the twin has the same pose, noise, window and marks, but no lesion.
    lesion_HW:         bool, where the inserted lesion absorbs (see `LesionOptions`); all false for `normal`.
    lung_HW:           bool, rays that cross more than 12 mm of lung.
    shortcut_HW:       bool, the shortcut marker if this film carries one, else None.
    """

    index: int
    label: str
    split: str
    image_HW: NDArray[np.uint8]
    twin_HW: NDArray[np.uint8]
    lesion_HW: NDArray[np.bool_]
    lung_HW: NDArray[np.bool_]
    shortcut_HW: NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class FilmSet:
    """Several films of one pose that differ in the lesion only: (F,H,W) uint8, the twin, and the lesions' masks."""

    films_FHW: NDArray[np.uint8]
    twin_HW: NDArray[np.uint8]
    lesions_FHW: NDArray[np.bool_]
    lung_HW: NDArray[np.bool_]


class RadiographSimulator:
    """Renders films of one chest volume.

    Everything about film `index` hangs on (seed, index) through keyed draws; its class is
    `options.classes[index % len(options.classes)]`, so a larger set contains the smaller one.
    """

    def __init__(self, volume: ChestVolume, options: SimulationOptions, seed: int) -> None:
        self.options, self.seed = options, seed
        self.geometry = LungGeometry.of(volume)
        lung = (volume.lobes_ZYX > 0).astype(np.float32)
        self._body = torch.from_numpy(np.stack([volume.water_ZYX, volume.bone_ZYX, lung]))

    def radiograph(self, index: int) -> Radiograph:
        """Render film `index` (0.5 to 1 s of one core at 224 pixels)."""
        label, split = class_of(self.options, index), split_of(self.options, self.seed, index)
        films = self.films(index, [label])
        image, twin = films.films_FHW[0], films.twin_HW
        image, twin, shortcut = self._with_shortcut(index, label, split, image, twin)
        return Radiograph(index, label, split, image, twin, films.lesions_FHW[0], films.lung_HW, shortcut)

    def films(self, index: int, labels: Sequence[str]) -> FilmSet:
        """Render one film of pose `index` for each label; a repeated label gets another lesion."""
        options, size = self.options, self.options.size
        points = ray_points(self.geometry, size, options.pose, self._draws(index, "pose"))
        added = [
            lesion_density(name, self.geometry, options.lesions, options.film, self._draws(index, "lesion", k, name))
            for k, name in enumerate(labels)
        ]
        volumes = torch.cat([self._body, torch.from_numpy(np.stack(added))])
        water, bone, lung, *lesions = path_lengths(volumes, points, float(self.geometry.spacing_mm[1])).numpy()
        exposure = Exposure.draw(size, options.film, self._draws(index, "film"))
        overlay = marks.leads(size, options.marks, self._draws(index, "leads"))
        printer = FilmPrinter(water, bone, overlay, exposure, options.film)
        side = marks.Marks(size, options.marks, self._draws(index, "marks"))
        twin = _grey(side.put(printer.healthy()))
        attenuations = [options.film.water_per_mm * lesion for lesion in lesions]
        films = [
            twin.copy() if name == NORMAL else _grey(side.put(printer.with_lesion(attenuation)))
            for name, attenuation in zip(labels, attenuations, strict=True)
        ]
        masks = [self._mask(attenuation) for attenuation in attenuations]
        return FilmSet(np.stack(films), twin, np.stack(masks), lung > _LUNG_PATH_MM)

    def _mask(self, attenuation_HW: NDArray[np.float32]) -> NDArray[np.bool_]:
        settings = self.options.lesions
        threshold = max(settings.mask_min_attenuation, settings.mask_share_of_peak * float(attenuation_HW.max()))
        return np.asarray(attenuation_HW > threshold, np.bool_)

    def _with_shortcut(
        self, index: int, label: str, split: str, image: NDArray[np.uint8], twin: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Put the cue on the image and on its twin alike: the lesion stays all that differs between them."""
        settings = self.options.shortcut
        if settings.kind == "none":
            return image, twin, None
        share = settings.strength if label == settings.label else 1 - settings.strength
        if self._draws(index, "shortcut").random() >= (0.5 if split == "test" else share):
            return image, twin, None
        pair = [image.astype(np.float64), twin.astype(np.float64)]
        if settings.kind == "exposure":
            image, twin = (_grey(marks.brightened(film, settings.brightening)) for film in pair)
            return image, twin, None
        marker = marks.shortcut_marker(self.options.size)
        image, twin = (_grey(marks.with_marker(film, marker)) for film in pair)
        return image, twin, marker

    def _draws(self, index: int, purpose: str, repeat: int = 0, name: str = "") -> np.random.Generator:
        return _draws(self.seed, index, purpose, repeat, name)


def class_of(options: SimulationOptions, index: int) -> str:
    """The class of film `index`: the classes in turn."""
    return options.classes[index % len(options.classes)]


def split_of(options: SimulationOptions, seed: int, index: int) -> str:
    """The split of film `index`, drawn for it alone with the probabilities `split_shares`."""
    names = list(options.split_shares)
    bounds = np.cumsum([options.split_shares[name] for name in names])
    draw = _draws(seed, index, "split").random()
    return names[min(int(np.searchsorted(bounds, draw, side="right")), len(names) - 1)]


def _draws(seed: int, index: int, purpose: str, repeat: int = 0, name: str = "") -> np.random.Generator:
    return keyed_generator(seed, f"{index}", f"simulate.{purpose}", repeat, name)


def _grey(film_HW: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.asarray(film_HW.round().clip(0, 255), np.uint8)
