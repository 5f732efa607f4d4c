"""What a simulated data set looks like: typed ranges for pose, lesions, film and marks.

A draw is uniform in its range unless said otherwise.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from xaibatch.options import Options

Range = tuple[float, float]

COVID_LIKE = "COVID-like"
PNEUMONIA_LIKE = "pneumonia-like"
NORMAL = "normal"
CLASSES = (COVID_LIKE, PNEUMONIA_LIKE, NORMAL)
"""Class names, in the order that image indices cycle through and that the shipped classifier uses."""


class PoseOptions(Options):
    """How the patient stands in the beam."""

    field_of_view_mm: Range = (318, 352)
    """Side of the detector."""
    source_distance_mm: Range = (1500, 1900)
    """Focus to detector; the body's middle is 200 mm in front of the detector."""
    tilt_sd_degrees: tuple[float, float, float] = (1.6, 2.5, 2.0)
    """Standard deviations (normal) of roll in the film plane, pitch, and rotation about the long axis."""
    shift_sd_mm: float = 7.0
    width_scale: Range = (0.92, 1.10)
    height_scale: Range = (0.90, 1.10)
    depth_scale: Range = (0.85, 1.20)
    warp_mm: float = 11.0
    """Largest displacement of the smooth random warp that changes the anatomy."""
    heart_zoom: Range = (-0.12, 0.22)
    """Local enlargement around the heart; negative shrinks it."""


class GroundGlassOptions(Options):
    """COVID-like: several soft patches near the pleura of both lungs, in the middle and lower zones."""

    num_per_lung: tuple[int, int] = (3, 4)
    radius_mm: Range = (20, 36)
    density: Range = (0.74, 1.08)
    """Added density at the centre, water = 1; the lung never gets denser than soft tissue."""
    roughness: float = 0.45
    """Irregularity of the outline, as a share of the radius."""
    min_area_cm2: float = 70.0
    """Redrawn (up to `LesionOptions.max_draws`) until this much of the film is darkened by `min_attenuation`."""
    min_attenuation: float = 0.40


class ConsolidationOptions(Options):
    """Pneumonia-like: one dense lobar or segmental patch that stops at the fissure."""

    radius_mm: Range = (36, 58)
    density: Range = (1.15, 1.42)
    roughness: float = 0.35
    min_area_cm2: float = 30.0
    min_attenuation: float = 0.65


class LesionOptions(Options):
    ground_glass: GroundGlassOptions = Field(default_factory=GroundGlassOptions)
    consolidation: ConsolidationOptions = Field(default_factory=ConsolidationOptions)
    max_draws: int = Field(default=6, ge=1)
    mask_share_of_peak: float = 0.1
    """A pixel is in the lesion mask where the added attenuation exceeds this share of its peak, and ..."""
    mask_min_attenuation: float = 0.06
    """... this much (natural logarithm of the beam)."""


class FilmOptions(Options):
    """X-ray physics and the display curve."""

    water_per_mm: float = 0.0185
    """Effective attenuation of water."""
    bone_per_mm: float = 0.034
    """Effective attenuation of the bone channel at `bone_strength` 1."""
    bone_strength: Range = (0.55, 1.05)
    soft_tissue_mm: Range = (0, 35)
    """Fat and muscle added everywhere in the body."""
    photons: Range = (4e4, 2e5)
    """Photons a pixel without a patient."""
    scatter: Range = (0.15, 0.35)
    """Share of the beam that arrives as a wide blur."""
    edge_boost: Range = (0.3, 0.8)
    base_contrast: Range = (0.45, 0.60)
    """What dynamic-range compression leaves of the slow part of the film."""
    detail_contrast: float = 1.3
    gamma: Range = (0.85, 1.15)
    black_percentile: Range = (0.5, 3.0)
    white_percentile: Range = (98.0, 99.8)
    curve_slope: float = 3.4
    curve_centre: float = 0.50


class MarkOptions(Options):
    """Things on the film that have nothing to do with the class."""

    lead_probability: float = 0.4
    """Films with one to three ECG leads."""
    side_marker_probability: float = 0.67
    collimation_probability: float = 0.25


class ShortcutOptions(Options):
    """A cue that goes with one class in train and val and with no class in test: a model can cheat by it.

    `marker` draws a box with a P in the lower corner (its mask is written as `mask_shortcut`); `exposure` brightens the
    film. In train and val an image of `label` carries the cue with probability `strength`, any other with 1 - strength;
    in test every image carries it with probability one half.

    A map gives a marker away by its relevance there: any localisation metric with `mask: shortcut`. An exposure lies in
    no place and has no mask; it shows in the accuracy, which falls from val to test.
    """

    kind: Literal["none", "marker", "exposure"] = "none"
    label: str = PNEUMONIA_LIKE
    strength: float = Field(default=0.95, ge=0.5, le=1.0)
    brightening: float = 26.0
    """Grey levels that `exposure` adds in mid-tones, of 255."""


class SimulationOptions(Options):
    """Everything that, with the seed and the index, determines an image."""

    size: int = Field(default=224, ge=32)
    """Side of the square film in pixels."""
    classes: tuple[str, ...] = CLASSES
    split_shares: dict[str, float] = Field(default_factory=lambda: {"train": 0.7, "val": 0.15, "test": 0.15})
    """Shares of the splits; each image is drawn into one by its own index."""
    pose: PoseOptions = Field(default_factory=PoseOptions)
    lesions: LesionOptions = Field(default_factory=LesionOptions)
    film: FilmOptions = Field(default_factory=FilmOptions)
    marks: MarkOptions = Field(default_factory=MarkOptions)
    shortcut: ShortcutOptions = Field(default_factory=ShortcutOptions)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        unknown = set(self.classes) - set(CLASSES)
        if unknown or not self.classes:
            raise ValueError(f"classes must come from {', '.join(CLASSES)}")
        if abs(sum(self.split_shares.values()) - 1) > 1e-6:
            raise ValueError(f"split_shares must sum to 1, not {sum(self.split_shares.values()):g}")
        if self.shortcut.kind != "none" and self.shortcut.label not in self.classes:
            raise ValueError(f"shortcut.label must be one of the classes {', '.join(self.classes)}")
        return self
