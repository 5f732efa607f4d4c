"""One image's item of a session's work; its outcomes in, one explainer's batch of maps or a row of `failures` out.

Shape letters: B images of a shard, C channels, H W pixels, h w a map's own sides, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xaibatch.seeding import DrawKey
from xaibatch.types import ExplanationBatch, Failure


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image to explain: one of the shard's or a changed copy, with its key; target -1: the predicted class."""

    image_CHW: Tensor
    key: DrawKey
    target: int


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What `Session._explain` returns for one item: logits, the class explained, and each explainer's map
    or error."""

    logits_K: NDArray[np.floating]
    target: int
    maps: dict[str, NDArray[np.floating]]
    extras: dict[str, dict[str, float]]
    errors: dict[str, str]


def stack(label: str, explained: Sequence[Explained]) -> ExplanationBatch:
    """Maps of one explainer in the order of the items, NaN where it failed."""
    known = next((outcome.maps[label] for outcome in explained if label in outcome.maps), np.full((1, 1), np.nan))
    blank = np.full(known.shape, np.nan, known.dtype)
    maps = [outcome.maps.get(label, blank) for outcome in explained]
    names = sorted({name for outcome in explained for name in outcome.extras.get(label, {})})
    return ExplanationBatch(
        explainer=label,
        maps_Bhw=np.stack(maps) if maps else np.empty((0, 1, 1)),
        targets_B=np.array([outcome.target for outcome in explained], np.int64),
        extras={
            name: np.array([outcome.extras.get(label, {}).get(name, np.nan) for outcome in explained]) for name in names
        },
    )


def explainer_failure(image_id: str, label: str, message: str) -> Failure:
    """The row of an explainer that failed on an image; `message` as in `Explained.errors`: kind, colon, text."""
    error, _, text = message.partition(": ")
    return Failure(image_id=image_id, stage=f"explain:{label}", error=error, message=text)
