"""Records of a split come in; grey images of one size go out, decoded once and kept in memory as far as allowed.

Shape letters: B images, S side in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xaibatch.data.decode import ImageLimits, decode_in_quiet
from xaibatch.data.labels import label_indices
from xaibatch.data.preprocess import Preprocessing
from xaibatch.data.storage import ReadOptions, read_bytes
from xaibatch.errors import DataError, ImageError
from xaibatch.types import ImageRecord


class ImageStore:
    """The images of a split by position: uint8 grey, short side resized to `side`, centre square.

    Raises DataError for an image that cannot be used, naming it: a training set is mended, not guessed at.
    """

    def __init__(
        self, records: Sequence[ImageRecord], class_names: Sequence[str], *, side: int, cache_bytes: int
    ) -> None:
        self.records = tuple(records)
        self.ids = tuple(record.image_id for record in records)
        self.labels_N = label_indices([record.label for record in records], class_names)
        self.side = side
        self._view = Preprocessing(
            image_size=(side, side), resize_short=side, mean=(0.0,), std=(1.0,), channels=1, grey=True
        )
        self._kept: dict[int, np.ndarray] = {}
        self._num_kept = cache_bytes // (side * side)

    def __len__(self) -> int:
        return len(self.records)

    def images(self, positions: Sequence[int]) -> Tensor:
        """(B,S,S) uint8 of the images at these positions."""
        return torch.from_numpy(np.stack([self._image(position) for position in positions]))

    def labels(self, positions: Sequence[int]) -> Tensor:
        """(B,) int64 class indices."""
        return torch.from_numpy(self.labels_N[list(positions)])

    def mean_and_std(self, num_images: int = 400) -> tuple[float, float]:
        """Mean and standard deviation of grey over evenly spaced images, in units of the full range."""
        step = max(1, len(self) // num_images)
        sample = self.images(range(0, len(self), step)).float() / 255
        return round(sample.mean().item(), 4), round(sample.std().item(), 4)

    def _image(self, position: int) -> np.ndarray:
        if position in self._kept:
            return self._kept[position]
        record = self.records[position]
        try:
            decoded = decode_in_quiet(read_bytes(record.path, ReadOptions()), ImageLimits(), "window")
            grey = self._view.apply(decoded, np.float32)[0]
        except (ImageError, OSError) as error:
            raise DataError(f"training image {record.path!r} cannot be used: {error}") from None
        image = np.rint(grey * 255).clip(0, 255).astype(np.uint8)
        if len(self._kept) < self._num_kept:
            self._kept[position] = image
        return image
