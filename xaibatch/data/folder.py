"""A folder of images in, records out: one sub-folder a class, with or without train/val/test folders above; or images
without labels.

Image ids are POSIX paths relative to the folder. Class folders may hold further folders. Files that are no images by
their name are left out.
"""

from collections.abc import Sequence
from dataclasses import replace

from xaibatch.data.index import Index, is_image, split_name
from xaibatch.data.manifest import is_manifest, manifests_in, read_manifest, simulation_notes
from xaibatch.data.storage import FileEntry, join, list_files, parent, subfolders
from xaibatch.data.table import read_table
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord

SPLITS = frozenset(("train", "val", "test"))


def read_folder(root: str, *, allow_outside_root: bool = False) -> Index:
    """List the images under `root`.

    Where a `manifest.csv` (or `.parquet`) in the folder or the one above lists some of the images, their patients,
    splits, masks and twins are taken over; labels stay the folders' names. The notes say which images it lacks, and
    which manifest is not used. Raises DataError where there are no images, or none in one class folder, or where a
    manifest that lists some of them cannot be read: without its patients, images would count as independent.
    """
    files = list_files(root)
    images = [file for file in files if is_image(file.relative)]
    if not images:
        raise DataError(
            f"no images under {root!r}: expected one sub-folder a class, or images "
            "(by their suffix: .png, .jpg, .tif, .dcm, ...)"
        )
    folders = subfolders(root)
    by_split = bool(folders) and all(split_name(folder) in SPLITS for folder in folders)
    _check_classes(root, images, folders, by_split)
    records = [_record(file, by_split) for file in images]
    index = Index(
        records=records, sizes={file.path: file.size for file in images}, notes=_notes(len(files), len(images))
    )
    return _with_manifest(root, index, allow_outside_root)


def _record(file: FileEntry, by_split: bool) -> ImageRecord:
    folders = file.relative.split("/")[:-1]
    split = split_name(folders.pop(0)) if by_split and folders else None
    return ImageRecord(image_id=file.relative, path=file.path, label=folders[0] if folders else None, split=split)


def _check_classes(root: str, images: Sequence[FileEntry], folders: Sequence[str], by_split: bool) -> None:
    depth = 2 if by_split else 1
    classes = (
        [f"{folder}/{name}" for folder in folders for name in subfolders(join(root, folder))] if by_split else folders
    )
    filled = {"/".join(file.relative.split("/")[:depth]) for file in images if file.relative.count("/") >= depth}
    empty = [name for name in classes if name not in filled]
    if empty:
        raise DataError(
            f"no images in the class folder {', '.join(map(repr, empty))} of {root!r}: add images or remove the folder"
        )


def _notes(num_files: int, num_images: int) -> tuple[str, ...]:
    ignored = num_files - num_images
    return (f"{ignored} files that are no images by their name were left out",) if ignored else ()


def _with_manifest(root: str, index: Index, allow_outside_root: bool) -> Index:
    """Take over what the first manifest that lists images of the folder knows of them; what a manifest says of all its
    films holds of a folder of its twins too."""
    notes = [*index.notes, *simulation_notes(root)]
    for path in (*manifests_in(root), *manifests_in(parent(root))):
        folder, _, name = path.rpartition("/")
        where = name if folder == root else f"{name} in the folder above"
        try:
            if not is_manifest(path):
                notes.append(f"{where} is not used: it has no columns path and label")
                continue
            manifest = read_manifest(path, allow_outside_root=allow_outside_root)
        except DataError as error:
            if _may_list(path, index.records):
                raise DataError(
                    f"{where} belongs to the images of {root!r} but cannot be used: {error}. Mend it, or rename it to "
                    "do without its patients, splits, masks and twins"
                ) from None
            notes.append(f"{where} is not used: it lists none of the images, and cannot be read ({error})")
            continue
        known = {record.path: record for record in manifest.records}
        films = known.keys() | {record.twin for record in manifest.records}
        if any(record.path in films for record in index.records):
            notes += [note for note in manifest.notes if note not in notes]
        records = [_joined(record, known.get(record.path)) for record in index.records]
        num_missing = sum(record.path not in known for record in index.records)
        if num_missing == len(records):
            notes.append(f"{where} is not used: it lists none of the images")
            continue
        if num_missing:
            notes.append(
                f"{where} lacks {num_missing} of {len(records)} images: their patients, masks and twins are unknown"
            )
        has_patients = any(record.patient is not None for record in records)
        patients_from = f"column patient of {where}" if has_patients else None
        return replace(index, records=records, folder=folder, patients_from=patients_from, notes=tuple(notes))
    return replace(index, notes=tuple(notes))


def _may_list(path: str, records: Sequence[ImageRecord]) -> bool:
    """Whether a manifest that `read_manifest` refuses names one of the images; True where it is no table at all."""
    try:
        table = read_table(path)
    except DataError:
        return True
    column = next(name for name in table.columns if name.lower() == "path")
    listed = {join(parent(path), written) for row in table.rows if (written := row[column])}
    return any(record.path in listed for record in records)


def _joined(record: ImageRecord, row: ImageRecord | None) -> ImageRecord:
    if row is None:
        return record
    return replace(record, patient=row.patient, split=record.split or row.split, masks=row.masks, twin=row.twin)
