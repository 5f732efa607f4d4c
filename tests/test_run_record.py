"""What a run's record tells the next start of the same command: the checkpoint or the data changed, the folder renamed,
a session killed, other versions, the record cut short; and folders that hold no run."""

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

import pytest
import torch

from tests.engine_cluster import assert_same_rows
from tests.run_folders import SHARDS, config, part, run, save_weights
from tests.toy import toy_images
from xaibatch.errors import RunFolderError, UsageError
from xaibatch.results.compact import compact
from xaibatch.results.frames import open_run
from xaibatch.results.parts import RECORD, RunFolder
from xaibatch.results.query import query

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
    assert run(thorough).record["data"]["checksum_of"].endswith(", sizes, contents")
    assert run(quick).record["data"]["checksum_of"].endswith(", sizes")
    image = data / "covid" / "0.png"
    content = bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)
    assert run(quick).num_cells_run == 0
    with pytest.raises(RunFolderError, match=r"has changed since the run .*SHA-256 of ids, labels, .* contents"):
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
