"""A folder of images in, records out: one sub-folder a class, with or without train/val/test folders above; or images
without labels.

Image ids are POSIX paths relative to the folder. Class folders may hold further folders. Files that are no images by
their name are left out.
"""

from collections.abc import Sequence
from dataclasses import replace

from xaibatch.data.index import Index, is_image, split_name
from xaibatch.data.manifest import MANIFEST_NAMES, read_manifest
from xaibatch.data.storage import FileEntry, is_file, join, list_files, parent, subfolders
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord

SPLITS = frozenset(("train", "val", "test"))


def read_folder(root: str) -> Index:
    """List the images under `root`.

    Where a `manifest.csv` (or `.parquet`) in the folder or the one above covers every image, its patients, splits,
    masks and twins are taken over; labels stay the folders' names. Raises DataError where there are no images, or
    none in one class folder.
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
    return _with_manifest(root, index)


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


def _with_manifest(root: str, index: Index) -> Index:
    """Take over what a manifest in the folder or the one above knows of every image; one that does not cover them all
    is not used."""
    for folder in (root, parent(root)):
        for name in MANIFEST_NAMES:
            path = join(folder, name)
            if not is_file(path):
                continue
            try:
                known = {record.path: record for record in read_manifest(path).records}
            except DataError:
                continue
            if all(record.path in known for record in index.records):
                records = [_joined(record, known[record.path]) for record in index.records]
                has_patients = any(record.patient is not None for record in records)
                where = name if folder == root else f"{name} in the folder above"
                patients_from = f"column patient of {where}" if has_patients else None
                return replace(index, records=records, folder=folder, patients_from=patients_from)
    return index


def _joined(record: ImageRecord, row: ImageRecord) -> ImageRecord:
    return replace(record, patient=row.patient, split=record.split or row.split, masks=row.masks, twin=row.twin)
