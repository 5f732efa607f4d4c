"""Run folders: whole parts or none, listings that name what is broken or foreign, waiting with a limit."""

import errno
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xaibatch.errors import RunFolderError
from xaibatch.results.atomic import FORGOTTEN_S
from xaibatch.results.parts import STAGING, RunFolder
from xaibatch.results.retrying import Retries
from xaibatch.results.schema import FAILURES, failures_table
from xaibatch.types import Failure

QUICK = Retries(attempts=4, first_pause_s=0.001)


def rows(num: int, word: str = "x") -> pa.Table:
    return failures_table(
        [Failure(image_id=f"{word}{i}", stage="read", error="ImageError", message="no image") for i in range(num)],
        run="r",
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(str(tmp_path / "run"), retries=QUICK)
    made.create()
    return made


def test_a_part_is_written_whole_and_read_back(folder: RunFolder) -> None:
    folder.write_part("failures", "shard-00000", rows(3))
    folder.write_part("failures", "shard-00001", rows(2, "y"))
    folder.write_part("failures", "shard-00001", rows(2, "y"))
    assert list(folder.parts("failures")) == ["shard-00000", "shard-00001"]
    assert folder.read("failures").column("image_id").to_pylist() == ["x0", "x1", "x2", "y0", "y1"]
    assert folder.read("scores").num_rows == 0
    assert not list(Path(folder.path(STAGING)).iterdir())


def test_rows_of_another_schema_are_refused(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="another schema"):
        folder.write_part("scores", "shard-00000", rows(1))


@pytest.mark.parametrize("keep", [0, 3, 11, 40, -1])
def test_truncated_parts_are_noticed(folder: RunFolder, keep: int) -> None:
    """Cut anywhere, a part is a problem and not a part."""
    folder.write_part("failures", "shard-00000", rows(3))
    path = Path(folder.path("failures", "shard-00000.parquet"))
    path.write_bytes(path.read_bytes()[:keep])
    assert folder.parts("failures") == {}
    assert folder.problems("failures") == {str(path): "truncated or not Parquet"}


def test_a_tail_without_its_head_is_noticed(folder: RunFolder) -> None:
    """Both magic numbers are there but the footer that the tail announces is not."""
    folder.write_part("failures", "shard-00000", rows(3))
    path = Path(folder.path("failures", "shard-00000.parquet"))
    whole = path.read_bytes()
    path.write_bytes(b"PAR1" + whole[-100:])
    assert folder.problems("failures") == {str(path): "truncated or not Parquet"}


def test_foreign_files_are_named_and_never_read(folder: RunFolder) -> None:
    folder.write_part("failures", "shard-00000", rows(1))
    table = Path(folder.path("failures"))
    (table / "notes.txt").write_text("mine")
    (table / "shard-00000 (copy).parquet").write_bytes((table / "shard-00000.parquet").read_bytes())
    (table / "shard-00007.parquet").write_text("this is not Parquet, whatever its name says")
    assert folder.problems("failures") == {
        str(table / "notes.txt"): "not a Parquet part",
        str(table / "shard-00000 (copy).parquet"): "a foreign name: no part is called so",
        str(table / "shard-00007.parquet"): "truncated or not Parquet",
    }
    assert folder.read("failures").num_rows == 1


def test_a_part_that_is_broken_inside_is_named_when_read(folder: RunFolder) -> None:
    folder.write_part("failures", "shard-00000", rows(50))
    path = Path(folder.path("failures", "shard-00000.parquet"))
    whole = bytearray(path.read_bytes())
    footer = int.from_bytes(whole[-8:-4], "little")
    whole[-8 - footer : -8] = bytes(footer)
    path.write_bytes(whole)
    with pytest.raises(RunFolderError, match=r"shard-00000.*remove it and run the same command again"):
        folder.read("failures")


def test_a_full_disk_is_waited_for(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space turns up at the third attempt: the part is there, nothing half-written ever was."""
    failing(monkeypatch, "fsync", errno.ENOSPC, times=2)
    folder.write_part("failures", "shard-00000", rows(2))
    assert folder.read("failures").num_rows == 2
    assert not list(Path(folder.path(STAGING)).iterdir())


def test_a_disk_that_stays_full_is_given_up(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "fsync", errno.ENOSPC, times=99)
    with pytest.raises(RunFolderError, match=r"No space left.*4 attempts.*run the same command again"):
        folder.write_part("failures", "shard-00000", rows(2))
    assert folder.parts("failures") == {} and folder.problems("failures") == {}
    assert not list(Path(folder.path(STAGING)).iterdir())


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing(monkeypatch, "fsync", errno.EROFS, times=99)
    with pytest.raises(RunFolderError, match=r"cannot write to the output folder.*Read-only.*Choose another --output"):
        RunFolder(str(tmp_path / "run")).create()
    assert calls() == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write to the output folder"):
        RunFolder(str(tmp_path / "file" / "run")).create()


def failing(patch: pytest.MonkeyPatch, name: str, number: int, times: int) -> Callable[[], int]:
    """Let a function of `os` fail that often; returns a count of its calls."""
    real, calls = getattr(os, name), []

    def call(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    patch.setattr(os, name, call)
    return lambda: len(calls)


@pytest.mark.parametrize("has_links", [True, False])
def test_one_of_many_creates_a_file(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    """Of eight processes that create the same file at once, one does; also where the file system has no links."""
    if not has_links:
        failing(monkeypatch, "link", errno.EPERM, times=99)
    with multiprocessing.get_context("fork").Pool(8) as pool:
        won = pool.map(_create, [(folder, str(i)) for i in range(8)])
    assert sum(won) == 1
    assert folder.read_bytes("only").decode() == str(won.index(True))


def _create(arguments: tuple[RunFolder, str]) -> bool:
    folder, content = arguments
    return folder.create_file(content.encode(), "only")


def test_sweep_removes_what_a_killed_writer_left(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer killed before its rename leaves a temporary file and no part; a compaction's folder is left alone until
    it is forgotten."""
    pid = os.fork()
    if pid == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        folder.write_part("failures", "shard-00000", rows(2))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert folder.parts("failures") == {} and len(list(Path(folder.path(STAGING)).iterdir())) == 1
    compaction = Path(folder.path(STAGING)) / "tmp-compaction"
    compaction.mkdir()
    assert folder.sweep() == 1
    assert list(Path(folder.path(STAGING)).iterdir()) == [compaction]
    long_ago = time.time() - FORGOTTEN_S - 1
    os.utime(compaction, (long_ago, long_ago))
    assert folder.sweep() == 1 and not list(Path(folder.path(STAGING)).iterdir())


def test_pickled_folder_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker in another working directory opens the same folder."""
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(RunFolder("runs/first", retries=QUICK))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened = pickle.loads(sent)
    assert opened.path("x") == str(tmp_path / "runs" / "first" / "x") and opened.retries == QUICK


def test_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same behaviour on a store (fsspec's memory file system) of which every second request fails."""
    folder = RunFolder("memory://bucket/run", retries=Retries(attempts=6, first_pause_s=0.0))
    folder.create()
    filesystem = fsspec.filesystem("memory")

    def flaky(method: Callable[..., object]) -> Callable[..., object]:
        calls = []

        def call(*arguments: object, **keywords: object) -> object:
            calls.append(method)
            if len(calls) % 2:
                raise ConnectionError("reset by peer")
            return method(*arguments, **keywords)

        return call

    for name in ("pipe_file", "cat_file", "find", "open"):
        monkeypatch.setattr(filesystem, name, flaky(getattr(filesystem, name)))
    folder.write_part("failures", "shard-00000", rows(3))
    folder.write_json({"a": 1}, "run.json")
    assert folder.read("failures").num_rows == 3 and folder.read_json("run.json") == {"a": 1}
    assert not folder.exists("elsewhere")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("elsewhere")
    assert folder.create_file(b"1", "lock") and not folder.create_file(b"2", "lock")
    monkeypatch.undo()
    filesystem.rm("/bucket", recursive=True)


def test_schema_of_parts_is_the_table_s(folder: RunFolder) -> None:
    folder.write_part("failures", "shard-00000", rows(2))
    assert pq.read_schema(folder.path("failures", "shard-00000.parquet")).equals(FAILURES)
