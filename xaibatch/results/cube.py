"""Rows of `scores` in, one dense block of numbers out: explainer × metric × image × repeat, with who and what each
image is.

Shape letters: E explainers, M metrics, I images, R repeats.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xaibatch.errors import RunFolderError
from xaibatch.types import OK

Record = Mapping[str, Any]
"""The content of `run.json`."""


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """What `run.json` says of a metric: title for people, direction (None: neither is better), bounds, family, and
    whether it compares the images of a shard with each other."""

    label: str
    title: str
    higher_is_better: bool | None
    bounds: tuple[float, float]
    family: str
    across_images: bool = False

    @property
    def arrow(self) -> str:
        """↑ where more is better, ↓ where less is, nothing where neither is."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]

    @property
    def sign(self) -> int:
        """+1, -1 or 0: what a difference is multiplied by so that positive means better."""
        return {True: 1, False: -1, None: 0}[self.higher_is_better]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some of the images: `kind` is all, label, predicted or outcome; `name` the class or `correct` / `wrong`."""

    kind: str
    name: str
    rows_I: NDArray[np.bool_]

    @property
    def title(self) -> str:
        return {
            "all": "all images",
            "label": f"true class: {self.name}",
            "predicted": f"predicted: {self.name}",
            "outcome": f"prediction {self.name}",
        }[self.kind]


@dataclass(frozen=True, kw_only=True)
class ScoreCube:
    """The scores of one run, float64 (E,M,I,R), NaN where not scored, and the images' identities.

    clusters_I: dense patient number per image (the image's own where no patient is known).
    labels_I, predicted_I: class names or None. `statuses` counts rows by (explainer, metric) and status.
    """

    run: str
    explainers: tuple[str, ...]
    metrics: tuple[MetricInfo, ...]
    image_ids: tuple[str, ...]
    values_EMIR: NDArray[np.float64]
    clusters_I: NDArray[np.int64]
    labels_I: NDArray[np.object_]
    predicted_I: NDArray[np.object_]
    num_patients: int
    """Distinct known patients; 0 means that every image stands for itself."""
    statuses: Mapping[tuple[str, str], Mapping[str, int]] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return len(self.image_ids)

    def image_means(self) -> NDArray[np.float64]:
        """Mean over the scored repeats of each image, (E,M,I); NaN where none is scored. Computed once."""
        return self._means_EMI

    @cached_property
    def _means_EMI(self) -> NDArray[np.float64]:
        scored = np.isfinite(self.values_EMIR)
        count = scored.sum(-1)
        total = np.where(scored, self.values_EMIR, 0.0).sum(-1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def groups(self) -> tuple[Group, ...]:
        """All images, then by true class, by predicted class and, where both are known, by outcome; groups of no image
        are left out."""
        everything = Group(kind="all", name="all", rows_I=np.ones(self.num_images, bool))
        groups = [everything]
        for kind, names_I in (("label", self.labels_I), ("predicted", self.predicted_I)):
            names = sorted({name for name in names_I if name is not None})
            groups += [Group(kind=kind, name=name, rows_I=names_I == name) for name in names]
        judged = np.array([None not in names for names in zip(self.labels_I, self.predicted_I, strict=True)], bool)
        correct = judged & (self.labels_I == self.predicted_I)
        groups.append(Group(kind="outcome", name="correct", rows_I=correct))
        groups.append(Group(kind="outcome", name="wrong", rows_I=judged & ~correct))
        return tuple(group for group in groups if group.rows_I.any())


def score_cube(scores: pa.Table, record: Record) -> ScoreCube:
    """Arrange the rows of one run (columns as in `results.schema.SCORES`).

    Explainers and metrics keep the order of `run.json`, others follow sorted; images are sorted by id. Raises
    RunFolderError where the rows come from several runs or a (image, explainer, metric, repeat) occurs twice: a mean
    over such rows would lie.
    """
    codes, names = {}, {}
    for column in ("image_id", "explainer", "metric", "run"):
        codes[column], names[column] = _encode(scores[column], tuple(record.get(f"{column}s", ())))
    if len(names["run"]) > 1:
        raise RunFolderError(f"statistics are made for one run at a time, received rows of {', '.join(names['run'])}")
    repeats, repeat_codes = np.unique(scores["repeat"].to_numpy(), return_inverse=True)
    shape = (len(names["explainer"]), len(names["metric"]), len(names["image_id"]), len(repeats))
    index = np.ravel_multi_index((codes["explainer"], codes["metric"], codes["image_id"], repeat_codes), shape)
    if len(np.unique(index)) != len(index):
        raise RunFolderError(
            f"{len(index) - len(np.unique(index))} rows of `scores` are there twice (same image, explainer, metric and "
            "repeat). Was a part copied by hand? Remove the copy and try again"
        )
    values = np.full(int(np.prod(shape)), np.nan)
    values[index] = scores["score"].to_numpy()
    status_codes, status_names = _encode(scores["status"], ())
    patients_I = _of_image(scores["patient"], codes["image_id"], len(names["image_id"]))
    return ScoreCube(
        run=names["run"][0] if names["run"] else "",
        explainers=names["explainer"],
        metrics=tuple(metric_info(name, record) for name in names["metric"]),
        image_ids=names["image_id"],
        values_EMIR=values.reshape(shape),
        clusters_I=_clusters(patients_I),
        labels_I=_of_image(scores["label"], codes["image_id"], len(names["image_id"])),
        predicted_I=_of_image(scores["predicted"], codes["image_id"], len(names["image_id"])),
        num_patients=len({p for p in patients_I if p is not None}),
        statuses=_count(
            codes["explainer"], codes["metric"], status_codes, names["explainer"], names["metric"], status_names
        ),
    )


def metric_info(label: str, record: Record) -> MetricInfo:
    """The metric's entry in `run.json`; a metric that it does not name gets its label as title and no direction."""
    entry = record.get("metrics", {}).get(label, {})
    low, high = (
        float(v) if v is not None else np.inf * s
        for s, v in zip((-1, 1), entry.get("bounds") or (None, None), strict=True)
    )
    return MetricInfo(
        label=label,
        title=entry.get("title", label),
        higher_is_better=entry.get("higher_is_better"),
        bounds=(low, high),
        family=entry.get("family", ""),
        across_images=bool(entry.get("across_images", False)),
    )


def not_independent(metrics: Iterable[MetricInfo]) -> str:
    """Why some of the metrics are shown by their means alone; empty where all score every image by itself."""
    titles = [metric.title for metric in metrics if metric.across_images]
    if not titles:
        return ""
    return (
        f"{', '.join(titles)}: an image's score depends on the other images of its shard, so they are not independent: "
        "no interval, no test, no rank, no mark against the random map"
    )


def unfinished(record: Record, cube: ScoreCube) -> list[str]:
    """What is to be said of a run that is not finished, or has images without scores; else empty."""
    lines = []
    if record.get("status") not in (None, "finished"):
        lines.append("the run is not finished: what is shown rests on the parts that exist")
    expected = record.get("data", {}).get("num_images")
    if expected and expected != cube.num_images:
        lines.append(f"{cube.num_images:,} of the run's {expected:,} images have scores")
    return lines


def floor_explainer(explainers: Sequence[str], record: Record) -> str | None:
    """The label of the run's random map: method `random` in `run.json`, or so labelled; None if the run has none."""
    entries = record.get("explainers", {})
    for label in explainers:
        if entries.get(label, {}).get("method", label) == "random":
            return label
    return None


def is_synthetic(record: Record) -> bool:
    """Whether the images were rendered: intervals then speak of the generator, not of patients."""
    return bool(record.get("data", {}).get("synthetic", False))


def _encode(column: pa.ChunkedArray, first: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Integer codes and names of a string column: the names listed in `first` in their order, then the others
    sorted."""
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column)
    array = column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    raw = array.dictionary.to_pylist()
    used = set(pc.unique(array.indices).to_pylist())
    present = {raw[code] for code in used if code is not None}
    names = tuple(name for name in first if name in present) + tuple(sorted(present - set(first)))
    place = {name: number for number, name in enumerate(names)}
    lookup = np.array([place.get(name, -1) for name in raw], np.int64)
    indices = array.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.where(indices >= 0, lookup[indices] if len(lookup) else -1, -1), names


def _of_image(column: pa.ChunkedArray, image_codes: NDArray[np.int64], num_images: int) -> NDArray[np.object_]:
    """The value that each image's rows carry (they all carry the same)."""
    codes, names = _encode(column, ())
    of_image = np.full(num_images, -1, np.int64)
    of_image[image_codes] = codes
    return np.array([*names, None], object)[of_image]


def _clusters(patients_I: NDArray[np.object_]) -> NDArray[np.int64]:
    keys = [("patient", p) if p is not None else ("image", str(i)) for i, p in enumerate(patients_I)]
    place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([place[key] for key in keys], np.int64)


def _count(
    explainer_codes: NDArray[np.int64],
    metric_codes: NDArray[np.int64],
    status_codes: NDArray[np.int64],
    explainers: Sequence[str],
    metrics: Sequence[str],
    statuses: Sequence[str],
) -> dict[tuple[str, str], Mapping[str, int]]:
    shape = (len(explainers), len(metrics), max(len(statuses), 1))
    index = (
        np.ravel_multi_index((explainer_codes, metric_codes, status_codes), shape)
        if len(status_codes)
        else status_codes
    )
    counts_EMS = np.bincount(index, minlength=int(np.prod(shape))).reshape(shape)
    table: dict[tuple[str, str], Mapping[str, int]] = {}
    for e, explainer in enumerate(explainers):
        for m, metric in enumerate(metrics):
            table[explainer, metric] = Counter(
                {s: int(counts_EMS[e, m, k]) for k, s in enumerate(statuses) if counts_EMS[e, m, k]}
            )
    return table


def not_scored(statuses: Mapping[str, int]) -> dict[str, int]:
    """Rows without a score by reason, most frequent first.

    >>> not_scored({"ok": 7, "nan_map": 1, "all_zero_map": 2})
    {'all_zero_map': 2, 'nan_map': 1}
    """
    return dict(sorted(((s, n) for s, n in statuses.items() if s != OK), key=lambda item: (-item[1], item[0])))
