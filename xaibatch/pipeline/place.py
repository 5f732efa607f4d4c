"""A job in; out comes the job that names its files as every process that works for it can open them."""

from dataclasses import replace
from typing import Final

from xaibatch.config import EMBEDDED, RunConfig
from xaibatch.data.storage import absolute, is_away, is_remote
from xaibatch.pipeline.job import Job

_RECORD: Final = "run.json"


def placed(job: Job) -> Job:
    """The job with its `paths` and an absolute checkpoint, settled by the process that starts its work: the folder that
    a relative path starts at is another one on the cluster. The configuration that identifies the run stays as it was
    written."""
    return job if job.paths else replace(job, paths=local_paths(job), config=_with_absolute_checkpoint(job.config))


def local_paths(job: Job) -> tuple[str, ...]:
    """The data, and checkpoint and the run's record where they are there; none of those in an object store."""
    config = job.config
    data = [config.data.path] if config.data.path and config.data.path != EMBEDDED else []
    checkpoint = config.model.checkpoint
    others = [checkpoint] if checkpoint and checkpoint != EMBEDDED else []
    if job.folder.is_local:
        others.append(job.folder.path(_RECORD))
    found = [absolute(path) for path in data if not is_remote(path)]
    return (*found, *(absolute(path) for path in others if not is_remote(path) and not is_away(absolute(path))))


def _with_absolute_checkpoint(config: RunConfig) -> RunConfig:
    checkpoint = config.model.checkpoint
    if checkpoint is None or checkpoint == EMBEDDED:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"checkpoint": absolute(checkpoint)})})
