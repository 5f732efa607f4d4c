"""SIGINT and SIGTERM in the middle of a run: a clean end, a word on how to go on, the shell's exit codes, nothing
lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.engine_chaos import EXPLAINERS, METRICS, write_config
from tests.engine_cluster import ROOT, assert_same_rows
from tests.toy import Watch, toy_config
from xaibatch.cluster.driver import run_on_ray
from xaibatch.errors import StoppedError
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate
from xaibatch.pipeline.stopping import StopFlag
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


def parts(folder: Path) -> list[Path]:
    return [*folder.glob("run/maps/*.parquet"), *folder.glob("run/scores/*/*.parquet")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_plain_engine_stops_after_the_shard_at_hand(images: Path, tmp_path: Path, number: signal.Signals) -> None:
    class Interrupting(Watch):
        def done(self, report: CellReport) -> None:
            super().done(report)
            if len(self.reports) == 1:
                os.kill(os.getpid(), number)

    config = toy_config(images, tmp_path / "run", explainers={"random": {}}, metrics={"effective_complexity": {}})
    with pytest.raises(StoppedError, match=f"stopped by {number.name}") as stopped:
        evaluate(config, run_local, Interrupting())
    assert stopped.value.exit_code == 128 + number
    assert len(parts(tmp_path)) == 2
    assert evaluate(config, run_local, Watch()).num_cells_run == 4


def test_a_second_signal_acts_as_it_did_before() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began this in background
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
