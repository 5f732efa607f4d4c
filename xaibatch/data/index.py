"""What a reader of a layout returns: records with file sizes, before they become a `DataSet`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from xaibatch.data.storage import is_remote, join, parent
from xaibatch.data.table import is_table
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord

IMAGE_SUFFIXES: Final = frozenset(
    (
        ".png",
        ".jpg",
        ".jpeg",
        ".jfif",
        ".tif",
        ".tiff",
        ".bmp",
        ".gif",
        ".webp",
        ".jp2",
        ".j2k",
        ".pgm",
        ".ppm",
        ".pnm",
        ".dcm",
        ".dicom",
    )
)
"""File names that a folder listing takes for images, in any case; a manifest may name files of any suffix."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """A layout's records in any order.

    folder:        where the paths of masks and twins start; full path or URL, "" where there are none.
    sizes:         bytes by full path or URL of an image, mask or twin, where the listing told them.
    patients_from: what the patients were read from; None where they are unknown.
    notes:         what the user should know about how the set was read, one sentence each.
    """

    records: Sequence[ImageRecord]
    folder: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    patients_from: str | None = None
    notes: tuple[str, ...] = ()


def image_root(root: str) -> str:
    """The folder that the paths of a data set's images start at: what was opened, or the folder of the table that was.

    >>> image_root("s3://chest/manifest.csv"), image_root("/data/images")
    ('s3://chest', '/data/images')
    """
    return parent(root) if is_table(root) else root


def relative_to(root: str, path: str) -> str:
    """The path below `root`; as it is where it lies elsewhere.

    >>> relative_to("s3://chest/images", "s3://chest/images/p1/a.png"), relative_to("/data", "/other/a.png")
    ('p1/a.png', '/other/a.png')
    """
    return path.removeprefix(f"{root.rstrip('/')}/") if root else path


def located(root: str, path: str) -> str:
    """The full path or URL of what `relative_to` gave."""
    return path if not root or is_remote(path) or path.startswith("/") else join(root, path)


def is_image(relative: str) -> bool:
    """True for a file name that a folder listing takes for an image.

    >>> is_image("COVID-19/a.PNG"), is_image("notes.txt")
    (True, False)
    """
    name = relative.rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and (dot + suffix).lower() in IMAGE_SUFFIXES


def is_dicom_name(path: str) -> bool:
    """True for the suffixes of DICOM files."""
    return path.lower().endswith((".dcm", ".dicom"))


def split_name(text: str | None) -> str | None:
    """One spelling for the names of splits: `train`, `val`, `test`; others in lower case as they are.

    >>> split_name("Validation"), split_name("Test"), split_name("fold-3"), split_name("")
    ('val', 'test', 'fold-3', None)
    """
    name = (text or "").strip().lower()
    spelling = {"training": "train", "valid": "val", "validate": "val", "validation": "val", "testing": "test"}
    return spelling.get(name, name) or None


def require_columns(found: Sequence[str], needed: Sequence[str], where: str) -> None:
    """Raise DataError naming the columns found and needed where one is missing."""
    missing = [column for column in needed if column not in found]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(map(repr, missing))}. "
            f"Columns found: {', '.join(found) or 'none'}; needed: {', '.join(needed)}"
        )
