"""SIGINT and SIGTERM in; out come a flag, so that a run ends between two steps instead of in the middle of one, or an
exception that unwinds whatever else is going on."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from xaibatch.errors import StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Context manager: the first signal sets the flag, a second one acts as it did before. Outside the main thread,
    where Python delivers no signals, the flag is never set.

    >>> with StopFlag() as stop:
    ...     stop.requested
    False
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._before: dict[int, Any] = {}

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
        self._before = _handlers()
        _set(dict.fromkeys(self._before, self._note))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        _set(self._before)


class Interrupted(BaseException):
    """A signal where no StopFlag waits for one; like KeyboardInterrupt no Exception, which somebody might catch."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """For the time of the block both signals raise Interrupted, so that locks, processes and the terminal are given
    back; a signal that the process was started to ignore stays ignored."""
    before = _handlers()
    _set({number: _interrupt for number, handler in before.items() if handler is not signal.SIG_IGN})
    try:
        yield
    finally:
        _set(before)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """What the block puts in place of the signals' handlers is taken away again. Ray's own end the process at once, and
    leave SIGTERM without any when it shuts down: for that second or two it ends the process like SIGKILL."""
    before = _handlers()
    try:
        yield
    finally:
        _set(before)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def _handlers() -> dict[int, Any]:
    """The handlers of both signals; none outside the main thread, which alone may change them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in _SIGNALS}


def _set(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
