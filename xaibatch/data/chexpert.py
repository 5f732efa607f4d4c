"""A CheXpert-style CSV (or its folder) in, records out.

Irvin et al., CheXpert, AAAI 2019: a column `Path` and a column a finding, holding 1 (present), 0 (absent), -1
(uncertain) or nothing (not mentioned). Joined tables of MIMIC-CXR-JPG have the same findings: with a `Path` they are
read likewise, patient from `subject_id`, view from `ViewPosition`. Age and sex are left unread. Image ids are the
paths as written.
"""

import re
from collections.abc import Sequence
from typing import Final

from xaibatch.data.findings import FindingOptions, LabelChoice
from xaibatch.data.index import Index, require_columns, split_name
from xaibatch.data.manifest import Root
from xaibatch.data.storage import is_file, is_folder, join, parent
from xaibatch.data.table import Row, Table, read_table
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord

FINDINGS: Final = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
TABLE_NAMES: Final = ("train.csv", "valid.csv", "test.csv")
SPLITS: Final = ("train", "val", "test")
PATIENT: Final = re.compile(r"(?:^|/)(patient\d+|p\d{8})/")
"""Folder of a patient: `patient00001` in CheXpert, `p10000032` in MIMIC-CXR."""


def is_chexpert(columns: Sequence[str]) -> bool:
    """True for the columns of such a table: a `Path` and at least one of the findings."""
    return "Path" in columns and any(name in columns for name in FINDINGS)


def tables_in(root: str) -> tuple[str, ...]:
    """Paths of the tables in the folder."""
    return tuple(path for name in TABLE_NAMES if is_file(path := join(root, name)))


def read_chexpert(place: str, options: FindingOptions, *, allow_outside_root: bool = False) -> Index:
    """Read one table, or every `train.csv`, `valid.csv` and `test.csv` of a folder.

    Raises DataError for a missing column, a value that is none of 1, 0, -1 and blank, an image twice, a path outside
    the table's folder, or a table whose first image lies neither at its path nor at the path without its first
    folder.
    """
    paths = tables_in(place) if is_folder(place) else (place,)
    if not paths:
        raise DataError(f"no {', '.join(TABLE_NAMES)} in {place!r}: give the folder that holds one, or a CSV file")
    records: dict[str, ImageRecord] = {}
    notes: list[str] = []
    for path in paths:
        table = read_table(path)
        findings = _findings(table, options)
        choice = LabelChoice(options, findings)
        for record in _records(table, path, choice, findings, allow_outside_root):
            if record.image_id in records:
                raise DataError(f"{table.where}: {record.image_id!r} comes more than once")
            records[record.image_id] = record
        notes += [f"{table.where}: {note}" for note in choice.notes()]
    has_patients = any(record.patient for record in records.values())
    return Index(
        records=tuple(records.values()),
        patients_from="column subject_id or the patient's folder" if has_patients else None,
        notes=tuple(notes),
    )


def _findings(table: Table, options: FindingOptions) -> tuple[str, ...]:
    require_columns(table.columns, ("Path", *(options.classes or ())), table.where)
    findings = options.classes or tuple(name for name in FINDINGS if name in table.columns)
    if not findings:
        raise DataError(
            f"{table.where} has no column of a finding. Columns found: {', '.join(table.columns)}; "
            f"known findings: {', '.join(FINDINGS)}"
        )
    if not table.rows:
        raise DataError(f"{table.where} has no rows")
    return findings


def _records(
    table: Table, path: str, choice: LabelChoice, findings: Sequence[str], allow_outside_root: bool
) -> list[ImageRecord]:
    root = Root(parent(path), allow_outside=allow_outside_root, where=table.where)
    num_dropped = _num_folders_to_drop(table, root)
    named = split_name(table.where.rpartition(".")[0])
    records = []
    for line, row in enumerate(table.rows, start=2):
        written = row["Path"]
        if written is None:
            raise DataError(f"{table.where}, row {line} has no Path")
        if choice.options.frontal_only and not _is_frontal(row):
            choice.left_out["a lateral view"] += 1
            continue
        marks = {name: _mark(row[name], table, line, name) for name in findings}
        label = choice.label(
            [name for name, mark in marks.items() if mark == 1], [name for name, mark in marks.items() if mark == -1]
        )
        if label is None:
            continue
        folder = PATIENT.search(written)
        records.append(
            ImageRecord(
                image_id=written,
                path=root.resolve(written.split("/", num_dropped)[-1], line),
                label=label,
                patient=row.get("subject_id") or (folder.group(1) if folder else None),
                split=split_name(row.get("split")) or (named if named in SPLITS else None),
            )
        )
    return records


def _num_folders_to_drop(table: Table, root: Root) -> int:
    """0, or 1 where the paths start with the published name of the folder that the table lies in."""
    first = table.rows[0]["Path"] or ""
    for number in (0, 1):
        if is_file(root.resolve(first.split("/", number)[-1], 2)):
            return number
    tried = " nor ".join(repr(join(root.folder, first.split("/", number)[-1])) for number in (0, 1))
    raise DataError(f"{table.where}: its first image lies neither at {tried}: put the table beside the image folders")


def _is_frontal(row: Row) -> bool:
    view = row.get("Frontal/Lateral") or row.get("ViewPosition")
    return view is None or view.upper() in ("FRONTAL", "AP", "PA")


def _mark(value: str | None, table: Table, line: int, finding: str) -> int | None:
    try:
        mark = None if value is None else float(value)
    except ValueError:
        mark = float("nan")
    if mark not in (None, 1, 0, -1):
        raise DataError(f"{table.where}, row {line}: {finding} is {value!r}, expected 1, 0, -1 or nothing")
    return None if mark is None else int(mark)
