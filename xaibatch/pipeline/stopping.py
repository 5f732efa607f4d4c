"""SIGINT and SIGTERM in, a flag out: lets a run end between two steps instead of in the middle of one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from xaibatch.errors import StoppedError


class StopFlag:
    """Context manager: the first signal sets the flag, a second one acts as it did before. Outside the main thread,
    where Python delivers no signals, the flag is never set.

    >>> with StopFlag() as stop:
    ...     stop.requested
    False
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    def check(self) -> None:
        """Raise StoppedError if a signal came."""
        if self.requested:
            name = signal.Signals(self.signal_number).name
            raise StoppedError(
                f"stopped by {name}: everything finished so far is kept, the same command goes on from here",
                self.signal_number,
            )

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
