"""One run at a time on a run folder: a lock file with the holder's name, kept alive by heartbeats, taken over when
stale.

The lock only spares people double work and keeps one run from sweeping another's temporary files: two runs of one
configuration would write the same parts with the same content. How it is created and taken over without two winners is
`results.lock_file`'s business. Where a store cannot rule two winners out, the earlier one finds at its next heartbeat
that the lock is no longer its own, and `check` ends its run.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from xaibatch.errors import EngineError, RunFolderError
from xaibatch.results.lock_file import LockFile, Version
from xaibatch.results.parts import RunFolder

_LOG = logging.getLogger(__name__)

LOCK: Final = ".lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a lock. `process_started` (the kernel's ticks, where it tells) keeps a reused pid apart; times are
    seconds since 1970."""

    token: str
    host: str
    pid: int
    process_started: str
    since: float
    heartbeat: float

    @property
    def hostname(self) -> str:
        return self.host.partition("/")[0]

    @classmethod
    def here(cls) -> "Holder":
        now = time.time()
        return cls(
            token=uuid.uuid4().hex,
            host=_host(),
            pid=os.getpid(),
            process_started=_started(os.getpid()),
            since=now,
            heartbeat=now,
        )


class RunLock:
    """Context manager that holds a run folder's lock; raises RunFolderError with the holder's host, pid and age.

    beat_s:  seconds between heartbeats.
    stale_s: a lock whose last heartbeat is older belongs to nobody any more. On the holder's own host a dead process is
             noticed at once.
    settle_s: on an object store, seconds between writing the lock and reading it again; longer than a request takes.

    `lost` turns true when somebody else took the lock over (this process was suspended for longer than `stale_s`).
    """

    def __init__(
        self, folder: RunFolder, *, beat_s: float = 10.0, stale_s: float = 90.0, settle_s: float = 1.0
    ) -> None:
        self.folder = folder
        self.beat_s = beat_s
        self.stale_s = stale_s
        self.settle_s = settle_s
        self.lost = False
        self.taken_over: Holder | None = None
        """The holder of a stale lock that this one replaced."""
        self._file = LockFile(folder, LOCK)
        self._me = Holder.here()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._me = Holder.here()
        self.lost, self.taken_over = False, None
        self._stop.clear()
        self._acquire()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._file.guarded(), contextlib.suppress(OSError, RunFolderError):
            if self._is_mine(self._file.read()):
                self._file.remove()

    def check(self) -> None:
        """Raise EngineError if the lock was lost."""
        if self.lost:
            raise EngineError(
                f"another run took over the run folder {self.folder.url!r}, since this one gave no sign of life for "
                f"{_age(self.stale_s)} (was it suspended?): what it finished is kept, and the other run goes on"
            )

    def _acquire(self) -> None:
        with self._file.guarded():
            found = self._file.read()
            holder = _holder(found)
            if holder is not None and not self._stale(holder):
                raise RunFolderError(
                    f"the run folder {self.folder.url!r} is in use by another run: process {holder.pid} on "
                    f"{holder.hostname}, for {_age(time.time() - holder.since)}, last seen "
                    f"{_age(time.time() - holder.heartbeat)} ago. Wait for it, stop it, or choose another --output "
                    f"(a lock whose holder is gone is taken over after {_age(self.stale_s)})"
                )
            content = self._content()
            written = self._file.create(content) if found is None else self._file.replace(content, found)
            if self._file.needs_settling:
                time.sleep(self.settle_s)
            if not written or self._file.needs_settling:  # `not written`: perhaps only its answer was lost
                winner = self._file.read()
                if not self._is_mine(winner):
                    who = _holder(winner)
                    name = f": process {who.pid} on {who.hostname}" if who else ""
                    raise RunFolderError(
                        f"the run folder {self.folder.url!r} was taken by another run just now{name}. Wait for it, "
                        "stop it, or choose another --output"
                    )
        self.taken_over = holder
        if holder is not None:
            _LOG.warning("took over the lock of process %d on %s, which is gone", holder.pid, holder.hostname)

    def _content(self) -> bytes:
        return json.dumps(asdict(self._me)).encode()

    def _is_mine(self, found: Version | None) -> bool:
        holder = _holder(found)
        return holder is not None and holder.token == self._me.token

    def _stale(self, holder: Holder) -> bool:
        if holder.host == _host():
            return not _alive(holder)
        return time.time() - holder.heartbeat > self.stale_s

    def _beat(self) -> None:
        file = LockFile(self.folder.impatient(), LOCK)
        while not self._stop.wait(self.beat_s):
            with contextlib.suppress(Exception), file.guarded():  # a disk or store that fails: the next beat will do
                found = file.read()
                if found is None or not self._is_mine(found):
                    self.lost = True
                    return
                self._me = replace(self._me, heartbeat=time.time())
                if not file.replace(self._content(), found) and not self._is_mine(file.read()):
                    self.lost = True
                    return


def _holder(found: Version | None) -> Holder | None:
    """The holder; None where there is no lock or it is not one of ours (then it counts as stale)."""
    try:
        return None if found is None else Holder(**json.loads(found.content))
    except (ValueError, TypeError):
        return None


def _alive(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(holder.pid) == holder.process_started


def _started(pid: int) -> str:
    """When the kernel started a process (Linux: clock ticks since boot); empty where it does not say."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "zombie" if state == "Z" else fields[18]


def _host() -> str:
    """Host name with, on Linux, the boot and the process namespace: a pid means nothing in another one."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        names += [file.read(8), str(Path("/proc/self/ns/pid").readlink()).partition(":")[2].strip("[]")]
    return "/".join(names)


def _age(seconds: float) -> str:
    """Seconds for people.

    >>> _age(5), _age(200), _age(8000)
    ('5 s', '3 min', '2 h 13 min')
    """
    if seconds < 120:
        return f"{max(0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
