"""A data set's records in, one SHA-256 out that changes whenever a row of a run could: what is known of an image, not
where it lies."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from xaibatch.data.boxes import is_boxes
from xaibatch.data.index import Index
from xaibatch.data.storage import StoreError, local_size, one_line, read_bytes
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord

_READERS: Final = 16
_AT_ONCE: Final = 1024


def checksum(records: Iterable[ImageRecord], index: Index, *, contents: bool = False) -> tuple[str, str]:
    """SHA-256 (hex) over the records in their order, and the words for what went into it.

    Ids, labels, patients, splits, masks (name and boxes, or name and path) and twins always; sizes of images, masks
    and twins where the listing told them (`index.sizes`) or the file is local; with `contents` the bytes of every
    image, mask and twin (a file that cannot be read counts as empty; raises DataError where a store fails). Paths of
    masks and twins count from `index.folder`, those outside it by their file names, so that a copied set has the same
    checksum.
    """
    records = tuple(records)
    digest = hashlib.sha256()
    has_sizes = bool(index.sizes)
    hashes = _content_hashes(records) if contents else iter(())
    for record in records:
        size, *further = [_size(path, index) for path in _files(record)]
        has_sizes = has_sizes or size >= 0
        row: list[Any] = [record.image_id, record.label, record.patient, record.split, size, further]
        row.append({name: _place(path, index.folder) for name, path in record.masks.items()})
        row.append(None if record.twin is None else _place(record.twin, index.folder))
        row.extend(next(hashes, ()))
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    always = ["ids", "labels", "patients", "splits", "masks", "twins"]
    return digest.hexdigest(), ", ".join([*always, *["sizes"] * has_sizes, *["contents"] * contents])


def _files(record: ImageRecord) -> tuple[str, ...]:
    """Paths of the image, its masks (by name; boxes as their text) and its twin."""
    masks = [path for _, path in sorted(record.masks.items())]
    return (record.path, *masks, *([] if record.twin is None else [record.twin]))


def _place(path: str, folder: str) -> str:
    """A path in words that hold at any place: below `folder`, else the file's name; boxes as they are."""
    if is_boxes(path):
        return path
    above = f"{folder.rstrip('/')}/"
    return path.removeprefix(above) if path.startswith(above) else path.rpartition("/")[2]


def _size(path: str, index: Index) -> int:
    """Bytes of a file, -1 where nobody told them or the path is a text of boxes."""
    if path in index.sizes:
        return index.sizes[path]
    return -1 if is_boxes(path) else local_size(path)


def _content_hashes(records: Sequence[ImageRecord]) -> Iterator[tuple[str, ...]]:
    """For each record SHA-256 (hex) of its image, masks (by name) and twin; many files are read at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(records), _AT_ONCE):
            chunk = records[start : start + _AT_ONCE]
            yield from pool.map(lambda record: tuple(map(_hash, _files(record))), chunk)


def _hash(path: str) -> str:
    if is_boxes(path):
        return ""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except StoreError as error:
        raise DataError(f"the checksum of the data's contents cannot be made: {one_line(error)}") from None
    except OSError:
        return hashlib.sha256(b"").hexdigest()
