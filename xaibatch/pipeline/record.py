"""The run record (`run.json`): everything needed to say what a run was and to take it up again."""

import datetime
import hashlib
import importlib.metadata
import platform
import socket
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xaibatch.config import EMBEDDED, RunConfig, method_of
from xaibatch.data.dataset import DataSet
from xaibatch.data.index import image_root
from xaibatch.data.preprocess import Preprocessing
from xaibatch.data.storage import ReadOptions, absolute, one_line, read_bytes
from xaibatch.embedded import model_path
from xaibatch.errors import ChangedWeightsError, ConfigError, ModelError, RunFolderError
from xaibatch.maps import TokenGrid
from xaibatch.options import validated
from xaibatch.pipeline.cells import build_metrics
from xaibatch.pipeline.job import Job
from xaibatch.results.parts import RECORD, RunFolder

FORMAT = 1
"""Version of the run folder's layout."""

_PACKAGES = (
    "xaibatch",
    "torch",
    "timm",
    "numpy",
    "ray",
    "quantus",
    "lime",
    "scikit-image",
    "pyarrow",
    "captum",
    "zennit",
)


def new_record(
    config: RunConfig, folder: RunFolder, dataset: DataSet, model: Mapping[str, Any], precisions: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of a run that is about to start. `model` and `precisions` are what was settled before."""
    size, grid = model["preprocessing"]["image_size"], model["token_grid"]
    return {
        "format": FORMAT,
        "run": folder.name,
        "id": uuid.uuid4().hex,
        "status": "running",
        "created": now(),
        "digest": config.digest(),
        "config": config.model_dump(mode="json"),
        "model": dict(model),
        "data": describe_data(config, dataset),
        "explainers": describe_explainers(config, size, (grid["rows"], grid["columns"])),
        "metrics": describe_metrics(config, model),
        "precision": dict(precisions),
        "versions": versions(),
        "code": code_state(),
        "sessions": [],
    }


def job_of(record: Mapping[str, Any], config: RunConfig, folder: RunFolder) -> Job:
    """The job that a record describes, without loading the model again."""
    return Job(
        config=config,
        folder=folder,
        class_names=tuple(record["model"]["class_names"]),
        preprocessing=Preprocessing.model_validate(record["model"]["preprocessing"]),
        precisions=record["precision"]["chosen"],
        patch_size=record["model"]["patch_size"],
        grid=TokenGrid(**record["model"]["token_grid"]) if "token_grid" in record["model"] else None,
        random_explainers=frozenset(label for label, facts in record["explainers"].items() if facts["random"]),
        granularities={label: facts["granularity"] for label, facts in record["explainers"].items()},
        run_id=record.get("id", ""),
        data_root=image_root(record["data"]["root"]),
        weights_sha256=_weights_sha256(record),
    )


def take_up(config: RunConfig, folder: RunFolder, dataset: DataSet) -> tuple[dict[str, Any], Job]:
    """The record of a run that is to go on, and its job. Sessions that ended without a word are marked as killed.

    Raises RunFolderError for a record of another configuration, data or layout, and for one that cannot be understood.
    """
    where = f"{folder.path(RECORD)!r} is no record of a run that can be taken up"
    try:
        record: dict[str, Any] = folder.read_json(RECORD)
        check_same(record, config, dataset, folder)
        job = job_of(record, config, folder)
        for session in record["sessions"]:
            if session.get("state") == RUNNING:
                session["state"] = KILLED
        record["run"] = folder.name
    except KeyError as error:
        raise RunFolderError(f"{where}: it has no {error}. Choose another --output") from None
    except (ConfigError, ValidationError, ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{where} ({one_line(error)}): choose another --output") from None
    return record, job


def check_weights(record: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse to go on with a checkpoint whose bytes are not those that the run began with. Raises ChangedWeightsError;
    ModelError where it cannot be read."""
    expected, path = _weights_sha256(record), config.model.checkpoint
    if not expected or not path:
        return
    full = str(model_path()) if path == EMBEDDED else absolute(path)
    try:
        found = hashlib.sha256(read_bytes(full, ReadOptions(max_bytes=1 << 40))).hexdigest()
    except OSError as error:
        raise ModelError(f"checkpoint {path!r} cannot be read: {one_line(error)}") from None
    if found != expected:
        raise ChangedWeightsError(path, expected, found)


def _weights_sha256(record: Mapping[str, Any]) -> str:
    return record["model"].get("source", {}).get("sha256") or ""


RUNNING, ENDED, STOPPED, KILLED = "running", "ended", "stopped", "killed"
"""States of a session: at work (or killed since), came to its end, ended by a signal or an error, found `running` by
the next one."""


def new_session() -> dict[str, Any]:
    """One start of the command: when, where, with what; its sums are added while it runs."""
    return {
        "started": now(),
        "state": RUNNING,
        "seconds": 0.0,
        "host": socket.gethostname(),
        "versions": versions(),
        "code": code_state(),
    }


def changed_code(record: Mapping[str, Any], session: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Versions and commit that a session has otherwise than the run's beginning: name -> there, now."""
    keys = ("versions", "code")
    return differences({key: record.get(key) for key in keys}, {key: session[key] for key in keys})


def check_same(record: Mapping[str, Any], config: RunConfig, dataset: DataSet, folder: RunFolder) -> None:
    """Refuse to go on with another configuration, model or data than the run folder's; say which settings differ."""
    if not isinstance(record, dict):
        raise TypeError(f"expected an object, found {type(record).__name__}")
    if record.get("format") != FORMAT:
        raise RunFolderError(
            f"{folder.url!r} has the layout {record.get('format')!r}, this version of xaibatch writes {FORMAT}: "
            "choose another --output"
        )
    differing = differences(validated(RunConfig, record["config"], "its configuration").identity(), config.identity())
    if differing:
        shown = "; ".join(f"{key}: {a!r} there, {b!r} now" for key, (a, b) in list(differing.items())[:6])
        raise RunFolderError(
            f"the run folder {folder.url!r} belongs to another configuration ({shown}). "
            "Choose another --output, or use the same settings to take it up again"
        )
    covered = record["data"].get("checksum_of", dataset.checksum_of)
    if covered != dataset.checksum_of:
        raise RunFolderError(
            f"the run {folder.url!r} knows its data by a SHA-256 of {covered}; now it is of {dataset.checksum_of}, and "
            "the two cannot be compared. Choose another --output"
        )
    if record["data"]["checksum"] != dataset.checksum:
        raise RunFolderError(
            f"the data at {dataset.root!r} has changed since the run {folder.url!r} began "
            f"(SHA-256 of {dataset.checksum_of}: {record['data']['checksum'][:12]} there, {dataset.checksum[:12]} now)"
            ". Choose another --output"
        )


def differences(a: Any, b: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values.

    >>> differences({"x": {"y": 1}, "z": 0}, {"x": {"y": 2}, "z": 0})
    {'x.y': (1, 2)}
    """
    if isinstance(a, dict) and isinstance(b, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*a, *b}):
            found |= differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if a == b else {path: (a, b)}


def describe_data(config: RunConfig, dataset: DataSet) -> dict[str, Any]:
    """What was evaluated: path, counts, checksum of the index."""
    labels = [record.label for record in dataset.records]
    patients = {record.patient for record in dataset.records if record.patient is not None}
    return {
        "path": config.data.path,
        "root": dataset.root,
        "layout": dataset.layout,
        "split": config.data.split,
        "limit": config.data.limit,
        "num_images": len(dataset.records),
        "num_patients": len(patients) or None,
        "classes": dict(dataset.num_images_per_class),
        "num_unlabelled": labels.count(None),
        "checksum": dataset.checksum,
        "checksum_of": dataset.checksum_of,
        "patients_from": dataset.patients_from,
        "notes": list(dataset.notes),
        "synthetic": any("synthetic" in note for note in dataset.notes),
    }


def describe_explainers(config: RunConfig, size: tuple[int, int], grid: tuple[int, int]) -> dict[str, Any]:
    """Per label: method, options in full, title, paper, sign, granularity; its cost for images of a size (H,W) and
    tokens in a grid of rows and columns."""
    from xaibatch.explainers.base import InputShape  # torch: only a new run needs it
    from xaibatch.explainers.resolve import resolve_explainer

    described = {}
    for label, options in config.explainers.items():
        name, keywords = method_of(label, options)
        explainer = resolve_explainer(name)(**keywords)
        described[label] = {
            "method": name,
            "options": explainer.options.model_dump(mode="json"),
            "title": explainer.title,
            "paper": explainer.paper,
            "signed": explainer.signed,
            "granularity": explainer.granularity,
            "random": explainer.random,
            "segmentation": explainer.segmentation,
            "cost": explainer.cost(),
            "needs": explainer.needs,
            "num_forward_passes": explainer.num_forward_passes(InputShape(size, grid)),
        }
    return described


def describe_metrics(config: RunConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """Per label: method, options in full, title, paper, direction, bounds, family; whether the metric compares images
    with each other."""
    preprocessing = model["preprocessing"]
    shape_CHW = (preprocessing["channels"], *preprocessing["image_size"])
    grid = TokenGrid(**model["token_grid"])
    return {
        label: {
            "method": method_of(label, config.metrics[label])[0],
            "options": metric.options.model_dump(mode="json"),
            "title": metric.title,
            "paper": metric.paper,
            "family": metric.family,
            "higher_is_better": metric.higher_is_better,
            "bounds": [None if abs(bound) == float("inf") else bound for bound in metric.bounds],
            "across_images": metric.across_images,
            "num_forward_passes": metric.num_forward_passes(len(config.explainers), shape_CHW, grid),
        }
        for label, metric in build_metrics(config).items()
    }


def versions() -> dict[str, str]:
    """Versions of Python, this package and what its numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_state() -> dict[str, Any]:
    """Commit of the checkout this code runs from and whether it has uncommitted changes; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit.stdout.strip(), "dirty": bool(dirty.stdout.strip())}


def now() -> str:
    """UTC time, ISO 8601, seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
