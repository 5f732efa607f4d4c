"""An `--output` that would be lost, or that a command cannot write to, is refused by name before any work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from xaibatch.data.storage import is_remote
from xaibatch.errors import UsageError


def check_kept(output: str | None) -> None:
    """Raise UsageError inside the copy of a working directory that Ray made for a job, unless `output` leads out of it.

    Ray deletes that copy, with everything written below it, when its cache is full or the cluster ends; None is a name
    below the current folder.
    """
    if output is not None and (is_remote(output) or output.startswith(("/", "~", "file:", "local:"))):
        return
    if any(part.startswith("_ray_pkg_") for part in Path.cwd().parts):
        raise UsageError(
            f"--output {output or '(none)'} lies in the copy of the working directory that Ray deletes after the job: "
            "give a URL (s3://...) or an absolute path that every machine sees"
        )


def check_without_ray(names: Sequence[str]) -> None:
    """Raise UsageError for what was asked of a cluster beside --no-ray."""
    if names:
        raise UsageError(
            f"--no-ray runs in this process alone and has no use for {', '.join(names)}: leave out the one or the other"
        )


@contextmanager
def writing(output: str) -> Iterator[None]:
    """What the system says against writing to `output` becomes a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error}; choose another --output") from None


def local_folder(output: str) -> Path:
    """The folder of a command that writes to local files only; UsageError for a URL, which would be taken for a path.

    >>> local_folder("file:///data/sets").as_posix()
    '/data/sets'
    """
    if is_remote(output):
        raise UsageError(
            f"--output {output!r} is a URL, and this command writes to a folder: give a path that every machine sees "
            "(a shared file system on a cluster) and copy the finished folder to the store"
        )
    check_kept(output)
    return Path(output.removeprefix("file://").removeprefix("local://")).expanduser()
