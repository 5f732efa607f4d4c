"""A path in, one frozen, sorted and checksummed `DataSet` out, whatever the layout of the files."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, Literal, get_args

from xaibatch.data.boxes import is_boxes
from xaibatch.data.chexpert import is_chexpert, read_chexpert, tables_in
from xaibatch.data.covid_qu_ex import part_root, read_covid_qu_ex
from xaibatch.data.findings import FindingOptions
from xaibatch.data.folder import read_folder
from xaibatch.data.index import Index, is_dicom_name, split_name
from xaibatch.data.manifest import MANIFEST_NAMES, NEEDED, read_manifest
from xaibatch.data.nih import entry_table, read_nih
from xaibatch.data.storage import (
    StoreError,
    absolute,
    is_file,
    is_folder,
    join,
    local_size,
    one_line,
    parent,
    read_bytes,
)
from xaibatch.data.table import columns_of, is_table
from xaibatch.errors import DataError, UnknownNameError
from xaibatch.types import ImageRecord

Layout = Literal["folder", "manifest", "covid-qu-ex", "nih", "chexpert"]

_READERS: Final = 16
_AT_ONCE: Final = 1024


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The index of a data set.

    records:       sorted by image id, each id once; paths are full paths or URLs.
    root:          what was opened, as a full path or URL.
    layout:        how it was read: one of `Layout`.
    class_names:   the labels found, sorted; empty for an unlabelled set.
    checksum:      SHA-256 (hex) over what `checksum_of` names; does not depend on where the set lies.
    patients_from: what patients were read from; None where they are unknown.
    notes:         what the user should know about how the set was read, one sentence each.
    """

    records: tuple[ImageRecord, ...]
    root: str
    layout: str
    class_names: tuple[str, ...]
    checksum: str
    checksum_of: str
    patients_from: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_images_per_class(self) -> Mapping[str, int]:
        """Images by label, in the order of `class_names`; images without label are not counted."""
        counts = Counter(record.label for record in self.records)
        return {name: counts[name] for name in self.class_names}


def open_dataset(
    path: str,
    *,
    layout: str = "auto",
    split: str | None = None,
    allow_outside_root: bool = False,
    contents: bool = False,
    findings: FindingOptions | None = None,
) -> DataSet:
    """Open a folder, a manifest or a known public data set; local or any fsspec URL.

    `layout`: `auto` looks at the files. `split` keeps one split (`train`, `val`, `test`, ...). `allow_outside_root`:
    a manifest may name files outside its own folder. `contents`: the checksum reads every image, mask and twin, instead
    of trusting sizes. `findings`: how a set with several findings an image becomes one with one class an image.

    Raises DataError for a path that does not exist, no images, an empty class folder, a missing column, ids
    that come twice, an unknown split, a store that fails while contents are read; UnknownNameError for an unknown
    layout.
    """
    if layout not in ("auto", *get_args(Layout)):
        raise UnknownNameError("layout", layout, ("auto", *get_args(Layout)))
    root = absolute(str(path))
    if not is_folder(root) and not is_file(root):
        raise DataError(f"nothing at {root!r}: give a folder of images, a manifest (.csv, .parquet) or an fsspec URL")
    chosen, place = (layout, root) if layout != "auto" else _recognised(root)
    index = _read(chosen, place, allow_outside_root, findings or FindingOptions())
    if not index.records:
        raise DataError(f"no images are left of {root!r}: {'; '.join(index.notes) or 'it lists none'}")
    records = tuple(sorted(index.records, key=lambda record: record.image_id))
    if any(is_dicom_name(record.path) for record in records) and find_spec("pydicom") is None:
        raise DataError("the data set holds DICOM files: pip install 'xaibatch[dicom]'")
    if split is not None:
        records = _of_split(records, split, root)
    digest, digest_of = checksum(records, index.sizes, contents=contents)
    return DataSet(
        records=records,
        root=root,
        layout=chosen,
        class_names=tuple(sorted({record.label for record in records if record.label is not None})),
        checksum=digest,
        checksum_of=digest_of,
        patients_from=index.patients_from,
        notes=index.notes,
    )


