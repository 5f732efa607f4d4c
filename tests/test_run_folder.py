"""What a run folder goes through between two starts of the same command: parts copied, damaged, deleted or brought from
elsewhere, the folder renamed, the checkpoint or the data changed, the record cut short. Each is noticed and named."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import timm
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import save_file

from tests.engine_cluster import assert_same_rows
from tests.toy import CLASSES, MODEL, Watch, toy_config, toy_images
from xaibatch.cluster.driver import run_on_ray
from xaibatch.config import RunConfig
from xaibatch.errors import EngineError, RunFolderError, UsageError
from xaibatch.pipeline import session_record
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import Outcome, evaluate, preview
from xaibatch.results.compact import compact
from xaibatch.results.frames import open_run
from xaibatch.results.lock import LOCK
from xaibatch.results.parts import RECORD, RunFolder
from xaibatch.results.query import query
from xaibatch.results.seal import SEAL

SETTINGS: dict[str, Any] = {
    "explainers": {"random": {}},
    "metrics": {"effective_complexity": {"eps": 0.1}, "sparseness": {}},
    "engine__shard_size": 3,
}
GROUP = "effective_complexity+sparseness"
SHARDS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "toy.safetensors"
    save_weights(path, seed=0)
    return path


def save_weights(path: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(str(MODEL["model.name"]), num_classes=len(CLASSES), **MODEL["model.options"])
    save_file(model.state_dict(), path, metadata={"classes": ",".join(CLASSES)})


@pytest.fixture(scope="module")
def finished(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests work on copies of it."""
    return Path(run(config(data, weights, tmp_path_factory.mktemp("finished") / "run")).folder.url)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def config(data: Path, weights: Path, output: Path | str, **settings: Any) -> RunConfig:
    made = toy_config(data, Path("unused"), **SETTINGS | {"model__checkpoint": str(weights)} | settings)
    return made.model_copy(update={"output": str(output)})


def run(config: RunConfig, watch: Watch | None = None) -> Outcome:
    return evaluate(config, run_local, watch or Watch())


def part(run: Path, table: str, shard: int) -> Path:
    return run / table / (GROUP if table == "scores" else "") / f"shard-{shard:05d}.parquet"


def zero_the_middle(path: Path, column: str = "image_id") -> None:
    """Overwrite bytes of a column's last page; the file's ends stay."""
    content, group = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0)
    (place,) = (group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column)
    content[place.data_page_offset + 25 : place.data_page_offset + 35] = bytes(10)
    path.write_bytes(content)


# -- parts


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


# -- the model and the data


def test_another_checkpoint_under_the_same_path_is_refused(
    data: Path, finished: Path, weights: Path, copy: Path, tmp_path: Path
) -> None:
    """Only where there is work left: a finished run stays readable without its checkpoint."""
    kept = weights.read_bytes()
    try:
        save_weights(weights, seed=1)
        assert run(config(data, weights, copy)).num_cells_run == 0
        part(copy, "scores", 1).unlink()
        with pytest.raises(
            UsageError, match=r"checkpoint .* has changed since the run began .*choose another --output"
        ):
            run(config(data, weights, copy))
        weights.unlink()
        with pytest.raises(UsageError, match="cannot be read"):
            run(config(data, weights, copy))
    finally:
        weights.write_bytes(kept)
    assert run(config(data, weights, copy)).num_cells_run == 1
    assert_same_rows(str(copy), str(finished))


def test_contents_tell_changed_pixels_of_equal_size(weights: Path, tmp_path: Path) -> None:
    """A listing cannot; that it is only a listing stands in the record."""
    data = toy_images(tmp_path / "data", num_per_class=1)
    thorough = config(data, weights, tmp_path / "run", data__checksum="contents")
    quick = config(data, weights, tmp_path / "quick")
    assert run(thorough).record["data"]["checksum_of"] == "ids, labels, sizes, contents"
    assert run(quick).record["data"]["checksum_of"] == "ids, labels, sizes"
    image = data / "covid" / "0.png"
    content = bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)
    assert run(quick).num_cells_run == 0
    with pytest.raises(RunFolderError, match=r"has changed since the run .*SHA-256 of ids, labels, sizes, contents"):
        run(thorough)


