"""Class probabilities and labels come in; the numbers that describe a classifier go out.

Shape letters: N images, K classes. An undefined number (no image of a class) is None, never 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from xaibatch.options import Options


class CalibrationOptions(Options):
    num_bins: int = 15
    """Equally wide bins of the top probability (Guo et al. 2017)."""


def describe(
    probabilities_NK: NDArray[np.floating],
    labels_N: NDArray[np.int64],
    class_names: Sequence[str],
    calibration: CalibrationOptions | None = None,
) -> dict[str, Any]:
    """Every metric as plain numbers for JSON.

    accuracy, balanced_accuracy (mean recall of the classes present), auroc (mean over classes, one against the rest),
    ece (expected calibration error, 0 to 1), nll (nats); per class recall, precision, auroc and number;
    confusion: rows true, columns predicted.
    """
    confusion = confusion_matrix(probabilities_NK.argmax(1), labels_N, len(class_names))
    of_class = {
        name: {
            "num_images": int(confusion[k].sum()),
            "recall": _ratio(confusion[k, k], confusion[k].sum()),
            "precision": _ratio(confusion[k, k], confusion[:, k].sum()),
            "auroc": auroc(probabilities_NK[:, k], labels_N == k),
        }
        for k, name in enumerate(class_names)
    }
    return {
        "num_images": len(labels_N),
        "accuracy": _ratio(np.trace(confusion), len(labels_N)),
        "balanced_accuracy": _mean([row["recall"] for row in of_class.values()]),
        "auroc": _mean([row["auroc"] for row in of_class.values()]),
        "ece": expected_calibration_error(probabilities_NK, labels_N, calibration or CalibrationOptions()),
        "nll": _nll(probabilities_NK, labels_N),
        "per_class": of_class,
        "confusion": confusion.tolist(),
    }


def confusion_matrix(
    predicted_N: NDArray[np.integer], labels_N: NDArray[np.int64], num_classes: int
) -> NDArray[np.int64]:
    """Counts (K,K): rows true class, columns predicted class."""
    flat = np.bincount(labels_N * num_classes + predicted_N, minlength=num_classes**2)
    return np.asarray(flat.reshape(num_classes, num_classes), np.int64)


def auroc(scores_N: NDArray[np.floating], positive_N: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve: the Mann-Whitney statistic, ties count half. None if one side is empty.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    0.875
    """
    num_positive = int(positive_N.sum())
    num_negative = len(positive_N) - num_positive
    if num_positive == 0 or num_negative == 0:
        return None
    ranks = rankdata(scores_N)[positive_N].sum()
    return float((ranks - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def expected_calibration_error(
    probabilities_NK: NDArray[np.floating], labels_N: NDArray[np.int64], options: CalibrationOptions
) -> float | None:
    """Mean over images of |accuracy - confidence| of the image's bin; bins are half open to the left (Guo et al. 2017).

    0 is perfectly calibrated. None without images.
    """
    if len(labels_N) == 0:
        return None
    confidence = probabilities_NK.max(1).astype(np.float64)
    correct = (probabilities_NK.argmax(1) == labels_N).astype(np.float64)
    bins = np.clip(np.ceil(confidence * options.num_bins).astype(int) - 1, 0, options.num_bins - 1)
    gaps = np.bincount(bins, correct - confidence, options.num_bins)
    return float(np.abs(gaps).sum() / len(labels_N))


def _nll(probabilities_NK: NDArray[np.floating], labels_N: NDArray[np.int64]) -> float | None:
    if len(labels_N) == 0:
        return None
    chosen = probabilities_NK[np.arange(len(labels_N)), labels_N].astype(np.float64)
    return float(-np.log(np.maximum(chosen, np.finfo(np.float32).tiny)).mean())


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