def checksum(records: Iterable[ImageRecord], sizes: Mapping[str, int], *, contents: bool = False) -> tuple[str, str]:
    """SHA-256 over the records in their order, and the words for what went into it.

    Ids and labels always; file sizes where the listing told them (`sizes`) or the file is local; with `contents` the
    bytes of every image, mask and twin (a file that cannot be read counts as empty; raises DataError where a store
    fails). Paths do not, so that a copied set has the same checksum.
    """
    records = tuple(records)
    digest = hashlib.sha256()

    def add(*fields: str) -> None:
        for text in fields:
            digest.update(f"{len(text.encode())}:{text}".encode())

    has_sizes = bool(sizes)
    hashes = _content_hashes(records) if contents else iter(())
    for record in records:
        size = sizes[record.image_id] if record.image_id in sizes else local_size(record.path)
        has_sizes = has_sizes or size >= 0
        add(record.image_id, record.label or "", str(size))
        if contents:
            add(*next(hashes))
    parts = ["ids", "labels", *(["sizes"] if has_sizes else []), *(["contents"] if contents else [])]
    return digest.hexdigest(), ", ".join(parts)


def _content_hashes(records: Sequence[ImageRecord]) -> Iterator[tuple[str, ...]]:
    """For each record SHA-256 (hex) of its image, masks (by name) and twin; many files are read at a time."""

    def hashed(record: ImageRecord) -> tuple[str, ...]:
        masks = [f"{name}:{_hash(path)}" for name, path in sorted(record.masks.items())]
        return (_hash(record.path), *masks, *([f"twin:{_hash(record.twin)}"] if record.twin else []))

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(records), _AT_ONCE):
            yield from pool.map(hashed, records[start : start + _AT_ONCE])


def _hash(path: str) -> str:
    if is_boxes(path):
        return hashlib.sha256(path.encode()).hexdigest()
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except StoreError as error:
        raise DataError(f"the checksum of the data's contents cannot be made: {one_line(error)}") from None
    except OSError:
        return hashlib.sha256(b"").hexdigest()


def _recognised(root: str) -> tuple[str, str]:
    """The layout that the files show, and the path its reader wants."""
    if is_file(root):
        if not is_table(root):
            raise DataError(f"{root!r} is one file, not a data set: give its folder, or a manifest (.csv, .parquet)")
        columns = columns_of(root)
        if "Image Index" in columns:
            return "nih", parent(root)
        return ("chexpert" if is_chexpert(columns) else "manifest"), root
    for name in MANIFEST_NAMES:
        path = join(root, name)
        if is_file(path) and {column.lower() for column in columns_of(path)} >= set(NEEDED):
            return "manifest", path
    if entry_table(root):
        return "nih", root
    tables = tables_in(root)
    if tables and all(is_chexpert(columns_of(path)) for path in tables):
        return "chexpert", root
    return ("covid-qu-ex" if part_root(root) else "folder"), root


def _read(layout: str, place: str, allow_outside_root: bool, findings: FindingOptions) -> Index:
    if layout == "manifest":
        return read_manifest(_manifest_in(place), allow_outside_root=allow_outside_root)
    if layout == "nih":
        return read_nih(place, findings)
    if layout == "chexpert":
        return read_chexpert(place, findings, allow_outside_root=allow_outside_root)
    return read_covid_qu_ex(place) if layout == "covid-qu-ex" else read_folder(place)


def _manifest_in(place: str) -> str:
    if not is_folder(place):
        return place
    for name in MANIFEST_NAMES:
        if is_file(join(place, name)):
            return join(place, name)
    raise DataError(f"no manifest in {place!r}: expected {' or '.join(MANIFEST_NAMES)}")


def _of_split(records: tuple[ImageRecord, ...], split: str, root: str) -> tuple[ImageRecord, ...]:
    wanted = split_name(split)
    kept = tuple(record for record in records if record.split == wanted)
    if not kept:
        found = sorted({record.split for record in records if record.split})
        known = f"its splits: {', '.join(found)}" if found else "it names no splits"
        raise DataError(f"no images of split {split!r} in {root!r}; {known}")
    return kept
