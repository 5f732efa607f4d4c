"""Compaction: every row once, before, after and after a kill; in one line where a disk is full."""

import errno

import pyarrow as pa
import pytest

from tests.synthetic_run import Design, make_run
from xaibatch.errors import RunFolderError
from xaibatch.results import compact as compact_module
from xaibatch.results.compact import compact, list_parts
from xaibatch.results.frames import open_run
from xaibatch.results.lock import RunLock
from xaibatch.results.parts import RunFolder
from xaibatch.results.query import query
from xaibatch.results.schema import SCORES

COUNT = "SELECT count(*) AS n, count(DISTINCT image_id) AS images, round(sum(score), 6) AS total FROM scores"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "first"
    make_run(folder, Design(num_images=24, shard_size=8, repeats=2))
    return folder


def tables(folder):
    run = open_run(folder)
    scores = sorted(
        run.scores.arrow().to_pylist(), key=lambda r: (r["image_id"], r["explainer"], r["metric"], r["repeat"])
    )
    maps = sorted(run.maps.arrow().to_pylist(), key=lambda r: (r["image_id"], r["explainer"], r["repeat"]))
    return scores, maps


def test_compaction_keeps_every_row_and_every_part_s_name(run):
    before, names = tables(run), list_parts(RunFolder(str(run)), "scores").present
    done = compact(str(run))
    assert {entry.table: entry.num_parts for entry in done} == {"scores": 12, "predictions": 3, "maps": 3}
    assert tables(run) == before
    assert list_parts(RunFolder(str(run)), "scores", depth="names").present == names
    assert len(names) == 12
    assert len(list((run / "scores").rglob("*.parquet"))) == 1
    assert not compact(str(run))
    assert str(compact(str(run))) == "nothing to merge"


def test_parts_that_come_later_join_the_compact_ones(run):
    compact(str(run))
    folder = RunFolder(str(run))
    row = open_run(run).scores.arrow().slice(0, 1).to_pylist()[0]
    for image in ("shard-00098", "shard-00099"):
        folder.write_part("scores", f"later/{image}", pa.Table.from_pylist([{**row, "image_id": image}], schema=SCORES))
    assert open_run(run).scores.arrow().num_rows == 24 * 5 * 4 * 2 + 2
    assert [entry.num_parts for entry in compact(str(run))] == [2]
    assert open_run(run).scores.arrow().num_rows == 24 * 5 * 4 * 2 + 2
    assert {"later/shard-00098", "later/shard-00099"} < list_parts(folder, "scores").present


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_kill_while_parts_are_removed_leaves_every_row_once(run, monkeypatch, after):
    before = tables(run)
    removed = []

    def remove(filesystem, parts):
        for path in parts.values():
            if len(removed) == after:
                raise Killed
            removed.append(path)
            filesystem.rm_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(compact_module, "_remove", remove)
        with pytest.raises(Killed):
            compact(str(run))
    folder = RunFolder(str(run))
    assert len(list_parts(folder, "scores").leftover) == 12 - after
    assert tables(run) == before
    assert len(list_parts(folder, "scores").present) == 12
    compact(str(run))
    assert tables(run) == before
    assert len(list((run / "scores").rglob("*.parquet"))) == 1


def test_a_kill_while_the_compact_part_is_written_leaves_the_parts(run, monkeypatch):
    before = tables(run)

    def merge(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(compact_module, "_merge", merge)
        with pytest.raises(Killed):
            compact(str(run))
    assert tables(run) == before
    assert len(list((run / "scores").rglob("*.parquet"))) == 12


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("tempfile.TemporaryDirectory", FULL),
        ("SealedFile.write", FULL),
        ("SealedFile.write", pa.ArrowInvalid("no room")),
        ("SealedFile.__exit__", FULL),
        ("_remove", PermissionError("not yours")),
    ],
)
def test_a_full_disk_ends_a_compaction_in_one_line_and_leaves_every_row_once(run, monkeypatch, place, error):
    before = tables(run)
    with monkeypatch.context() as patch:
        patch.setattr(f"xaibatch.results.compact.{place}", failing(error))
        with pytest.raises(RunFolderError, match=r"cannot merge the parts of 'scores'.* Every row is still there"):
            compact(str(run))
    assert tables(run) == before
    assert not list((run / ".staging").iterdir())
    assert {entry.table for entry in compact(str(run))} >= {"predictions", "maps"}
    assert tables(run) == before


class Counted:
    """A table that counts how often its size is asked for."""

    asked = 0

    def __init__(self, table):
        self.table = table

    def select(self, names):
        return Counted(self.table.select(names))

    def cast(self, schema):
        return Counted(self.table.cast(schema))

    @property
    def num_rows(self):
        Counted.asked += 1
        return self.table.num_rows

    @property
    def nbytes(self):
        Counted.asked += 1
        return self.table.nbytes


def test_the_work_of_a_compaction_grows_with_the_number_of_parts_and_no_faster(run, monkeypatch):
    filesystem, paths = compact_module.open_filesystem(RunFolder(str(run))), [str(run / "run.json")] * 120
    rows, concatenate = open_run(run).scores.arrow().slice(0, 3), pa.concat_tables
    with monkeypatch.context() as patch:
        patch.setattr(compact_module.pq, "read_table", lambda *_, **__: Counted(rows))
        patch.setattr(compact_module.pa, "concat_tables", lambda parts: concatenate([part.table for part in parts]))
        patch.setattr(compact_module, "ROWS_PER_GROUP", 300)
        groups = list(compact_module._groups(filesystem, "scores", paths))
    assert [group.num_rows for group in groups] == [300, 60]
    assert Counted.asked <= 2 * len(paths)


def test_a_run_in_progress_is_not_compacted(run):
    with RunLock(RunFolder(str(run))), pytest.raises(RunFolderError, match="in use"):
        compact(str(run))


def test_an_object_store_is_compacted_too():
    make_run("memory://bucket/other", Design(num_images=12, shard_size=4))
    before = query("memory://bucket/other", COUNT)
    assert len(compact("memory://bucket/other")) == 3
    assert query("memory://bucket/other", COUNT) == before
