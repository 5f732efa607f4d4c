"""A job in; out comes the job that knows which local files every process that works for it must see."""

from dataclasses import replace
from typing import Final

from xaibatch.config import EMBEDDED
from xaibatch.data.storage import absolute, is_away, is_remote
from xaibatch.pipeline.job import Job

_RECORD: Final = "run.json"


def placed(job: Job) -> Job:
    """The job with its `paths`, settled by the process that starts its work."""
    return job if job.paths else replace(job, paths=local_paths(job))


def local_paths(job: Job) -> tuple[str, ...]:
    """The data, and checkpoint and the run's record where they are there; none of those in an object store."""
    config = job.config
    data = [config.data.path] if config.data.path and config.data.path != EMBEDDED else []
    others = [config.model.checkpoint] if config.model.checkpoint else []
    if job.folder.is_local:
        others.append(job.folder.path(_RECORD))
    found = [absolute(path) for path in data if not is_remote(path)]
    return (*found, *(absolute(path) for path in others if not is_remote(path) and not is_away(absolute(path))))
