"""An operation on a file or an object store in, its result out, tried again while the reason may pass by itself."""

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from xaibatch.errors import RunFolderError

ValueT = TypeVar("ValueT")

PASSING: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR}
)
"""Errors of a local file system that a person or time may mend while the run waits: full disk, quota, network mount."""

FINAL: Final = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, TypeError, ValueError)
"""Errors of an object store that another attempt does not mend; every other one is tried again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retries:
    """How often and how patiently; with the defaults an operation is given up after six attempts and 15 seconds.

    attempts:      in all, at least 1.
    first_pause_s: seconds before the second attempt; doubles each time.
    """

    attempts: int = 6
    first_pause_s: float = 0.5

    def call(self, operation: Callable[[], ValueT], *, what: str, local: bool) -> ValueT:
        """Return the operation's result. Final errors pass as they are; RunFolderError when the attempts are used
        up."""
        for attempt in range(self.attempts):
            try:
                return operation()
            except Exception as error:
                if not may_pass(error, local=local):
                    raise
                if attempt + 1 == self.attempts:
                    raise RunFolderError(
                        f"cannot {what}: {type(error).__name__}: {error} ({self.attempts} attempts). "
                        "Mend the cause (free some space, check the store) and run the same command again"
                    ) from error
                time.sleep(self.first_pause_s * 2**attempt)
        raise AssertionError("at least one attempt")


def may_pass(error: Exception, *, local: bool) -> bool:
    """Whether another attempt may succeed."""
    if local:
        return isinstance(error, OSError) and error.errno in PASSING
    return not isinstance(error, FINAL)
