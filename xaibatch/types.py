"""The few frozen records that flow between the stages; NumPy only, so that score tasks need no torch.

Shape letters: B images, C channels, H W pixels, g token-grid side, K classes, S samples of a plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

OK: Final = "ok"
"""Status of a defined score."""

ALL_ZERO_MAP: Final = "all_zero_map"
NAN_MAP: Final = "nan_map"
ZERO_DENOMINATOR: Final = "zero_denominator"
MISSING_MASK: Final = "missing_mask"
CHANGED_PREDICTION: Final = "changed_prediction"
MISSING_LABEL: Final = "missing_label"
MISSING_TWIN: Final = "missing_twin"
NEGATIVE_MAP: Final = "negative_map"
"""The map has negative values, for which the metric is not defined."""
ERROR: Final = "error"
"""The last of the statuses that a row of `scores` may carry; all but `ok` come with a null score and a reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One line of a data set's index: where an image is and what is known of it.

    `image_id` is stable and unique in the data set (relative path for folders); `masks` maps a mask's name
    (`lesion`, `lung`, ...) to its path; `twin` is the path of the lesion-free twin where there is one.
    """

    image_id: str
    path: str
    label: str | None = None
    patient: str | None = None
    split: str | None = None
    masks: Mapping[str, str] = field(default_factory=dict)
    twin: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A consecutive run of the sorted index; the unit of work that a replica holds."""

    index: int
    records: tuple[ImageRecord, ...]

    @property
    def name(self) -> str:
        return f"shard-{self.index:05d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBatch:
    """A shard's readable images after preprocessing.

    images_BCHW: float32 (float64 under `--precision float64`), normalised as the model expects.
    labels_B:    int64 class index of the true label, -1 where unknown.
    masks:       name -> bool (B,H,W), preprocessed with the image's own geometry; `has_mask` says for which images.
    twins_BCHW:  lesion-free twins, same preprocessing (NaN image where an image has none); None if the set has none.
    """

    ids: tuple[str, ...]
    images_BCHW: NDArray[np.floating]
    labels_B: NDArray[np.int64]
    patients: tuple[str | None, ...] = ()
    masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    has_mask: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    twins_BCHW: NDArray[np.floating] | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An image (or cell) that could not be processed: one row in `failures`."""

    image_id: str
    stage: str
    error: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplanationBatch:
    """The maps of one explainer for one shard, in the explainer's own granularity.

    maps_Bhw:  (B,g,g) for token-level explainers, (B,H,W) for pixel- and segment-level ones; sign as the explainer
               declares (positive: raises the target's logit).
    targets_B: explained class index per image.
    extras:    per-image diagnostics, e.g. `r2` of LIME's local fit, float64 (B,).
    """

    explainer: str
    maps_Bhw: NDArray[np.floating]
    targets_B: NDArray[np.int64]
    extras: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One value of one metric for one map. `value` is None exactly where `status` is not `ok`."""

    image_id: str
    explainer: str
    metric: str
    repeat: int
    value: float | None
    status: str = OK
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.status == OK):
            raise ValueError(f"a score is null exactly when its status is not ok: {self}")
