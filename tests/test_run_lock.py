"""The run folder's lock: one holder, a refusal that names it, heartbeats, and a takeover that only one wins."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from xaibatch.errors import EngineError, RunFolderError
from xaibatch.results.lock import LOCK, RunLock
from xaibatch.results.parts import RunFolder

HOLD = """
import sys, time
from xaibatch.results.lock import RunLock
from xaibatch.results.parts import RunFolder
with RunLock(RunFolder(sys.argv[1]), beat_s=0.05):
    print("holding", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(str(tmp_path / "run"))
    made.create()
    return made


def hold(folder: RunFolder) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder.url],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None and process.stdout.readline() == "holding\n"
    return process


def end(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_the_second_run_refuses_and_names_the_holder(folder: RunFolder) -> None:
    holder = hold(folder)
    try:
        with pytest.raises(RunFolderError, match=rf"process {holder.pid} on .*, for \d+ s, last seen 0 s ago"):
            RunLock(folder).__enter__()
    finally:
        end(holder, signal.SIGKILL)


def test_a_killed_holder_s_lock_is_taken_over_at_once(folder: RunFolder) -> None:
    holder = hold(folder)
    end(holder, signal.SIGKILL)
    with RunLock(folder) as lock:
        assert lock.taken_over is not None and lock.taken_over.pid == holder.pid
    assert not folder.exists(LOCK)


def test_a_suspended_holder_on_this_host_keeps_its_lock(folder: RunFolder) -> None:
    """Its process is alive, so however old the heartbeat, it may go on."""
    holder = hold(folder)
    holder.send_signal(signal.SIGSTOP)
    try:
        time.sleep(0.3)
        with pytest.raises(RunFolderError, match="in use by another run"):
            RunLock(folder, stale_s=0.1).__enter__()
    finally:
        end(holder, signal.SIGKILL)


def write_foreign(folder: RunFolder, heartbeat_age_s: float) -> None:
    """A lock that a process on another host wrote."""
    now = time.time()
    content = {"token": "t", "host": "elsewhere/1/2", "pid": 1, "process_started": "9", "since": now - 7200}
    folder.write_json({**content, "heartbeat": now - heartbeat_age_s}, LOCK)


def test_another_host_s_lock_is_judged_by_its_heartbeat(folder: RunFolder) -> None:
    write_foreign(folder, heartbeat_age_s=30)
    with pytest.raises(RunFolderError, match=r"process 1 on elsewhere, for 2 h 0 min, last seen 30 s ago.*after 90 s"):
        RunLock(folder).__enter__()
    write_foreign(folder, heartbeat_age_s=91)
    with RunLock(folder):
        pass


def test_a_lock_file_that_is_none_is_replaced(folder: RunFolder) -> None:
    folder.write_bytes(b"not a lock", LOCK)
    with RunLock(folder):
        assert json.loads(folder.read_bytes(LOCK))["pid"] == os.getpid()


def test_heartbeats_and_loss(folder: RunFolder) -> None:
    """The heartbeat moves on; a holder whose lock was taken away notices and does not remove the new one."""
    with RunLock(folder, beat_s=0.02) as lock:
        first = json.loads(folder.read_bytes(LOCK))["heartbeat"]
        deadline = time.monotonic() + 60
        while json.loads(folder.read_bytes(LOCK))["heartbeat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while not lock.lost:  # a beat on its way may write over the first foreign lock
            assert time.monotonic() < deadline
            write_foreign(folder, heartbeat_age_s=0)
            time.sleep(0.2)
    assert json.loads(folder.read_bytes(LOCK))["host"] == "elsewhere/1/2"


def test_of_many_who_find_a_stale_lock_one_wins(folder: RunFolder) -> None:
    """Twelve processes take over the same stale lock at the same moment, four times."""
    context = multiprocessing.get_context("fork")
    for _ in range(4):
        write_foreign(folder, heartbeat_age_s=1000)
        start, done = context.Barrier(12), context.Barrier(12)
        results = context.SimpleQueue()
        contenders = [context.Process(target=contend, args=(folder, start, done, results)) for _ in range(12)]
        for process in contenders:
            process.start()
        for process in contenders:
            process.join()
        assert sum(results.get() for _ in contenders) == 1


def contend(folder: RunFolder, start: Any, done: Any, results: Any) -> None:
    results.put(entered(RunLock(folder), start, done))


def entered(lock: RunLock, start: Any, done: Any) -> bool:
    """Try to enter a lock when all are there; who is in leaves it after the last has tried."""
    start.wait()
    try:
        lock.__enter__()
        won = True
    except RunFolderError:
        won = False
    done.wait()
    if won:
        lock.__exit__(None, None, None)
    return won


def test_of_many_on_a_store_without_conditions_one_wins() -> None:
    """fsspec's memory file system cannot replace a file conditionally: of twelve threads that find a stale lock, or
    none, at the same moment, one enters."""
    folder = RunFolder("memory://locks/crowd")
    for stale in (True, False, True):
        if stale:
            write_foreign(folder, heartbeat_age_s=1000)
        assert sum(crowd(folder, 12)) == 1
        assert not folder.exists(LOCK)


def test_the_earlier_of_two_winners_finds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """B reads the stale lock, is held up for longer than A waits, and then writes: both are in, until A's next
    heartbeat."""
    folder = RunFolder("memory://locks/two")
    write_foreign(folder, heartbeat_age_s=1000)
    first, second = RunLock(folder, beat_s=0.05, settle_s=0.05), RunLock(folder, settle_s=0.05)
    content = second._content

    def held_up() -> bytes:
        monkeypatch.undo()
        first.__enter__()
        return content()

    monkeypatch.setattr(second, "_content", held_up)
    with second:
        deadline = time.monotonic() + 60
        while not first.lost:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(EngineError, match="another run took over"):
            first.check()
        first.__exit__(None, None, None)
        second.check()
        assert folder.exists(LOCK) and not second.lost
    assert not folder.exists(LOCK)


def test_a_store_client_that_drops_the_mode_overwrites_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Early releases of s3fs take `mode` for one more keyword of S3 and drop it: creation would replace what is
    there."""
    filesystem = fsspec.filesystem("memory")
    pipe = type(filesystem).pipe_file
    monkeypatch.setattr(type(filesystem), "pipe_file", lambda self, path, value, **_: pipe(self, path, value))
    folder = RunFolder("memory://locks/old")
    assert folder.create_file(b"1", "file") and not folder.create_file(b"2", "file")
    assert folder.read_bytes("file") == b"1"
    with RunLock(folder, settle_s=0.01), pytest.raises(RunFolderError, match="in use by another run"):
        RunLock(folder, settle_s=0.01).__enter__()


def crowd(folder: RunFolder, num: int) -> list[bool]:
    """Let that many threads enter a lock at the same moment; all that did leave it after the last has tried."""
    start, done = threading.Barrier(num), threading.Barrier(num)

    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(lambda _: entered(RunLock(folder, settle_s=0.3), start, done), range(num)))


def test_a_full_disk_is_said(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"cannot write .*\.lock.*No space left"):
        RunLock(folder).__enter__()


def test_object_store() -> None:
    """On a store without `flock` the refusal, the heartbeat's verdict and the release are the same."""
    folder = RunFolder("memory://locks/run")
    with RunLock(folder, beat_s=0.02):
        with pytest.raises(RunFolderError, match="in use by another run"):
            RunLock(folder).__enter__()
        time.sleep(0.1)
    assert not folder.exists(LOCK)
    write_foreign(folder, heartbeat_age_s=1000)
    with RunLock(folder) as lock:
        assert lock.taken_over is not None and lock.taken_over.host == "elsewhere/1/2"
