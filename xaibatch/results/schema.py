"""Arrow schemas of the four tables of a run, and the conversion of the flowing records into them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from xaibatch.types import Failure, Score

_NAME = pa.dictionary(pa.int32(), pa.string())

SCORES = pa.schema(
    [
        ("run", _NAME),
        ("image_id", _NAME),
        ("patient", _NAME),
        ("label", _NAME),
        ("target", _NAME),
        ("predicted", _NAME),
        ("explainer", _NAME),
        ("metric", _NAME),
        ("repeat", pa.int32()),
        ("score", pa.float64()),
        ("status", _NAME),
        ("reason", _NAME),
    ]
)
"""One row a (image, explainer, metric, repeat); `score` is null exactly where `status` is not `ok`."""

PREDICTIONS = pa.schema(
    [
        ("run", _NAME),
        ("image_id", pa.string()),
        ("patient", pa.string()),
        ("label", _NAME),
        ("predicted", _NAME),
        ("correct", pa.bool_()),
        ("probabilities", pa.list_(pa.float64())),
        ("logits", pa.list_(pa.float64())),
        ("path", pa.string()),
    ]
)
"""One row an image: the model's output on the image itself, classes in the order of `run.json`; `path` below the data's
root that `run.json` names (whole where it lies outside). Probabilities are the logits' softmax, of a single logit the
sigmoid; a model of one output predicts no class without a threshold, so `predicted` and `correct` are null."""

MAPS = pa.schema(
    [
        ("run", _NAME),
        ("image_id", _NAME),
        ("explainer", _NAME),
        ("repeat", pa.int32()),
        ("target", _NAME),
        ("granularity", _NAME),
        ("rows", pa.int32()),
        ("columns", pa.int32()),
        ("map", pa.list_(pa.float16())),
        ("scale", pa.float64()),
        ("status", _NAME),
        ("extras", pa.map_(pa.string(), pa.float64())),
    ]
)
"""One row a (image, explainer, repeat): the token grid, row-major float16; the map's values are `map * scale`
(scale: the largest finite magnitude of the grid, so that no map under- or overflows float16)."""

FAILURES = pa.schema(
    [
        ("run", _NAME),
        ("image_id", pa.string()),
        ("stage", _NAME),
        ("error", _NAME),
        ("message", pa.string()),
    ]
)
"""One row for each image that could not be read, or explainer that failed on an image."""

TABLES: Mapping[str, pa.Schema] = {"scores": SCORES, "predictions": PREDICTIONS, "maps": MAPS, "failures": FAILURES}


def scores_table(
    scores: Iterable[Score],
    *,
    run: str,
    images: Mapping[str, Mapping[str, Any]],
    targets: Mapping[tuple[str, str, int], str],
) -> pa.Table:
    """Rows of `scores`. `images`: id -> patient, label, predicted; `targets`: (id, explainer, repeat) -> class."""
    rows = [
        {
            "run": run,
            "image_id": s.image_id,
            "patient": images[s.image_id]["patient"],
            "label": images[s.image_id]["label"],
            "predicted": images[s.image_id]["predicted"],
            "target": targets[s.image_id, s.explainer, s.repeat],
            "explainer": s.explainer,
            "metric": s.metric,
            "repeat": s.repeat,
            "score": s.value,
            "status": s.status,
            "reason": s.reason,
        }
        for s in scores
    ]
    return _table(rows, SCORES)


def predictions_table(
    *,
    ids: Sequence[str],
    labels_B: np.ndarray,
    patients: Sequence[str | None],
    logits_BK: np.ndarray,
    run: str,
    class_names: Sequence[str],
    paths: Mapping[str, str],
) -> pa.Table:
    """Rows of `predictions` from float64 logits (B,K) and class indices (B,), -1 where the label is unknown."""
    rows = []
    for b, image_id in enumerate(ids):
        label, predicted = int(labels_B[b]), predicted_class(logits_BK[b], class_names)
        rows.append(
            {
                "run": run,
                "image_id": image_id,
                "patient": patients[b],
                "label": class_names[label] if label >= 0 else None,
                "predicted": predicted,
                "correct": class_names[label] == predicted if label >= 0 and predicted is not None else None,
                "probabilities": _probabilities(logits_BK[b]).tolist(),
                "logits": logits_BK[b].tolist(),
                "path": paths[image_id],
            }
        )
    return _table(rows, PREDICTIONS)


def predicted_class(logits_K: np.ndarray, class_names: Sequence[str]) -> str | None:
    """The class of the highest logit; None for a model of one output."""
    return class_names[int(logits_K.argmax())] if len(class_names) > 1 else None


def _probabilities(logits_K: np.ndarray) -> np.ndarray:
    if len(logits_K) == 1:
        return np.exp(-np.logaddexp(0, -logits_K))
    shifted = np.exp(logits_K - logits_K.max())
    return shifted / shifted.sum()


def map_row(grid: np.ndarray) -> dict[str, Any]:
    """The `rows`, `columns`, `map` and `scale` of one token grid."""
    finite = np.abs(grid[np.isfinite(grid)])
    scale = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    values = (grid / scale).astype(np.float16).ravel()
    return {"rows": grid.shape[0], "columns": grid.shape[1], "map": values, "scale": scale}


def maps_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of `maps`, already in the columns' names."""
    return _table(rows, MAPS)


def failures_table(failures: Iterable[Failure], *, run: str) -> pa.Table:
    """Rows of `failures`."""
    rows = [
        {"run": run, "image_id": f.image_id, "stage": f.stage, "error": f.error, "message": f.message} for f in failures
    ]
    return _table(rows, FAILURES)


def _table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        values = [row[field.name] for row in rows]
        if pa.types.is_dictionary(field.type):
            columns.append(pa.array(values, field.type.value_type).dictionary_encode().cast(field.type))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)
