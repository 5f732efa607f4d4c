"""One run at a time on a run folder: a lock file with the holder's name, kept alive by heartbeats, taken over when
stale.

The lock only spares people double work and keeps one run from sweeping another's temporary files: two runs of one
configuration would write the same parts with the same content.

Local folders: the lock is made whole by linking a finished file (`os.link` fails where one exists), and whoever takes a
stale one over does so under `flock` on a second file, so that two who find the same stale lock cannot both win. Object
stores: a conditional PUT where the store's fsspec implementation has one (S3, Google Cloud Storage); elsewhere a look
before the write, which leaves a window of one request.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from xaibatch.errors import RunFolderError
from xaibatch.results.parts import RunFolder

_LOG = logging.getLogger(__name__)

LOCK: Final = ".lock"
_GUARD: Final = ".lock.guard"


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

    `lost` turns true when somebody else took the lock over (this process was suspended for longer than `stale_s`).
    """

    def __init__(self, folder: RunFolder, *, beat_s: float = 10.0, stale_s: float = 90.0) -> None:
        self.folder = folder
        self.beat_s = beat_s
        self.stale_s = stale_s
        self.lost = False
        self.taken_over: Holder | None = None
        """The holder of a stale lock that this one replaced."""
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
        with self._guarded(), contextlib.suppress(OSError, RunFolderError):
            if (holder := self._read()) is not None and holder.token == self._me.token:
                self.folder.remove(LOCK)

    def _acquire(self) -> None:
        if self._create():
            return
        with self._guarded():
            holder = self._read()
            if holder is not None and holder.token == self._me.token:
                return  # a store that carried the request out and lost its answer
            if holder is not None and not self._stale(holder):
                raise RunFolderError(
                    f"the run folder {self.folder.url!r} is in use by another run: process {holder.pid} on "
                    f"{holder.hostname}, for {_age(time.time() - holder.since)}, last seen "
                    f"{_age(time.time() - holder.heartbeat)} ago. Wait for it, stop it, or choose another --output "
                    f"(a lock whose holder is gone is taken over after {_age(self.stale_s)})"
                )
            self.taken_over = holder
            if holder is not None:
                _LOG.warning("took over the lock of process %d on %s, which is gone", holder.pid, holder.hostname)
            with contextlib.suppress(FileNotFoundError):
                self.folder.remove(LOCK)
            if not self._create():
                raise RunFolderError(f"the run folder {self.folder.url!r} was taken by another run just now")

    def _create(self) -> bool:
        return self.folder.create_file(self._content(), LOCK)

    def _content(self) -> bytes:
        return json.dumps(asdict(self._me)).encode()

    def _read(self) -> Holder | None:
        """The holder; None where there is no lock or it is not one of ours (then it counts as stale)."""
        try:
            return Holder(**json.loads(self.folder.read_bytes(LOCK)))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _stale(self, holder: Holder) -> bool:
        if holder.host == _host():
            return not _alive(holder)
        return time.time() - holder.heartbeat > self.stale_s

    def _beat(self) -> None:
        while not self._stop.wait(self.beat_s):
            with contextlib.suppress(OSError, RunFolderError), self._guarded():  # on a full disk the next beat will
                holder = self._read()
                if holder is None or holder.token != self._me.token:
                    self.lost = True
                    return
                self._me = replace(self._me, heartbeat=time.time())
                self.folder.impatient().write_bytes(self._content(), LOCK)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Exclusive among the processes that look at this lock, where the file system has `flock`."""
        if not self.folder.is_local:
            yield
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                guard = stack.enter_context(open(self.folder.path(_GUARD), "a"))
                fcntl.flock(guard, fcntl.LOCK_EX)
            yield


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
