"""An exception that a step's reference raised in, what it means out: the step's own error, or a loss of its process."""

from typing import Final

from ray.exceptions import (
    NodeDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    UnserializableException,
    UserCodeException,
)

from xaibatch.errors import ChangedWeightsError

_STAND_INS: Final = (RayTaskError, UnserializableException, UserCodeException)
"""What arrives in place of a step's own error that cannot be pickled or unpickled; or else a plain RayError."""


def root(error: BaseException) -> BaseException:
    """The error that a chain of Ray's wrappers is about: what the failing step raised, or how it was lost."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def is_loss(error: BaseException) -> bool:
    """Whether a step was lost with its process or node, rather than raising an error of its own."""
    error = root(error)
    return isinstance(error, RayError) and type(error) is not RayError and not isinstance(error, _STAND_INS)


def is_replica_loss(error: BaseException) -> bool:
    """Whether what was lost is the replica's process, not that of a CPU task."""
    return isinstance(root(error), RayActorError)


def is_node_loss(error: BaseException) -> bool:
    """Whether a CPU task was lost because its node died: Ray says so, or the driver does, since no node that it was
    sent to is left."""
    return isinstance(root(error), NodeDiedError)


def end_run_for(error: BaseException) -> None:
    """Raise what an error is about if it ends the run, whoever tries how often: weights that have changed."""
    cause = root(error)
    if isinstance(cause, ChangedWeightsError):
        raise cause from None


def describe(error: BaseException) -> str:
    """One line: an error's own first line; of Ray's longer accounts the last line, which names the cause."""
    error = root(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1] if isinstance(error, RayError) else lines[0]}"
