"""A shard's records in, one preprocessed `ImageBatch` and the failures out; what a replica and a score task both call.

Shape letters: B images, C channels, H W pixels.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import DTypeLike, NDArray

from xaibatch.data.boxes import boxes_mask, is_boxes
from xaibatch.data.decode import DecodedImage, ImageLimits, decode_in_quiet, mask_in_quiet
from xaibatch.data.labels import label_indices
from xaibatch.data.preprocess import Preprocessing
from xaibatch.data.storage import ReadOptions, StoreError, one_line, read_bytes
from xaibatch.errors import ImageError
from xaibatch.types import Failure, ImageBatch, ImageRecord, Shard


def load_shard(
    shard: Shard,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    *,
    with_masks: bool = False,
    with_twins: bool = False,
    dtype: DTypeLike = np.float32,
    limits: ImageLimits | None = None,
    reading: ReadOptions | None = None,
    roots: Sequence[str] = (),
) -> tuple[ImageBatch, tuple[Failure, ...]]:
    """Read, decode and preprocess a shard's images, in the shard's order.

    `with_masks` reads every mask that the shard's records name, each (B,H,W) bool with `has_mask` (B,). An image that
    cannot be used is left out and becomes one Failure of stage `read`. A mask or twin that cannot be used leaves its
    image in: it counts as missing (NaN twin) and becomes a Failure of stage `mask` or `twin`. Images are in `dtype`;
    an empty batch has B = 0.

    `roots` are local paths without which nothing can be read: while one of them is away, so may be any file.

    Raises DataError for a label that `class_names` does not have, and StoreError where a store fails again and again
    or is not mounted: that says nothing about the images, so the shard is to be read another time.
    """
    labels_B = label_indices([record.label for record in shard.records], class_names)
    reader = _Reader(
        preprocessing=preprocessing,
        masks=tuple(sorted({name for record in shard.records for name in record.masks})) if with_masks else (),
        with_twins=with_twins,
        dtype=np.dtype(dtype),
        limits=limits or ImageLimits(),
        reading=reading or ReadOptions(),
        roots=tuple(roots),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = list(map(reader.load, shard.records))
    failures = tuple(failure for item in loaded for failure in item.failures)
    kept = [index for index, item in enumerate(loaded) if item.image_CHW is not None]
    return _batch(shard, loaded, kept, labels_B, reader), failures


@dataclass(slots=True)
class _Loaded:
    """One record's arrays; `image_CHW` is None where the image cannot be used."""

    image_CHW: NDArray[np.floating] | None = None
    twin_CHW: NDArray[np.floating] | None = None
    masks: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    preprocessing: Preprocessing
    masks: tuple[str, ...]
    with_twins: bool
    dtype: np.dtype
    limits: ImageLimits
    reading: ReadOptions
    roots: tuple[str, ...]

    def load(self, record: ImageRecord) -> _Loaded:
        loaded = _Loaded()
        try:
            image = self._decoded(record.path)
            loaded.image_CHW = self.preprocessing.apply(image, self.dtype)
        except StoreError:
            raise
        except (ImageError, OSError) as error:
            loaded.failures.append(_failure(record, "read", error))
            return loaded
        size = image.values.shape[0], image.values.shape[1]
        for name in self.masks:
            if name in record.masks:
                try:
                    loaded.masks[name] = self._mask(record.masks[name], size)
                except StoreError:
                    raise
                except (ImageError, OSError) as error:
                    loaded.failures.append(_failure(record, "mask", error, f"{name} mask: "))
        if self.with_twins and record.twin is not None:
            try:
                twin = self._decoded(record.twin)
                if twin.values.shape[:2] != size:
                    raise ImageError(f"its size {_text(twin.values.shape[:2])} differs from the image's {_text(size)}")
                loaded.twin_CHW = self.preprocessing.apply(twin, self.dtype, image_of_twin=image)
            except StoreError:
                raise
            except (ImageError, OSError) as error:
                loaded.failures.append(_failure(record, "twin", error, "twin: "))
        return loaded

    def _decoded(self, path: str) -> DecodedImage:
        return decode_in_quiet(self._bytes(path), self.limits, self.preprocessing.dicom_range)

    def _bytes(self, path: str) -> bytes:
        return read_bytes(path, self.reading, self.roots)

    def _mask(self, path: str, size: tuple[int, int]) -> NDArray[np.bool_]:
        if is_boxes(path):
            return self.preprocessing.apply_mask(boxes_mask(path, size))
        mask_HW = mask_in_quiet(self._bytes(path), self.limits)
        if mask_HW.shape != size:
            # A mask may be stored at another size than its image, but not with other proportions (one pixel of
            # rounding is fine).
            (height, width), (rows, columns) = size, mask_HW.shape
            if abs(height * columns - width * rows) > max(height, width, rows, columns):
                raise ImageError(
                    f"its size {_text(mask_HW.shape)} has other proportions than the image's {_text(size)}"
                )
            mask_HW = resized_mask(mask_HW, size)
        return self.preprocessing.apply_mask(mask_HW)


def resized_mask(mask_HW: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask at `size` (height, width), nearest neighbour with half-pixel centres."""
    rows, columns = (
        np.minimum(((np.arange(wanted) + 0.5) * have / wanted).astype(np.int64), have - 1)
        for wanted, have in zip(size, mask_HW.shape, strict=True)
    )
    return mask_HW[np.ix_(rows, columns)]


def _batch(
    shard: Shard, loaded: Sequence[_Loaded], kept: Sequence[int], labels_B: NDArray[np.int64], reader: _Reader
) -> ImageBatch:
    height, width = reader.preprocessing.image_size
    shape_CHW = (reader.preprocessing.channels, height, width)
    images = np.empty((len(kept), *shape_CHW), reader.dtype)
    has_twins = reader.with_twins and any(record.twin is not None for record in shard.records)
    twins = np.full(images.shape, np.nan, reader.dtype) if has_twins else None
    masks = {name: np.zeros((len(kept), height, width), np.bool_) for name in reader.masks}
    has_mask = {name: np.zeros(len(kept), np.bool_) for name in reader.masks}
    for row, index in enumerate(kept):
        item = loaded[index]
        images[row] = item.image_CHW
        if twins is not None and item.twin_CHW is not None:
            twins[row] = item.twin_CHW
        for name, mask_HW in item.masks.items():
            masks[name][row] = mask_HW
            has_mask[name][row] = True
    records = [shard.records[index] for index in kept]
    return ImageBatch(
        ids=tuple(record.image_id for record in records),
        images_BCHW=images,
        labels_B=labels_B[list(kept)],
        patients=tuple(record.patient for record in records),
        masks=masks,
        has_mask=has_mask,
        twins_BCHW=twins,
    )


def _failure(record: ImageRecord, stage: str, error: ImageError | OSError, prefix: str = "") -> Failure:
    if isinstance(error, FileNotFoundError):
        message = "the file does not exist"
    elif isinstance(error, OSError):
        message = f"the file cannot be read: {error.strerror or one_line(error)}"
    else:
        message = one_line(error)
    return Failure(image_id=record.image_id, stage=stage, error=type(error).__name__, message=prefix + message)


def _text(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
