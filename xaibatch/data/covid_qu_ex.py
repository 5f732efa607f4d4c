"""The folders of COVID-QU-Ex in, records with lung and infection masks out.

Tahir et al., COVID-QU-Ex, 2021 (Kaggle `anasmohammedtahir/covidqu`): two parts, `Lung Segmentation Data` and
`Infection Segmentation Data`, each with `Train`, `Val`, `Test`; under these `COVID-19`, `Non-COVID`, `Normal`; under
these `images`, `lung masks` and, in the infection part, `infection masks`, with equal file names. The infection mask
becomes the mask `lesion`, the lung mask `lung`. Image ids are paths below the part, so that masks and their images
differ.
"""

from collections import defaultdict
from typing import Final

from xaibatch.data.index import Index, is_image, split_name
from xaibatch.data.storage import join, list_files, subfolders
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord

PARTS: Final = ("Infection Segmentation Data", "Lung Segmentation Data")
MASK_FOLDERS: Final = {"lung masks": "lung", "infection masks": "lesion"}
SPLITS: Final = frozenset(("train", "val", "test"))


def part_root(root: str) -> str | None:
    """The folder that holds the splits: `root` or one below it, None where the tree has another shape.

    Raises DataError where `root` holds both parts, which share images.
    """
    folders = subfolders(root)
    parts = [name for name in PARTS if name in folders]
    if len(parts) == 2:
        choices = " or ".join(repr(join(root, name)) for name in parts)
        raise DataError(f"{root!r} holds both parts of COVID-QU-Ex, which share images: give {choices}")
    if parts:
        return part_root(join(root, parts[0]))
    for folder in folders:
        if split_name(folder) in SPLITS:
            split = join(root, folder)
            has_images = any("images" in subfolders(join(split, name)) for name in subfolders(split))
            return root if has_images else None
    return None


def read_covid_qu_ex(root: str) -> Index:
    """Read one part of the set. Images without a mask are kept and counted.

    Raises DataError for a tree of another shape, both parts at once, or a class folder without images.
    """
    place = part_root(root)
    if place is None:
        raise DataError(
            f"{root!r} has not the shape of COVID-QU-Ex: expected Train, Val, Test; in these COVID-19, Non-COVID, "
            "Normal; in these images and lung masks"
        )
    masks: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    images, sizes = [], {}
    for entry in list_files(place):
        parts = entry.relative.split("/")
        if len(parts) != 4 or split_name(parts[0]) not in SPLITS or not is_image(entry.relative):
            continue
        split, label, kind, name = parts
        stem = name.rpartition(".")[0]
        sizes[entry.path] = entry.size
        if kind.lower() == "images":
            images.append((entry, split, label, stem))
        elif kind.lower() in MASK_FOLDERS:
            masks[split, label, stem][MASK_FOLDERS[kind.lower()]] = entry.path
    _check_classes(place, {(split, label) for _, split, label, _ in images})
    records = [
        ImageRecord(
            image_id=entry.relative,
            path=entry.path,
            label=label,
            split=split_name(split),
            masks=masks.get((split, label, stem), {}),
        )
        for entry, split, label, stem in images
    ]
    num_bare = sum("lung" not in record.masks for record in records)
    return Index(
        records=records,
        folder=place,
        sizes=sizes,
        notes=(f"{num_bare} images have no lung mask",) if num_bare else (),
    )


def _check_classes(place: str, filled: set[tuple[str, str]]) -> None:
    splits = [folder for folder in subfolders(place) if split_name(folder) in SPLITS]
    empty = [
        f"{split}/{label}"
        for split in splits
        for label in subfolders(join(place, split))
        if (split, label) not in filled
    ]
    if empty:
        raise DataError(f"no images in the class folder {', '.join(map(repr, empty))} of {place!r}")
