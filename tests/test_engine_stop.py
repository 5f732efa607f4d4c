"""SIGINT and SIGTERM in the middle of a run: a clean end, a word on how to go on, the shell's exit codes, nothing
lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import typer
from ray.cluster_utils import Cluster

from tests.engine_chaos import EXPLAINERS, METRICS, write_config
from tests.engine_cluster import ROOT, assert_same_rows
from tests.toy import Watch, toy_config
from xaibatch.cli import run_app
from xaibatch.cluster.driver import run_on_ray
from xaibatch.config import EngineConfig
from xaibatch.errors import EngineError, StoppedError
from xaibatch.perturb.runner import PlanRunner
from xaibatch.pipeline.device import device_here
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import Outcome, evaluate
from xaibatch.pipeline.session import Session
from xaibatch.pipeline.stopping import Interrupted, StopFlag, handlers_kept, interruptible
from xaibatch.pipeline.work import CellReport
from xaibatch.results.lock import LOCK


def test_signals_end_a_run_cleanly(cluster: Cluster, faults: Path, images: Path, tmp_path: Path) -> None:
    """Each signal comes while a replica or a writer is at work. The command says how to go on, gives the lock and the
    replicas back and exits with 128 + signal; the finished cells stay, and the run ends like an undisturbed one."""
    settings = {"explainers": EXPLAINERS, "metrics": METRICS, "engine__shard_size": 1, "engine__threads": 1}
    plain = evaluate(toy_config(images, tmp_path / "plain", **settings), run_local, Watch())
    config = toy_config(images, tmp_path / "run", **settings)
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--address", cluster.address]
    command += ["--config", str(write_config(config, tmp_path / "run.yaml"))]
    (faults / "markers").touch()
    num_parts = 0
    for number, step in ((signal.SIGINT, "replica"), (signal.SIGTERM, "write")):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(os.environ))
        deadline = time.monotonic() + 180
        while len(parts(tmp_path)) < num_parts + 4 or not list(faults.glob(f"{step}-*")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number, (tmp_path / "log").read_text()
        printed = (tmp_path / "log").read_text()
        assert (
            f"error: stopped by {number.name}: everything finished so far is kept, the same command goes on" in printed
        )
        assert "where the time went: model" in printed and "Traceback" not in printed
        assert not (tmp_path / "run" / LOCK).exists()
        num_parts = len(parts(tmp_path))
    (faults / "markers").unlink()
    assert ray.is_initialized()
    outcome = evaluate(config, run_on_ray, Watch())
    assert outcome.ok and outcome.num_cells_run < 12 * 4
    assert_same_rows(outcome.folder, plain.folder)


def test_no_step_is_ever_cancelled() -> None:
    """`ray.cancel` aborts the process that calls it where it meets a step just sent or just ending: once in a hundred
    calls or so, which no test of a run would notice."""
    modules = {path: path.read_text() for folder in ("xaibatch", "jobs") for path in (ROOT / folder).rglob("*.py")}
    assert any("ray.kill(" in text for text in modules.values()), "the package is read"
    assert not [path.name for path, text in modules.items() if "ray.cancel(" in text]


def parts(folder: Path) -> list[Path]:
    return [*folder.glob("run/maps/*.parquet"), *folder.glob("run/scores/*/*.parquet")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_plain_engine_stops_after_the_cell_at_hand(images: Path, tmp_path: Path, number: signal.Signals) -> None:
    class Interrupting(Watch):
        def done(self, report: CellReport) -> None:
            super().done(report)
            if len(self.reports) == 1:
                os.kill(os.getpid(), number)

    config = toy_config(images, tmp_path / "run", explainers={"random": {}}, metrics={"effective_complexity": {}})
    with pytest.raises(StoppedError, match=f"stopped by {number.name}") as stopped:
        evaluate(config, run_local, Interrupting())
    assert stopped.value.exit_code == 128 + number
    assert len(parts(tmp_path)) == 1
    assert evaluate(config, run_local, Watch()).num_cells_run == 5


def test_the_plain_engine_stops_after_the_batch_at_hand(images: Path, tmp_path: Path) -> None:
    """In the middle of a sampling explainer's copies, which is no error of the images; and a metric of many copies."""
    signalled: list[int] = []

    def run(**settings: Any) -> tuple[int, Outcome]:
        """Batches until it stopped, where the signal comes with the third one, and the outcome of the next call."""
        batches = 0

        def counted(runner: PlanRunner, *arguments: Any) -> Any:
            nonlocal batches
            batches += 1
            if batches == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return attempt(runner, *arguments)

        attempt = PlanRunner._attempt
        config = toy_config(images, tmp_path / str(len(signalled)), **settings)
        signalled.append(signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PlanRunner, "_attempt", counted)
            with pytest.raises(StoppedError):
                evaluate(config, run_local, Watch())
        return batches, evaluate(config, run_local, Watch())

    lime = {"num_samples": 64, "segmentation": "grid"}
    for num_left, settings in (
        (6, {"explainers": {"lime": lime}, "metrics": {"effective_complexity": {}}}),
        (5, {"explainers": {"random": {}}, "metrics": {"faithfulness_correlation": {"num_runs": 64}}}),
    ):
        batches, again = run(**settings)
        assert batches == 3
        assert again.ok and again.num_image_failures == 0 and again.num_cells_run == num_left