def test_paths_are_below_the_data_s_root(data: Path, finished: Path) -> None:
    rows = open_run(str(finished)).predictions.arrow().to_pylist()
    assert {row["path"] for row in rows} == {str(path.relative_to(data)) for path in data.rglob("*.png")}
    assert all((data / row["path"]).is_file() for row in rows)


# -- renamed and copied folders


def test_a_renamed_run_has_one_name_and_a_copy_its_own(
    data: Path, weights: Path, finished: Path, tmp_path: Path
) -> None:
    """The column `run` is the folder's name when it is read, also where a part was added under the second name."""
    first, second = (Path(shutil.copytree(finished, tmp_path / name)) for name in ("first", "second"))
    part(first, "scores", 0).unlink()
    assert run(config(data, weights, first)).num_cells_run == 1
    sql = "SELECT run, count(*) AS n FROM scores GROUP BY run ORDER BY run"
    both = [{"run": "first", "n": 24}, {"run": "second", "n": 24}]
    assert query([str(first), str(second)], sql).to_pylist() == both
    assert query([str(first), str(second)], sql.replace("GROUP", "WHERE run = 'second' GROUP")).to_pylist() == both[1:]
    for table in ("scores", "predictions", "maps"):
        assert set(getattr(open_run(str(first)), table).arrow()["run"].to_pylist()) == {"first"}
        assert set(RunFolder(str(second)).read(table)["run"].to_pylist()) == {"second"}
    compact(str(first))
    assert query([str(first), str(second)], sql).to_pylist() == both
    assert json.loads((first / RECORD).read_text())["run"] == "first"


# -- the record


