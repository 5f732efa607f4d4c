"""A run in, the pixels, masks, twins and maps of chosen images out; says why where they can no longer be had.

Results hold no pixels (a run's folder may go where its patients' images may not), so a report reads the images again,
through the same preprocessing as the model.

Shape letters: H W pixels, h w a map's own sides.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.dataset as ds
from numpy.typing import NDArray

from xaibatch.data.index import image_root, located
from xaibatch.errors import XaibatchError
from xaibatch.results.frames import Run
from xaibatch.results.overlay import grey_image
from xaibatch.types import ImageRecord, Shard

_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image as the model saw it, grey in [0, 1] (H,W); masks bool (H,W) by name; the lesion-free twin where there
    is one."""

    grey_HW: NDArray[np.float32]
    masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    twin_HW: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures by image id, and what the reader of the report must know about the ones that are not there."""

    found: Mapping[str, Picture]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMap:
    """A map from the run's folder: token grid (h,w), float64; `target` the class that it explains."""

    grid_hw: NDArray[np.float64]
    target: str
    status: str


def load_pictures(run: Run, image_ids: Sequence[str]) -> Pictures:
    """Read the images again from the run's data set. Nothing is raised for images that cannot be read: a note says
    it."""
    wanted = list(dict.fromkeys(image_ids))
    if not wanted:
        return Pictures(found={})
    try:
        records, notes = _records(run, wanted)
        found = _load(run, records)
    except (XaibatchError, OSError, KeyError, ValueError) as error:
        place = run.record.get("data", {}).get("root") or run.record.get("data", {}).get("path") or "unknown place"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Pictures(
            found={},
            notes=(f"The images could not be read again from {place} ({reason}). Maps are shown without them.",),
        )
    missing = len(wanted) - len(found)
    if missing:
        notes += (f"{missing} of {len(wanted)} images could not be read again; their maps are shown without them.",)
    return Pictures(found=found, notes=notes)


def load_maps(run: Run, image_ids: Iterable[str]) -> dict[tuple[str, str], StoredMap]:
    """(image id, explainer) -> the map of the first repeat."""
    chosen = ds.field("image_id").isin(list(image_ids)) & (ds.field("repeat") == 0)
    columns = ["image_id", "explainer", "target", "rows", "columns", "map", "scale", "status"]
    table = run.maps.dataset().to_table(columns=columns, filter=chosen)
    values = {name: table[name].to_pylist() for name in columns if name != "map"}
    flat = table["map"].combine_chunks()
    grids = flat.values.to_numpy(zero_copy_only=False).astype(np.float64) if len(flat) else np.empty(0)
    offsets = flat.offsets.to_numpy() if len(flat) else np.zeros(1, int)
    maps = {}
    for i in range(table.num_rows):
        grid = grids[offsets[i] - offsets[0] : offsets[i + 1] - offsets[0]] * values["scale"][i]
        maps[values["image_id"][i], values["explainer"][i]] = StoredMap(
            grid_hw=grid.reshape(values["rows"][i], values["columns"][i]),
            target=values["target"][i],
            status=values["status"][i],
        )
    return maps


def _records(run: Run, wanted: Sequence[str]) -> tuple[list[ImageRecord], tuple[str, ...]]:
    """The data set's own records (with masks and twins), or, where the set cannot be opened, the paths that the run
    noted."""
    from xaibatch.data.dataset import open_dataset
    from xaibatch.data.findings import FindingOptions

    data = run.record["data"]
    configured: Mapping[str, Any] = run.config.get("data", {})
    try:
        dataset = open_dataset(
            data.get("root") or data["path"],
            layout=data.get("layout", "auto"),
            split=data.get("split"),
            allow_outside_root=configured.get("allow_outside_root", False),
            findings=FindingOptions.model_validate(configured.get("findings") or {}),
        )
    except (XaibatchError, OSError):
        return _records_of_predictions(run, wanted), (
            "The data set could not be opened as it was; images were read from their paths, without masks and twins.",
        )
    known = {record.image_id: record for record in dataset.records}
    return [known[image_id] for image_id in wanted if image_id in known], ()


def _records_of_predictions(run: Run, wanted: Sequence[str]) -> list[ImageRecord]:
    rows = run.predictions.dataset().to_table(
        columns=["image_id", "path"], filter=ds.field("image_id").isin(list(wanted))
    )
    root = image_root(run.record["data"].get("root") or "")
    paths = {row["image_id"]: located(root, row["path"]) for row in rows.to_pylist()}
    return [ImageRecord(image_id=image_id, path=paths[image_id]) for image_id in wanted if image_id in paths]


def _load(run: Run, records: Sequence[ImageRecord]) -> dict[str, Picture]:
    from xaibatch.data.load import load_shard
    from xaibatch.data.preprocess import Preprocessing

    preprocessing = Preprocessing.model_validate(run.record["model"]["preprocessing"])
    found: dict[str, Picture] = {}
    for start in range(0, len(records), _AT_ONCE):
        # labels are the report's own business: a label unknown to the model must not keep an image from being shown
        chunk = tuple(
            ImageRecord(image_id=r.image_id, path=r.path, masks=r.masks, twin=r.twin)
            for r in records[start : start + _AT_ONCE]
        )
        batch, _ = load_shard(Shard(index=0, records=chunk), preprocessing, (), with_masks=True, with_twins=True)
        for row, image_id in enumerate(batch.ids):
            twin_CHW = None if batch.twins_BCHW is None else batch.twins_BCHW[row]
            found[image_id] = Picture(
                grey_HW=_grey(batch.images_BCHW[row], preprocessing),
                masks={name: batch.masks[name][row] for name in sorted(batch.masks) if batch.has_mask[name][row]},
                twin_HW=None if twin_CHW is None or np.isnan(twin_CHW).any() else _grey(twin_CHW, preprocessing),
            )
    return found


def _grey(image_CHW: NDArray[np.floating], preprocessing: Any) -> NDArray[np.float32]:
    return grey_image(image_CHW, preprocessing.mean, preprocessing.std).astype(np.float32)
