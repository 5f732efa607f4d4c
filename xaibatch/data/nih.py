"""The folder of NIH ChestX-ray14 in, records with boxes as lesion masks out.

Wang et al., ChestX-ray8, CVPR 2017: `Data_Entry_2017.csv` (findings joined by `|`), images in any folders below, and
where they are there `BBox_List_2017.csv` (boxes of 984 findings, in the 1024x1024 pixels of the published images),
`test_list.txt` and `train_val_list.txt`. Image ids are the file names, which are unique.
"""

from collections import defaultdict
from typing import Final

from xaibatch.data.boxes import Box, boxes_text
from xaibatch.data.findings import FindingOptions, LabelChoice
from xaibatch.data.index import Index, is_image, require_columns
from xaibatch.data.storage import is_file, join, list_files, read_bytes
from xaibatch.data.table import Table, read_table
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord

ENTRY_NAMES: Final = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
BOX_NAME: Final = "BBox_List_2017.csv"
SPLIT_LISTS: Final = {"test": "test_list.txt", "train_val": "train_val_list.txt"}
SIDE: Final = 1024
"""Width and height in pixels of the published images, in which the boxes are drawn."""

SAME_FINDING: Final = {"Infiltrate": "Infiltration"}
"""Names of the box list that the entry list spells otherwise."""


def entry_table(root: str) -> str | None:
    """Path of the entry list in the folder, None where there is none."""
    return next((path for name in ENTRY_NAMES if is_file(path := join(root, name))), None)


def read_nih(root: str, options: FindingOptions) -> Index:
    """Read the folder. Images of the entry list that are not on disk are left out and counted.

    The mask `lesion` is the union of the boxes drawn for the image's own class. Raises DataError without entry list,
    without images on disk, or for a finding asked for that the list does not have.
    """
    path = entry_table(root)
    if path is None:
        raise DataError(f"no {ENTRY_NAMES[0]} in {root!r}: give the folder that holds it")
    table = read_table(path)
    require_columns(table.columns, ("Image Index", "Finding Labels", "Patient ID"), table.where)
    files = {entry.relative.rpartition("/")[2]: entry for entry in list_files(root) if is_image(entry.relative)}
    findings = sorted({name for row in table.rows for name in (row["Finding Labels"] or "").split("|") if name})
    _check_classes(options, findings, table)
    choice = LabelChoice(options, findings)
    boxes, splits = _boxes(root), _splits(root)
    records, num_missing = [], 0
    for row in table.rows:
        name = row["Image Index"] or ""
        if name not in files:
            num_missing += 1
            continue
        label = choice.label((row["Finding Labels"] or "").split("|"))
        if label is None:
            continue
        drawn = boxes.get((name, label))
        records.append(
            ImageRecord(
                image_id=name,
                path=files[name].path,
                label=label,
                patient=row["Patient ID"],
                split=splits.get(name),
                masks={"lesion": boxes_text(SIDE, SIDE, drawn)} if drawn else {},
            )
        )
    if num_missing == len(table.rows):
        raise DataError(f"none of the images that {table.where} lists lies under {root!r}: unpack them there")
    missing = (f"{num_missing} images of {table.where} are not on disk",) if num_missing else ()
    return Index(
        records=records,
        sizes={files[record.image_id].path: files[record.image_id].size for record in records},
        patients_from=f"column Patient ID of {table.where}",
        notes=(*missing, *choice.notes()),
    )


def _check_classes(options: FindingOptions, findings: list[str], table: Table) -> None:
    foreign = [name for name in options.classes or () if name not in findings]
    if foreign:
        raise DataError(
            f"{table.where} has no finding {', '.join(map(repr, foreign))}. Findings: {', '.join(findings)}"
        )


def _boxes(root: str) -> dict[tuple[str, str], list[Box]]:
    path = join(root, BOX_NAME)
    if not is_file(path):
        return {}
    table = read_table(path)
    # The header is written `Bbox [x,y,w,h]`, which a CSV reader takes for four columns.
    require_columns(table.columns, ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]"), table.where)
    boxes: dict[tuple[str, str], list[Box]] = defaultdict(list)
    for line, row in enumerate(table.rows, start=2):
        try:
            left, top, width, height = (float(row[name] or "") for name in ("Bbox [x", "y", "w", "h]"))
        except ValueError:
            raise DataError(f"{table.where}, row {line}: the box is not four numbers") from None
        finding = row["Finding Label"] or ""
        boxes[row["Image Index"] or "", SAME_FINDING.get(finding, finding)].append((left, top, width, height))
    return boxes


def _splits(root: str) -> dict[str, str]:
    splits: dict[str, str] = {}
    for split, name in SPLIT_LISTS.items():
        path = join(root, name)
        if is_file(path):
            splits |= dict.fromkeys(read_bytes(path).decode().split(), split)
    return splits
