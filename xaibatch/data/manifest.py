"""A CSV or Parquet manifest in, records out.

Columns (in any case and order; others are left unread): `path` and `label` are needed; `image_id` or `id` (else the
path as written), `patient` or `patient_id`, `split`, `twin`, and masks as `mask_<name>` or `<name>_mask` (plain
`mask` is the `lesion` mask). A blank cell means unknown. Relative paths start at the manifest's folder, and no path
may leave that folder unless the caller allows it.
"""

import os
from collections import Counter

from xaibatch.data.boxes import is_boxes
from xaibatch.data.index import Index, require_columns, split_name
from xaibatch.data.storage import absolute, is_file, is_remote, join, parent
from xaibatch.data.table import Row, Table, columns_of, read_table
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord

NEEDED = ("path", "label")
MANIFEST_NAMES = ("manifest.csv", "manifest.parquet")
SIMULATION_RECORD = "simulation.json"
"""What `jobs/simulate.py` leaves beside the manifest of its images."""


def manifests_in(folder: str) -> tuple[str, ...]:
    """Paths of the files in the folder that are manifests by their name."""
    return tuple(path for name in MANIFEST_NAMES if is_file(path := join(folder, name)))


def is_manifest(path: str) -> bool:
    """True where the table at `path` has the needed columns. Raises DataError where it is no table."""
    return {column.lower() for column in columns_of(path)} >= set(NEEDED)


def simulation_notes(folder: str) -> tuple[str, ...]:
    """What is to be said of images in a folder that `jobs/simulate.py` wrote."""
    simulated = is_file(join(folder, SIMULATION_RECORD))
    return ("the images are simulated: synthetic, not for clinical use",) if simulated else ()


def read_manifest(path: str, *, allow_outside_root: bool = False) -> Index:
    """Read the manifest at `path`.

    Raises DataError for a missing column, a row without path, an id that comes twice, no rows, or a path outside the
    manifest's folder.
    """
    table = read_table(path)
    require_columns([column.lower() for column in table.columns], NEEDED, table.where)
    if not table.rows:
        raise DataError(f"{table.where} has no rows")
    root = Root(parent(path), allow_outside=allow_outside_root, where=table.where)
    records = tuple(_records(table, root))
    twice = [image_id for image_id, count in Counter(record.image_id for record in records).items() if count > 1]
    if twice:
        raise DataError(
            f"{table.where}: {len(twice)} image ids come more than once, for example {', '.join(map(repr, twice[:3]))}"
        )
    has_patients = any(record.patient is not None for record in records)
    return Index(
        records=records,
        folder=root.folder,
        patients_from=f"column patient of {table.where}" if has_patients else None,
        notes=simulation_notes(root.folder),
    )


class Root:
    """The folder that paths of a table start at and may not leave. Each folder on the way is looked up once."""

    def __init__(self, folder: str, *, allow_outside: bool, where: str) -> None:
        self.folder = folder
        self.allow_outside = allow_outside
        self.where = where
        self._real = folder if is_remote(folder) else os.path.realpath(folder)
        self._folders: dict[str, tuple[str, bool]] = {}

    def resolve(self, path: str, line: int) -> str:
        """The full path or URL of a table's path. Raises DataError where it leaves the folder, also through a link."""
        written, _, name = path.rpartition("/")
        if name in ("", ".", ".."):
            written, name = path, "."
        if written not in self._folders:
            self._folders[written] = self._folder(written, path.startswith("/"))
        folder, inside = self._folders[written]
        full = f"{folder.rstrip('/')}/{name}"
        if inside and not is_remote(full) and os.path.islink(full):  # noqa: PTH114
            inside = self._holds(os.path.realpath(full))
        if not inside and not self.allow_outside:
            raise DataError(
                f"{self.where}, row {line}: {path!r} lies outside the manifest's folder {self.folder!r}; "
                "move the file or the manifest, or set allow_outside_root"
            )
        return full

    def _folder(self, written: str, is_absolute: bool) -> tuple[str, bool]:
        """A folder as the table writes it: its full path or URL, and whether it is the root or lies in it."""
        full = absolute(f"{written}/") if is_absolute or "://" in written else join(self.folder, written or ".")
        if is_remote(full) or is_remote(self.folder):
            # `..` is resolved in relative paths only; written out behind a protocol it is refused.
            return full, self._holds(full) and ".." not in full.split("/")
        return full, self._holds(os.path.realpath(full))

    def _holds(self, real: str) -> bool:
        return real == self._real or real.startswith(self._real.rstrip("/") + "/")


def _records(table: Table, root: Root) -> list[ImageRecord]:
    names = {column.lower(): column for column in table.columns}
    masks: dict[str, str] = {}
    for column in table.columns:
        mask = _mask_name(column.lower())
        if mask and masks.setdefault(mask, column) != column:
            raise DataError(f"{table.where} has two columns for the mask {mask!r}: {masks[mask]!r} and {column!r}")

    def cell(row: Row, *columns: str) -> str | None:
        return next((row[names[column]] for column in columns if column in names and row[names[column]]), None)

    records = []
    for line, row in enumerate(table.rows, start=2):
        path = cell(row, "path")
        if path is None:
            raise DataError(f"{table.where}, row {line} has no path")
        twin = cell(row, "twin")
        records.append(
            ImageRecord(
                image_id=cell(row, "image_id", "id") or path,
                path=root.resolve(path, line),
                label=cell(row, "label"),
                patient=cell(row, "patient", "patient_id"),
                split=split_name(cell(row, "split")),
                masks={mask: _mask(value, root, line) for mask, column in masks.items() if (value := row[column])},
                twin=None if twin is None else root.resolve(twin, line),
            )
        )
    return records


def _mask_name(column: str) -> str | None:
    """`lung` for `lung_mask` and `mask_lung`, `lesion` for `mask`, None for a column that is no mask."""
    if column == "mask":
        return "lesion"
    return (
        column.removeprefix("mask_")
        if column.startswith("mask_")
        else column.removesuffix("_mask")
        if column.endswith("_mask")
        else None
    )


def _mask(value: str, root: Root, line: int) -> str:
    return value if is_boxes(value) else root.resolve(value, line)
