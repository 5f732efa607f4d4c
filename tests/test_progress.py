"""What a run shows: plain lines, a live view on a terminal, progress.json, and sums that add up."""

import errno
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from xaibatch.pipeline.estimate import Estimate
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.progress import PROGRESS, ProgressWatcher
from xaibatch.pipeline.work import CellReport, FailedCell
from xaibatch.results.parts import RunFolder

EXPECTED = Estimate(num_images=8, num_cells=4, num_forward_passes=400, seconds=100.0)
REPORT = CellReport(
    shard="shard-00000", stage="explain", num_images=4, num_forward_passes=100, seconds={"model": 6.0, "write": 0.5}
)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = RunFolder(str(tmp_path / "run"))
    return cast(Job, SimpleNamespace(folder=folder, run=folder.name))


def state(job: Job) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(job.folder.read_bytes(PROGRESS))
    return content


def test_lines_sums_and_json(job: Job) -> None:
    """Two replicas from second 5 on, one of them gone at second 15: 2*10 + 1*5 replica-seconds until second 20, of
    which 12 were the model's. Half of the forward passes done in 15 seconds: 15 seconds left."""
    clock, lines = Clock(), io.StringIO()
    watcher = ProgressWatcher(stream=lines, live=False, line_s=10, json_s=1, clock=clock)
    watcher.start(job, EXPECTED, 3)
    assert state(job)["state"] == "running" and state(job)["num_cells_done_before"] == 3
    clock.now += 5
    watcher.replicas(2)
    clock.now += 10
    watcher.done(REPORT)
    watcher.replicas(1)
    clock.now += 5
    watcher.done(replace(REPORT, stage="faith", num_images=0, seconds={"model": 6.0, "plan": 1.0, "score": 2.0}))
    now = state(job)
    assert now["images_per_second"] == pytest.approx(4 / 15)
    assert now["forward_passes_per_second"] == pytest.approx(200 / 15)
    assert now["seconds_left"] == pytest.approx(15)
    watcher.failed(FailedCell(shard="shard-00001", stage="explain", error="ValueError: no"))
    sums = watcher.finish()
    assert sums["seconds_by_stage"] == {
        "model": 12, "read": 0, "segmentation": 0, "plan": 1, "score": 2, "write": 0.5, "idle": 13,
    }  # fmt: skip
    assert (sums["num_cells"], sums["num_failed_cells"], sums["num_images"], sums["num_replicas"]) == (2, 1, 4, 2)
    assert state(job)["state"] == "stopped"
    printed = lines.getvalue().splitlines()
    assert printed[0] == ("run: 8 images, 4 cells, about 400 forward passes, about 100 s (3 cells are done already)")
    assert "2 model replicas ready" in printed and "given up: shard-00001 explain: ValueError: no" in printed
    assert any(line.startswith("1/4 cells, 4 images") for line in printed)
    assert printed[-1] == (
        "where the time went: model 12 s (48% of the replicas' time), idle 13 s; beside it: "
        "read 0.0 s, segmentation 0.0 s, plan 1.0 s, score 2.0 s, write 0.5 s"
    )


def test_passes_that_nobody_counted_foretell_nothing(job: Job) -> None:
    """A metric that calls the model itself has made more passes than all that were expected: a quarter of the cells is
    a quarter of the way."""
    clock, lines = Clock(), io.StringIO()
    watcher = ProgressWatcher(stream=lines, live=False, json_s=0, clock=clock)
    watcher.start(job, replace(EXPECTED, num_forward_passes=50, uncounted=("quantus:Focus",)), 0)
    watcher.replicas(1)
    clock.now += 10
    watcher.done(REPORT)
    assert state(job)["seconds_left"] == pytest.approx(30)
    assert lines.getvalue().splitlines()[0].endswith("about 50 forward passes; not counted: quantus:Focus")


