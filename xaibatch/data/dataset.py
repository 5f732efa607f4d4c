"""A path in, one frozen, sorted and checksummed `DataSet` out, whatever the layout of the files."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from xaibatch.data.checksum import checksum
from xaibatch.data.chexpert import is_chexpert, read_chexpert, tables_in
from xaibatch.data.covid_qu_ex import part_root, read_covid_qu_ex
from xaibatch.data.findings import FindingOptions
from xaibatch.data.folder import read_folder
from xaibatch.data.index import Index, is_dicom_name, split_name
from xaibatch.data.manifest import MANIFEST_NAMES, is_manifest, manifests_in, read_manifest
from xaibatch.data.nih import entry_table, read_nih
from xaibatch.data.storage import absolute, is_file, is_folder, parent
from xaibatch.data.table import columns_of, is_table
from xaibatch.errors import DataError, UnknownNameError
from xaibatch.types import ImageRecord

Layout = Literal["folder", "manifest", "covid-qu-ex", "nih", "chexpert"]


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

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Names of the masks that at least one image has, sorted."""
        return tuple(sorted({name for record in self.records for name in record.masks}))


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
    digest, digest_of = checksum(records, index, contents=contents)
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


def _recognised(root: str) -> tuple[str, str]:
    """The layout that the files show, and the path its reader wants."""
    if is_file(root):
        if not is_table(root):
            raise DataError(f"{root!r} is one file, not a data set: give its folder, or a manifest (.csv, .parquet)")
        columns = columns_of(root)
        if "Image Index" in columns:
            return "nih", parent(root)
        return ("chexpert" if is_chexpert(columns) else "manifest"), root
    for path in manifests_in(root):
        if is_manifest(path):
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
    if layout == "covid-qu-ex":
        return read_covid_qu_ex(place)
    return read_folder(place, allow_outside_root=allow_outside_root)


def _manifest_in(place: str) -> str:
    if not is_folder(place):
        return place
    found = manifests_in(place)
    if found:
        return found[0]
    raise DataError(f"no manifest in {place!r}: expected {' or '.join(MANIFEST_NAMES)}")


def _of_split(records: tuple[ImageRecord, ...], split: str, root: str) -> tuple[ImageRecord, ...]:
    wanted = split_name(split)
    kept = tuple(record for record in records if record.split == wanted)
    if not kept:
        found = sorted({record.split for record in records if record.split})
        known = f"its splits: {', '.join(found)}" if found else "it names no splits"
        raise DataError(f"no images of split {split!r} in {root!r}; {known}")
    return kept
