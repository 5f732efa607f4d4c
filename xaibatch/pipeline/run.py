"""A whole run: configuration in, a run folder with finished Parquet tables out; resumes whatever is missing."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xaibatch.config import EMBEDDED, RunConfig
from xaibatch.data.dataset import DataSet, open_dataset
from xaibatch.data.sampling import sample, shards
from xaibatch.data.storage import one_line
from xaibatch.embedded import manifest_path
from xaibatch.errors import ConfigError, DataError, EngineError, RunFolderError, StoppedError, UsageError
from xaibatch.pipeline.cells import build_metrics
from xaibatch.pipeline.estimate import Estimate, estimate
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.record import check_weights, job_of, new_record, now, take_up
from xaibatch.pipeline.session_record import SessionRecord
from xaibatch.pipeline.work import FailedCell, Progress, ShardWork, listings, pending
from xaibatch.results.compact import is_compact
from xaibatch.results.frames import Run, open_run
from xaibatch.results.lock import RunLock
from xaibatch.results.parts import DAMAGED, RECORD, RunFolder
from xaibatch.types import Shard

WORTH_IMAGES = 20
"""A run must have this many times the calibration sample's images; below, calibrating costs more than it saves."""

_LOG = logging.getLogger(__name__)

Engine = Callable[[Job, Sequence[ShardWork], Progress], list[FailedCell]]
"""Does the work: `xaibatch.pipeline.local.run_local` or `xaibatch.cluster.driver.run_on_ray`."""

Calibrate = Callable[[Job, Shard], dict[str, Any]]
"""Chooses precisions where the run's model will compute: `calibrate_local` or `calibrate_on_ray` beside those."""


