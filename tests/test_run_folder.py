"""What happens to a run's parts between two starts of the same command: copied, damaged, deleted or brought from
elsewhere. Each is noticed, named and made again; what is left to do is told without touching anything."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.engine_cluster import assert_same_rows
from tests.run_folders import GROUP, SHARDS, config, part, run, save_weights
from xaibatch.cli.evaluate import finish
from xaibatch.errors import RunFolderError, UsageError
from xaibatch.pipeline.run import preview
from xaibatch.results.compact import compact
from xaibatch.results.frames import open_run
from xaibatch.results.parts import RECORD, RunFolder
from xaibatch.results.query import query
from xaibatch.results.seal import SEAL


def zero_the_middle(path: Path, column: str = "image_id") -> None:
    """Overwrite bytes of a column's last page; the file's ends stay."""
    content, group = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0)
    (place,) = (group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column)
    content[place.data_page_offset + 25 : place.data_page_offset + 35] = bytes(10)
    path.write_bytes(content)


def copied(table: str) -> Callable[[Path, Path], Path]:
    def change(run: Path, other: Path) -> Path:
        shutil.copy(part(run, table, 1), part(run, table, 0))
        return part(run, table, 0)

    return change


def other_table(run: Path, other: Path) -> Path:
    shutil.copy(part(run, "maps", 0), part(run, "scores", 0))
    return part(run, "scores", 0)


def zeroed(table: str) -> Callable[[Path, Path], Path]:
    def change(run: Path, other: Path) -> Path:
        zero_the_middle(part(run, table, 2))
        return part(run, table, 2)

    return change


def of_another_run(run: Path, other: Path) -> Path:
    shutil.copy(part(other, "scores", 3), part(run, "scores", 3))
    return part(run, "scores", 3)


def without_seal(run: Path, other: Path) -> Path:
    pq.write_table(pq.read_table(part(run, "maps", 0)), part(run, "maps", 0))
    return part(run, "maps", 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (copied("scores"), f"a copy of the part '{GROUP}/shard-00001'"),
        (copied("maps"), "a copy of the part 'shard-00001'"),
        (copied("failures"), "a copy of the part 'shard-00001'"),
        (copied("predictions"), "a copy of the part 'shard-00001'"),
        (other_table, "a part of the table 'maps'"),
        (zeroed("scores"), "damaged: its content is not what was written"),
        (zeroed("maps"), "damaged: its content is not what was written"),
        (zeroed("predictions"), "damaged: its content is not what was written"),
        (of_another_run, "a part of another run"),
        (without_seal, "it bears no seal"),
    ],
)
def test_a_part_that_is_not_what_its_name_says_is_named_and_made_again(
    data: Path,
    weights: Path,
    finished: Path,
    copy: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path, Path], Path],
    words: str,
) -> None:
    other = Path(run(config(data, weights, tmp_path / "other")).folder.url)
    path = change(copy, other)
    with caplog.at_level(logging.WARNING):
        outcome = run(config(data, weights, copy))
    assert [m for m in caplog.messages if str(path) in m and words in m], caplog.messages
    assert outcome.ok and outcome.num_cells_run == 1
    assert_same_rows(outcome.folder, str(finished))
    assert run(config(data, weights, copy)).num_cells_run == 0


@pytest.mark.parametrize("table", ["failures", "predictions", "maps"])
def test_a_deleted_part_of_the_explanations_is_made_again(
    data: Path, weights: Path, finished: Path, copy: Path, table: str
) -> None:
    part(copy, table, 1).unlink()
    outcome = run(config(data, weights, copy))
    assert outcome.num_cells_run == 1
    assert_same_rows(outcome.folder, str(finished))


def test_a_part_in_a_foreign_place_is_named_and_never_read(
    data: Path, weights: Path, finished: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A `maps` part among the `scores` under a name that this run does not have."""
    stray = copy / "scores" / GROUP / "shard-00077.parquet"
    shutil.copy(part(copy, "maps", 0), stray)
    with caplog.at_level(logging.WARNING):
        outcome = run(config(data, weights, copy))
    assert [m for m in caplog.messages if str(stray) in m and "a part of the table 'maps'" in m]
    assert outcome.num_cells_run == 0
    assert open_run(str(copy)).scores.arrow().num_rows == open_run(str(finished)).scores.arrow().num_rows
    assert list(open_run(str(copy)).scores.problems) == [str(stray)]


