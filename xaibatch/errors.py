"""What can go wrong by the user's hand: a small tree of exceptions that the command line prints without a traceback."""

import copyreg
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class XaibatchError(Exception):
    """An error that the user can mend; its text says what was received, what was expected and what to do."""

    exit_code: int = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its text and attributes: a subclass's constructor may ask for something else."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class UsageError(XaibatchError):
    """A wrong argument, option, configuration or run folder."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that is not known, with the nearest known one and the whole list."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


class DataError(UsageError):
    """A data set that cannot be read as one: no images, no labels, a missing column."""


class ImageError(XaibatchError):
    """One image that cannot be used; it becomes one row in `failures`, never a failed run."""


class ModelError(UsageError):
    """A model or checkpoint that cannot be loaded or is not supported."""


class ConfigError(UsageError):
    """A configuration key or value that is not allowed."""


class RunFolderError(UsageError):
    """A run folder that belongs to another configuration, is held by another run or cannot be written."""


class ChangedWeightsError(RunFolderError):
    """A checkpoint whose bytes are not those that the run began with: ends the run, whose rows must be of one model."""

    def __init__(self, path: str, expected: str, found: str) -> None:
        super().__init__(
            f"the checkpoint {path!r} has changed since the run began (SHA-256 {expected[:12]} there, {found[:12]} "
            "now): put the first one back to finish the run, or choose another --output for the new one"
        )


class NotScoredError(XaibatchError):
    """A score that is undefined for this input: becomes a null score with this status and reason."""

    def __init__(self, status: str, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(f"{status}: {reason}")


class EngineError(XaibatchError):
    """The cluster or the store cannot go on with the run; what is finished stays, the same command resumes."""


class StoppedError(XaibatchError):
    """The run was stopped from outside; `exit_code` is the shell's convention, 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)