class Watcher(Progress, Protocol):
    """A Progress that is also told about the run's beginning and end."""

    def start(self, job: Job, expected: Estimate, num_cells_done: int) -> None: ...

    def finish(self) -> dict[str, Any]: ...

    def leave(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """folder, results, record: where and what; num_cells_run: 0 if everything was there already; failed: cells that
    were given up."""

    folder: RunFolder
    results: Run
    record: dict[str, Any]
    num_cells_run: int
    failed: tuple[FailedCell, ...]
    num_image_failures: int

    @property
    def ok(self) -> bool:
        return not self.failed and not self.num_image_failures


def evaluate(config: RunConfig, engine: Engine, watcher: Watcher, calibrate: Calibrate | None = None) -> Outcome:
    """Run or resume an evaluation. Raises UsageError for anything that the user must mend before work can start.

    Without `calibrate`, precision `auto` means float32.
    """
    dataset = choose_images(config)
    folder = RunFolder(config.output or f"runs/{_name(config, dataset)}")
    fresh = None if folder.exists(RECORD) else _new_record(config, folder, dataset)  # before anything is written
    folder.create()
    with RunLock(folder) as lock:
        folder.sweep()
        record, job = _open_record(config, folder, dataset, fresh, calibrate)
        cut = shards(dataset.records, config.engine.images_per_shard(len(dataset)))
        listed = listings(job, "contents")
        work = pending(job, cut, lambda path, problem: _left_out(folder, path, problem), listed=listed)
        failed: list[FailedCell] = []
        if work:
            if record is not fresh:
                check_weights(record, config)
            num_cells = len(cut) * (1 + len(job.groups))
            expected = estimate(job, work, record)
            with SessionRecord(record, folder, lock, watcher) as session:
                watcher.start(job, expected, num_cells - expected.num_cells)
                failed = engine(job, session.guarded(work), session)
        if not failed and record.get("status") != "finished" and not (work and pending(job, cut)):
            record["status"], record["finished"] = "finished", now()
            folder.write_json(record, RECORD)
        results = open_run(folder.url, None if work else listed)
        num_image_failures = results.failures.arrow().num_rows
    return Outcome(
        folder=folder,
        results=results,
        record=record,
        num_cells_run=sum(shard_work.num_cells for shard_work in work) - len(failed),
        failed=tuple(failed),
        num_image_failures=num_image_failures,
    )


def preview(config: RunConfig) -> Estimate:
    """What is left of the run would cost, without writing anything. Raises UsageError for whatever `evaluate` would
    refuse before work starts, such as a folder of another configuration."""
    dataset = choose_images(config)
    folder = RunFolder(config.output or f"runs/{_name(config, dataset)}")
    cut = shards(dataset.records, config.engine.images_per_shard(len(dataset)))
    if not folder.exists(RECORD):
        record = _new_record(config, folder, dataset)
        job = job_of(record, config, folder)
        return estimate(job, pending(job, cut), record)
    record, job = take_up(config, folder, dataset)
    work = pending(job, cut)
    if work:
        check_weights(record, config)
    rate_here = {"forward_passes_per_second": None}  # the record's is of the machine that began the run
    return estimate(job, work, record | {"model": record["model"] | rate_here})


def choose_images(config: RunConfig) -> DataSet:
    """Open the data set, say what is to be known of it, and take the configured sample; checks what needs no model."""
    if not config.data.path:
        raise DataError(
            "no data: give --data a folder with one sub-folder a class, or a CSV/Parquet manifest (or `embedded`)"
        )
    for section in ("explainers", "metrics"):
        if not getattr(config, section):
            raise ConfigError(f"no {section} are configured: name some with --{section} a,b (xaibatch list {section})")
    dataset = open_dataset(
        str(manifest_path()) if config.data.path == EMBEDDED else config.data.path,
        layout=config.data.layout,
        split=config.data.split,
        contents=config.data.checksum == "contents",
        allow_outside_root=config.data.allow_outside_root,
        findings=config.data.findings,
    )
    for note in dataset.notes:
        _LOG.warning("data: %s", note)
    if config.target == "label" and any(record.label is None for record in dataset.records):
        raise ConfigError("target is 'label' but some images have no label: use target 'predicted' or label them")
    return sample(dataset, config.data.limit, config.seed)


def _name(config: RunConfig, dataset: DataSet) -> str:
    place = Path(config.data.path or dataset.root)
    return f"{config.model.name}-{place.stem if place.suffix else place.name}-{config.digest()[:8]}"


def _open_record(
    config: RunConfig,
    folder: RunFolder,
    dataset: DataSet,
    fresh: dict[str, Any] | None,
    calibrate: Calibrate | None,
) -> tuple[dict[str, Any], Job]:
    """The folder's record after a check that it is the same run, or a new one; and the job that it describes."""
    if folder.exists(RECORD):
        return take_up(config, folder, dataset)
    record = fresh or _new_record(config, folder, dataset)
    if config.precision.default == "auto" and calibrate is not None:
        record["precision"] |= _calibrated(config, folder, dataset, record, calibrate)
    folder.write_json(record, RECORD)
    return record, job_of(record, config, folder)


def _left_out(folder: RunFolder, path: str, problem: str) -> None:
    """Say which file is no part of the run. A compact part that is broken is renamed: the parts that are made in its
    place would otherwise count as merged into it."""
    if is_compact(path) and path.endswith(".parquet"):
        folder.set_aside(path)
        problem += f"; renamed to end in {DAMAGED}, what it held is made again"
    _LOG.warning("left out of the run: %s: %s", path, problem)


def _new_record(config: RunConfig, folder: RunFolder, dataset: DataSet) -> dict[str, Any]:
    if not folder.exists(RECORD) and (folder.parts("scores") or folder.parts("maps")):
        raise RunFolderError(f"{folder.url!r} has results but no {RECORD}: choose another --output")
    from xaibatch.pipeline.facts import settle_model  # torch: a finished run answers without

    for metric in build_metrics(config).values():
        metric.check()
    model, precisions = settle_model(config, dataset)
    return new_record(config, folder, dataset, model, precisions)


def _calibrated(
    config: RunConfig, folder: RunFolder, dataset: DataSet, record: dict[str, Any], calibrate: Calibrate
) -> dict[str, Any]:
    """What a calibration on a sample of the run's own images chose; why there was none, for a small run or one whose
    sample could not be computed."""
    num_images = config.precision.num_images
    if len(dataset) < WORTH_IMAGES * num_images:
        few = f"{len(dataset)} images are fewer than {WORTH_IMAGES} x {num_images}"
        return {"why": f"{few}: calibrating would cost more than it saves"}
    chosen = sample(dataset, num_images, config.seed)
    try:
        return calibrate(job_of(record, config, folder), Shard(index=0, records=chosen.records))
    except (UsageError, EngineError, StoppedError):
        raise
    except Exception as error:  # every image of the sample is met again in the run, which knows what to do about it
        why = f"calibrating on {len(chosen)} images failed ({type(error).__name__}: {one_line(error)[:300]})"
        _LOG.warning("%s: the whole run is computed in float32; another --output tries again", why)
        return {"why": why}