def test_a_session_that_is_killed_leaves_its_sums(
    data: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGKILL after four cells: the record has the session, what it had done, and, after the next one, how it ended."""
    settings = config(data, weights, tmp_path / "run")
    child = f"""
import os, signal, sys
from tests.toy import Watch
from xaibatch.config import RunConfig
from xaibatch.pipeline import session_record
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate

class Killing(Watch):
    def done(self, report):
        super().done(report)
        if len(self.reports) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

keep = session_record.SessionRecord.__init__
session_record.SessionRecord.__init__ = lambda *a, **k: keep(*a, **k, keep_s=0)
evaluate(RunConfig.model_validate_json({settings.model_dump_json()!r}), run_local, Killing())
"""
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", child], cwd=root, env=os.environ | {"PYTHONPATH": root}, check=False)
    assert done.returncode == -signal.SIGKILL
    (killed,) = json.loads((tmp_path / "run" / RECORD).read_text())["sessions"]
    assert (killed["state"], killed["num_cells"], killed["num_images"]) == ("running", 4, 6)
    assert killed["seconds"] > 0 and killed["host"] and killed["versions"]["torch"] and "code" in killed
    outcome = run(settings)
    first, second = outcome.record["sessions"]
    assert first == killed | {"state": "killed"}
    assert (second["state"], second["num_cells"]) == ("ended", 2 * SHARDS - 5)
    assert json.loads((tmp_path / "run" / RECORD).read_text()) == outcome.record
    assert not [m for m in caplog.messages if "other versions" in m]


def test_other_versions_are_said(
    data: Path, weights: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "xaibatch.pipeline.record.versions",
        lambda: json.loads((copy / RECORD).read_text())["versions"] | {"torch": "99.0"},
    )
    part(copy, "scores", 0).unlink()
    with caplog.at_level(logging.WARNING):
        outcome = run(config(data, weights, copy))
    assert outcome.record["sessions"][-1]["versions"]["torch"] == "99.0"
    assert [
        m for m in caplog.messages if f"versions.torch: {torch.__version__.partition('+')[0]}" in m and "99.0 now" in m
    ]


def without(*path: str) -> Callable[[dict[str, Any]], Any]:
    def change(record: dict[str, Any]) -> Any:
        inner = record
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return record

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [],
        lambda record: {"format": 1},
        lambda record: record | {"config": {"foreign": 1}},
        lambda record: record | {"model": None},
        lambda record: record | {"explainers": {"random": 3}},
        without("config"),
        without("model", "preprocessing"),
        without("model", "class_names"),
        without("data", "checksum"),
        without("sessions"),
        without("precision", "chosen"),
    ],
)
def test_a_record_that_is_none_is_refused_in_one_line(
    data: Path, weights: Path, copy: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    (copy / RECORD).write_text(json.dumps(change(json.loads((copy / RECORD).read_text()))))
    with pytest.raises(RunFolderError, match=r"[Cc]hoose another --output") as caught:
        run(config(data, weights, copy))
    assert "\n" not in str(caught.value)


# -- folders that are none


def test_a_usage_error_leaves_no_folder(data: Path, weights: Path, tmp_path: Path) -> None:
    for settings in ({"explainers": {"limee": {}}}, {"metrics": {"none": {}}}, {"model__checkpoint": "nowhere.pth"}):
        with pytest.raises(UsageError):
            run(config(data, weights, tmp_path / "new" / "run", **settings))
    assert not (tmp_path / "new").exists()


def test_unknown_protocols_are_refused(data: Path, weights: Path) -> None:
    with pytest.raises(UsageError, match="foo"):
        run(config(data, weights, "foo://bucket/run"))


def test_a_folder_that_holds_no_run_is_not_compacted(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("mine", "nowhere"):
        with pytest.raises(RunFolderError, match="holds no run"):
            compact(str(tmp_path / name))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


# -- the lock


def test_a_run_that_lost_its_folder_stops(
    data: Path, weights: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host's run takes over in the middle: no further shard is begun, and the record, now the other's, stays
    as it is."""
    output = tmp_path / "run"

    class Robbed(Watch):
        def done(self, report: Any) -> None:
            super().done(report)
            if len(self.reports) == 2:
                lock = locks[0]
                now = lock._me.heartbeat
                other = {"token": "t", "host": "elsewhere/1/2", "pid": 1, "process_started": "9"}
                lock.folder.write_json({**other, "since": now, "heartbeat": now}, LOCK)
                lock._thread.join(60)

    locks: list[Any] = []

    class Watched(session_record.SessionRecord):
        def __init__(self, record: Any, folder: Any, lock: Any, watcher: Any) -> None:
            locks.append(lock)
            super().__init__(record, folder, lock, watcher, keep_s=0)

    monkeypatch.setattr("xaibatch.pipeline.run.SessionRecord", Watched)
    monkeypatch.setattr("xaibatch.pipeline.run.RunLock", quick_lock)
    watch = Robbed()
    with pytest.raises(EngineError, match="another run took over the run folder"):
        run(config(data, weights, output), watch)
    assert len(watch.reports) == 2 and watch.left, "the view ends without a last word in the folder"
    assert json.loads((output / LOCK).read_text())["host"] == "elsewhere/1/2"
    assert json.loads((output / RECORD).read_text())["sessions"][0]["state"] == "running"
    (output / LOCK).unlink()
    assert run(config(data, weights, output)).ok
    assert_same_rows(str(output), str(finished))


def test_the_ray_engine_too_stops(
    cluster: Cluster, data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver asks before each shard that it opens and whenever it looks at its replicas."""
    locks: list[Any] = []
    monkeypatch.setattr("xaibatch.pipeline.run.RunLock", lambda folder: locks.append(quick_lock(folder)) or locks[0])

    class Robbed(Watch):
        def done(self, report: Any) -> None:
            super().done(report)
            locks[0].lost = True

    watch, settings = Robbed(), {"engine__threads": 1, "engine__shards_in_flight": 1, "engine__replicas": 1}
    with pytest.raises(EngineError, match="another run took over the run folder"):
        evaluate(config(data, weights, tmp_path / "run", **settings), run_on_ray, watch)
    assert len(watch.reports) < 2 * SHARDS and watch.left
    assert json.loads((tmp_path / "run" / RECORD).read_text())["sessions"][0]["state"] == "running"


def quick_lock(folder: RunFolder) -> Any:
    from xaibatch.results.lock import RunLock

    return RunLock(folder, beat_s=0.05)
