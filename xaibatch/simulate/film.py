"""Path lengths through the body come in; an 8-bit film goes out, and its twin without the lesion by the same exposure.

Shape letters: H W film pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from xaibatch.simulate.options import FilmOptions

_BODY_PATH_MM = 8.0  # soft tissue is added where the beam crosses at least this much patient
_NOISE_GAIN = 1.6  # quantum noise plus that of the detector
_FOCUS_SIGMA = 0.55  # blur of focus and detector, pixels
_PAPER_WHITE = 250.0


@dataclass(frozen=True, slots=True)
class Exposure:
    """One setting of tube, detector and display, with its noise: shared by an image and its twin."""

    photons: float
    scatter: float
    edge_boost: float
    base_contrast: float
    gamma: float
    percentiles: tuple[float, float]
    bone_strength: float
    soft_tissue_mm: float
    noise_HW: NDArray[np.float64]

    @classmethod
    def draw(cls, size: int, options: FilmOptions, rng: np.random.Generator) -> "Exposure":
        return cls(
            photons=rng.uniform(*options.photons),
            scatter=rng.uniform(*options.scatter),
            edge_boost=rng.uniform(*options.edge_boost),
            base_contrast=rng.uniform(*options.base_contrast),
            gamma=rng.uniform(*options.gamma),
            percentiles=(rng.uniform(*options.black_percentile), rng.uniform(*options.white_percentile)),
            bone_strength=rng.uniform(*options.bone_strength),
            soft_tissue_mm=rng.uniform(*options.soft_tissue_mm),
            noise_HW=ndimage.gaussian_filter(rng.standard_normal((size, size)), 0.5),
        )


class FilmPrinter:
    """Turns attenuation into grey levels; the display window comes from the body in the lesion-free film."""

    def __init__(
        self,
        water_HW: NDArray[np.float32],
        bone_HW: NDArray[np.float32],
        overlay_HW: NDArray[np.float32],
        exposure: Exposure,
        options: FilmOptions,
    ) -> None:
        """water_HW, bone_HW: path lengths in mm; overlay_HW: attenuation of what lies on the patient (leads)."""
        self.exposure, self.options = exposure, options
        water = water_HW + exposure.soft_tissue_mm * (water_HW > _BODY_PATH_MM)
        body = options.water_per_mm * water + options.bone_per_mm * exposure.bone_strength * bone_HW
        self.healthy_HW = body + overlay_HW
        self._reference_HW = self._detected(self.healthy_HW)
        self._black, self._white = np.percentile(self._reference_HW[water_HW > _BODY_PATH_MM], exposure.percentiles)

    def healthy(self) -> NDArray[np.float64]:
        """The lesion-free film (H,W), float in [0, 250]."""
        return self._displayed(self._reference_HW)

    def with_lesion(self, lesion_HW: NDArray[np.float32]) -> NDArray[np.float64]:
        """The film (H,W), float in [0, 250], with added attenuation `lesion_HW`; same noise, same window."""
        return self._displayed(self._detected(self.healthy_HW + lesion_HW))

    def _detected(self, attenuation_HW: NDArray[np.floating]) -> NDArray[np.float64]:
        """Photons, scatter and noise, then logarithm, dynamic-range compression and edge boost."""
        size, setting = attenuation_HW.shape[0], self.exposure
        beam = np.exp(-_blur(attenuation_HW, _FOCUS_SIGMA))
        beam = (1 - setting.scatter) * beam + setting.scatter * _blur(beam, size / 14)
        counts = beam * setting.photons
        counts = np.maximum(counts + np.sqrt(counts) * setting.noise_HW * _NOISE_GAIN, 1)
        signal = -np.log(counts / setting.photons)
        base = _blur(signal, size / 11)
        edges = signal - _blur(signal, size / 110)
        return np.asarray(
            setting.base_contrast * base + self.options.detail_contrast * (signal - base) + setting.edge_boost * edges
        )

    def _displayed(self, signal_HW: NDArray[np.float64]) -> NDArray[np.float64]:
        """A sigmoid between the black and the white point, stretched to [0, 1], then gamma."""

        def curve(level: NDArray[np.float64] | float) -> NDArray[np.float64]:
            return np.asarray(1 / (1 + np.exp(-self.options.curve_slope * (level - self.options.curve_centre))))

        level = (signal_HW - self._black) / (self._white - self._black)
        low, high = curve(0.0), curve(1.0)
        grey = ((curve(level) - low) / (high - low)).clip(0, 1) ** self.exposure.gamma
        return np.asarray(_PAPER_WHITE * grey)


def _blur(values_HW: NDArray[np.floating], sigma: float) -> NDArray[np.float32]:
    return np.asarray(ndimage.gaussian_filter(values_HW.astype(np.float32), sigma))