def test_the_plain_engine_computes_where_and_how_it_is_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(images, tmp_path / "run", engine__device="cuda", engine__threads=3)
    seen: list[tuple[str, int]] = []

    class Seeing(Session):
        def __init__(self, job: Job, *, device: str) -> None:
            seen.append((device, torch.get_num_threads()))
            super().__init__(job, device="cpu")

    monkeypatch.setattr("xaibatch.pipeline.local.Session", Seeing)
    before = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"engine\.device is 'cuda' but PyTorch finds no CUDA"):
        evaluate(config, run_local, Watch())
    assert device_here(EngineConfig()) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert evaluate(config, run_local, Watch()).ok
    assert seen == [("cuda", 3)] and torch.get_num_threads() == before
    assert device_here(EngineConfig()) == "cuda" and device_here(EngineConfig(device="cpu")) == "cpu"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_cluster_comes_or_goes(
    cluster: Cluster, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """While it comes, the run stops before any work; while it goes, everything is done and the run ends as usual."""
    moment = "comes"

    @contextmanager
    def signalled(engine: EngineConfig) -> Iterator[None]:
        if moment == "comes":
            os.kill(os.getpid(), number)
        yield
        if moment == "goes":
            os.kill(os.getpid(), number)

    monkeypatch.setattr("xaibatch.cluster.driver.connected", signalled)
    settings = {"explainers": {"random": {}}, "metrics": {"effective_complexity": {}}, "engine__threads": 1}
    config, before = toy_config(images, tmp_path / "run", **settings), signal.getsignal(number)
    with pytest.raises(StoppedError, match=f"stopped by {number.name}"):
        evaluate(config, run_on_ray, Watch())
    assert not parts(tmp_path) and not (tmp_path / "run" / LOCK).exists()
    moment = "goes"
    assert evaluate(config, run_on_ray, Watch()).num_cells_run == 6
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_engine_unwinds(
    from_a_shell: None, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """While images are read or the table is made: locks are given back, and it is one line."""
    app, unwound = typer.Typer(pretty_exceptions_enable=False), []

    @app.command()
    def command() -> None:
        try:
            os.kill(os.getpid(), number)
            pytest.fail("the signal was not delivered")
        except Exception:
            pytest.fail("the signal was taken for an error")
        finally:
            unwound.append(True)

    with pytest.raises(SystemExit) as ended:
        run_app(app, [])
    assert ended.value.code == 128 + number and unwound
    assert capsys.readouterr().err == f"error: stopped by {number.name}\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_ignored(from_a_shell: None) -> None:
    """As for a process that a shell began in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_second_signal_acts_as_it_did_before(from_a_shell: None) -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_others_do_not_stay(from_a_shell: None) -> None:
    """Ray's own end the process in the middle of things. Also where the flag was set while they were put in place."""
    with StopFlag() as stop:
        with handlers_kept():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("the other handler was called"))
        assert stop.requested and signal.getsignal(signal.SIGTERM) == stop._note
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def from_a_shell() -> Iterator[None]:
    """Handlers as a process has that was typed: others are inherited where a shell began the tests in background."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
