"""A data set comes in; train, val and test records go out, after a check that no patient is in two of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xaibatch.data.dataset import DataSet
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord

NAMES = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Labelled records of each split (test may be empty), classes in the order of the model's outputs, and notes of
    the data set and on its patients."""

    train: tuple[ImageRecord, ...]
    val: tuple[ImageRecord, ...]
    test: tuple[ImageRecord, ...]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def splits_of(dataset: DataSet) -> Splits:
    """Sort labelled records into splits.

    Raises DataError for missing splits, for leakage (`check_disjoint`), and for a class that train lacks.
    """
    by_split = {name: tuple(r for r in dataset.records if r.split == name and r.label is not None) for name in NAMES}
    missing = [name for name in ("train", "val") if not by_split[name]]
    if missing:
        found = sorted({record.split or "none" for record in dataset.records})
        raise DataError(
            f"no labelled images of split {' and '.join(missing)} in {dataset.root!r}; "
            f"splits found: {', '.join(found)}. "
            "Training needs train and val: a column `split` in the manifest, or folders train/CLASS and val/CLASS"
        )
    check_disjoint(by_split)
    classes = tuple(sorted({record.label for record in by_split["train"] if record.label is not None}))
    foreign = sorted({r.label for name in ("val", "test") for r in by_split[name] if r.label} - set(classes))
    if foreign or len(classes) < 2:
        raise DataError(f"train has classes {', '.join(classes)}; val or test also have {', '.join(foreign) or 'none'}")
    without = sum(record.patient is None for name in NAMES for record in by_split[name])
    unchecked = f"{without} images name no patient: that splits share no patient is not checked for them"
    notes = (*dataset.notes, *([unchecked] if without else []))
    return Splits(**by_split, class_names=classes, notes=notes)


def check_disjoint(by_split: Mapping[str, Sequence[ImageRecord]]) -> None:
    """Raise DataError if a patient, or a file, is in more than one split: scores would not be of unseen patients."""
    for what in ("patient", "path"):
        places: dict[str, set[str]] = defaultdict(set)
        for name, records in by_split.items():
            for record in records:
                if getattr(record, what) is not None:
                    places[getattr(record, what)].add(name)
        shared = sorted(name for name, splits in places.items() if len(splits) > 1)
        if shared:
            what = {"path": "file"}.get(what, what)
            examples = ", ".join(f"{name!r} in {' and '.join(sorted(places[name]))}" for name in shared[:3])
            raise DataError(
                f"{len(shared)} {what}{'s are' if len(shared) > 1 else ' is'} in more than one split ({examples}): "
                f"move all images of a {what} into one split"
            )


def class_weights(labels_N: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """Weights of the loss that make each class count the same: N / (K * count), mean 1 over the images.

    >>> class_weights(np.array([0, 0, 0, 1]), 2).round(3).tolist()
    [0.667, 2.0]
    """
    counts = np.bincount(labels_N, minlength=num_classes)
    return np.asarray(len(labels_N) / (num_classes * np.maximum(counts, 1)), np.float64)