def test_copies_and_parts_of_other_runs_are_left_out_of_a_query(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before anybody resumes: rows that would count twice, or for another image, are not read."""
    shutil.copy(part(copy, "scores", 1), part(copy, "scores", 0))
    with caplog.at_level(logging.WARNING):
        (row,) = query(str(copy), "SELECT count(*) AS n, count(DISTINCT image_id) AS images FROM scores").to_pylist()
    assert row == {"n": 9 * 2, "images": 9}
    assert [m for m in caplog.messages if "a copy of the part" in m]


def test_damage_inside_a_compact_part_ends_a_reading_and_is_mended(
    data: Path, weights: Path, finished: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts larger than what a listing reads of them: the pages' checksums tell. The next start of the run sets the
    compact part aside and makes its parts again."""
    compact(str(copy))
    (broken,) = (copy / "scores").glob("*.parquet")
    zero_the_middle(broken, "score")
    monkeypatch.setattr("xaibatch.results.parts._TAIL_BYTES", broken.stat().st_size - 80)
    for read in (lambda: open_run(str(copy)).scores.arrow(), lambda: query(str(copy), "SELECT avg(score) FROM scores")):
        with pytest.raises(RunFolderError, match=rf"{broken.name}: damaged.*run the same `xaibatch evaluate` again"):
            read()
    outcome = run(config(data, weights, copy))
    assert outcome.num_cells_run == SHARDS and not broken.exists()
    monkeypatch.undo()
    assert_same_rows(outcome.folder, str(finished))
    assert open_run(str(copy)).scores.arrow().num_rows == 12 * 2


def test_an_object_store_is_looked_through_too(data: Path, weights: Path, finished: Path) -> None:
    folder = RunFolder("memory://sealed/run")
    run(config(data, weights, folder.url))
    system = folder._fs
    system.pipe_file(folder.path("maps/shard-00000.parquet"), system.cat_file(folder.path("maps/shard-00001.parquet")))
    path = folder.path("scores", GROUP, "shard-00002.parquet")
    content = bytearray(system.cat_file(path))
    content[40:72] = bytes(32)
    system.pipe_file(path, bytes(content))
    assert run(config(data, weights, folder.url)).num_cells_run == 2
    assert_same_rows(folder, str(finished))


def test_a_finished_run_is_looked_through_once(
    data: Path, weights: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look into each part by the whole command, whose last lines read the tables."""
    seen: Counter[str] = Counter()
    tail = RunFolder._tail

    def counted(folder: RunFolder, path: str, num_bytes: int) -> bytes:
        seen[path] += 1
        return tail(folder, path, num_bytes)

    monkeypatch.setattr(RunFolder, "_tail", counted)
    monkeypatch.setattr("xaibatch.results.parts._whole", lambda path: pytest.fail(f"a look too many at {path}"))
    outcome = run(config(data, weights, copy))
    assert outcome.num_cells_run == 0 and finish(outcome, write_report=False) == 0
    assert seen == {str(path): 1 for path in copy.rglob("*.parquet")}


def test_a_large_part_that_begins_otherwise_is_no_part(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger than what is read of it: its beginning is looked at all the same."""
    broken = part(copy, "scores", 1)
    broken.write_bytes(b"none" + broken.read_bytes()[4:])
    monkeypatch.setattr("xaibatch.results.parts._TAIL_BYTES", broken.stat().st_size - 80)
    assert open_run(str(copy)).scores.problems == {str(broken): "truncated or not Parquet"}


def test_the_seal_is_in_the_footer(finished: Path) -> None:
    metadata = pq.read_metadata(part(finished, "maps", 1)).metadata
    seal = json.loads(metadata[SEAL])
    assert seal["run"] == json.loads((finished / RECORD).read_text())["id"] != ""
    assert (seal["table"], seal["part"]) == ("maps", "shard-00001")


def test_a_preview_counts_what_is_missing(data: Path, weights: Path, copy: Path) -> None:
    """Also of a run that was compacted, and without touching it."""
    assert preview(config(data, weights, copy)).num_cells == 0
    part(copy, "maps", 1).unlink()
    assert preview(config(data, weights, copy)).num_cells == 1
    run(config(data, weights, copy))
    compact(str(copy))
    before = sorted(copy.rglob("*"))
    assert preview(config(data, weights, copy)).num_cells == 0
    assert sorted(copy.rglob("*")) == before


def test_a_preview_refuses_what_the_run_would_refuse(data: Path, weights: Path, copy: Path) -> None:
    """Another configuration at once; another checkpoint where work is left."""
    with pytest.raises(RunFolderError, match=r"belongs to another configuration \(seed: 0 there, 3 now\)"):
        preview(config(data, weights, copy, seed=3))
    part(copy, "maps", 1).unlink()
    kept = weights.read_bytes()
    try:
        save_weights(weights, seed=1)
        with pytest.raises(UsageError, match="has changed since the run began"):
            preview(config(data, weights, copy))
    finally:
        weights.write_bytes(kept)