def test_the_time_left_counts_down_between_cells(job: Job) -> None:
    """A quarter of the cells in ten seconds: thirty left, for ten seconds fewer every second, then twenty until a cell
    ends."""
    clock = Clock()
    watcher = ProgressWatcher(stream=io.StringIO(), live=False, json_s=0, clock=clock)
    watcher.start(job, replace(EXPECTED, num_forward_passes=0), 0)
    watcher.replicas(1)
    watcher.replicas(1)
    assert state(job)["seconds_left"] is None
    clock.now += 10
    watcher.done(REPORT)
    left = []
    for _ in range(4):
        left.append(state(job)["seconds_left"])
        clock.now += 4
        watcher.replicas(1)
    assert left == pytest.approx([30, 26, 22, 20])
    watcher.done(REPORT)
    assert state(job)["seconds_left"] == pytest.approx(26)


def test_lines_are_few(job: Job) -> None:
    """However many cells end, one line in ten seconds."""
    clock, lines = Clock(), io.StringIO()
    watcher = ProgressWatcher(stream=lines, live=False, clock=clock)
    watcher.start(job, replace(EXPECTED, num_cells=1000), 0)
    for _ in range(1000):
        clock.now += 0.0625
        watcher.done(REPORT)
    assert sum("forward passes/s" in line for line in lines.getvalue().splitlines()) == 6


@pytest.mark.parametrize(("place", "num_writes"), [("local", 60), ("memory://progress/run", 4)])
def test_progress_json_is_written_less_often_to_an_object_store(
    job: Job, monkeypatch: pytest.MonkeyPatch, place: str, num_writes: int
) -> None:
    """In two minutes: every two seconds, or every thirty."""
    clock, writes = Clock(), []
    monkeypatch.setattr(RunFolder, "write_json", lambda folder, content, name: writes.append(name))
    folder = job.folder if place == "local" else RunFolder(place)
    watcher = ProgressWatcher(stream=io.StringIO(), live=False, clock=clock)
    watcher.start(cast(Job, SimpleNamespace(folder=folder, run="run")), EXPECTED, 0)
    writes.clear()
    for _ in range(240):
        clock.now += 0.5
        watcher.done(REPORT)
    assert writes == [PROGRESS] * num_writes


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_live_view_on_a_terminal(job: Job, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A terminal gets one bar that is redrawn, not lines; one that cannot redraw gets lines."""
    monkeypatch.setenv("TERM", kind)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    watcher = ProgressWatcher(stream=screen)
    watcher.start(job, EXPECTED, 0)
    watcher.replicas(1)
    watcher.done(REPORT)
    watcher.finish()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert ("1/4 cells" in shown) == (kind == "xterm")
    assert ("1 model replica ready\n" in shown) == (kind == "dumb")
    assert "where the time went" in shown
    assert state(job)["num_cells"] == 1


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), BrokenPipeError(), ValueError("closed file")])
def test_what_cannot_be_shown_is_left_out(job: Job, live: bool, error: Exception) -> None:
    """The log is on a full disk, or its reader is gone: the sums and progress.json are the same."""

    class Failing(io.StringIO):
        def write(self, text: str) -> int:
            raise error

        def flush(self) -> None:
            raise error

    watcher = ProgressWatcher(stream=Failing(), live=live, line_s=0, json_s=0)
    watcher.start(job, EXPECTED, 0)
    watcher.replicas(1)
    watcher.done(REPORT)
    watcher.failed(FailedCell(shard="shard-00001", stage="explain", error="ValueError: no"))
    assert state(job)["num_cells"] == 1
    assert watcher.finish()["num_cells"] == 1 and state(job)["num_failed_cells"] == 1


def test_a_run_that_lost_its_folder_writes_nothing(job: Job) -> None:
    screen = io.StringIO()
    watcher = ProgressWatcher(stream=screen, live=True, json_s=0)
    watcher.start(job, EXPECTED, 0)
    before, shown = job.folder.read_bytes(PROGRESS), screen.getvalue()
    watcher.leave()
    assert job.folder.read_bytes(PROGRESS) == before and "where the time went" not in screen.getvalue()[len(shown) :]


def test_a_run_goes_on_where_its_progress_cannot_be_written(job: Job) -> None:
    watcher = ProgressWatcher(stream=io.StringIO(), json_s=0)
    Path(job.folder.url).write_text("a file where the folder should be")
    watcher.start(job, EXPECTED, 0)
    watcher.done(REPORT)
    assert watcher.finish()["num_cells"] == 1
