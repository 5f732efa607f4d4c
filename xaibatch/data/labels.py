"""A data set's labels and a model's class names in, class indices out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xaibatch.errors import DataError


def label_indices(labels: Sequence[str | None], class_names: Sequence[str]) -> NDArray[np.int64]:
    """Return the class index of each label, -1 for None: an exact match, else one that differs in case only.

    Raises DataError with both lists for a label that the model does not have.

    >>> label_indices(["Normal", None, "covid-19"], ["COVID-19", "Normal"]).tolist()
    [1, -1, 0]
    """
    exact = {name: index for index, name in enumerate(class_names)}
    folded: dict[str, list[int]] = {}
    for index, name in enumerate(class_names):
        folded.setdefault(name.casefold(), []).append(index)

    def find(label: str) -> int | None:
        if label in exact:
            return exact[label]
        candidates = folded.get(label.casefold(), [])
        return candidates[0] if len(candidates) == 1 else None

    found = {label: find(label) for label in sorted({label for label in labels if label is not None})}
    foreign = [label for label, index in found.items() if index is None]
    if foreign:
        raise DataError(
            f"the data set has labels that the model does not know: {_listed(foreign)}. "
            f"Labels of the data: {_listed(list(found))}; classes of the model: {_listed(list(class_names))}. "
            "Rename the folders or labels, or name the model's classes in the order of its outputs: "
            '--set "model.class_names=[...]"'
        )
    indices = [-1 if label is None else found[label] for label in labels]
    return np.asarray(indices, np.int64)


def _listed(names: Sequence[str], limit: int = 20) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
