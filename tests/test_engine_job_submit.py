"""`ray job submit` as jobs/README.md has it, against a head node of the test's own that asks for a token."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.engine_chaos import write_config
from tests.engine_cluster import ROOT, assert_same_rows
from tests.toy import Watch, toy_config
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate

SETTINGS: dict[str, Any] = {
    "explainers": {"attention_rollout_max": {"discard_ratio": 0.5}, "random": {}},
    "metrics": {"effective_complexity": {"eps": 0.1}},
    "engine__threads": 1,
    "engine__shard_size": 6,
}

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_ports(num: int) -> list[int]:
    """Ports that nobody listens on, above those that Ray hands out to workers by default."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < num:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            if one.getsockname()[1] > 22000:
                found.append(one.getsockname()[1])
    return found


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of the dashboard of a head node that asks for a token, and an environment that has it."""
    folder = tempfile.mkdtemp(prefix="xb-")
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("0123456789abcdef" * 2)
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": folder,
        "OMP_NUM_THREADS": "1",
    }
    gcs, dashboard, agent, agent_grpc, client, metrics = free_ports(6)
    command = [
        *RAY, "start", "--head", "--block", f"--temp-dir={folder}", "--num-cpus=2", "--num-gpus=0",
        f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", "--min-worker-port=20000", "--max-worker-port=21999",
    ]  # fmt: skip
    with (Path(folder) / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 180
        while not answers(address):
            assert process.poll() is None and time.monotonic() < deadline, (Path(folder) / "log").read_text()
            time.sleep(0.5)
        yield address, environment
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    time.sleep(1)
                except ProcessLookupError:
                    break


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=5) as answer:
            return "ray_version" in json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False


def submit(head: tuple[str, dict[str, str]], *arguments: str, **changes: str | None) -> tuple[int, str]:
    """Exit code and output of the documented command."""
    address, environment = head
    environment = {name: value for name, value in (environment | changes).items() if value is not None}
    command = [*RAY, "job", "submit", "--address", address, "--working-dir", ".", "--"]
    done = subprocess.run(
        [*command, "python", "jobs/evaluate.py", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_submitted_job(head: tuple[str, dict[str, str]], images: Path, tmp_path: Path) -> None:
    """The working directory goes up, arguments arrive as they were given, the log is readable lines, the job's exit
    code is the command's, and the rows are those of the plain engine."""
    config = toy_config(images, tmp_path / "a run", **SETTINGS)
    plain = evaluate(toy_config(images, tmp_path / "plain", **SETTINGS), run_local, Watch())
    file = write_config(config.model_copy(update={"output": None}), tmp_path / "toy.yaml")
    output = str(tmp_path / "a run")
    code, log = submit(head, "--config", str(file), "--output", output, "--set", "maps.upsampling=bilinear")
    assert code == 0, log
    assert_same_rows(output, plain.folder)
    assert "1 model replica ready" in log and "4 of 4 cells, 12 images" in log and "where the time went: model" in log
    assert "\x1b[?25l" not in log  # no live view in a log
    assert "Traceback" not in log and "12 scored" in log and f"results: {output}" in log


def test_a_usage_error_fails_the_job_readably(head: tuple[str, dict[str, str]], images: Path) -> None:
    """`ray job submit` ends with 1 whatever the command ended with; the command's own code stands in the last lines."""
    code, log = submit(head, "--data", str(images), "--set", "engine.replica=2")
    assert code == 1
    assert "error: configuration: unknown option 'engine.replica'. Did you mean 'replicas'?" in log
    assert "exit code 2" in log and "Traceback" not in log


def test_results_in_the_uploaded_copy_are_refused(head: tuple[str, dict[str, str]], images: Path) -> None:
    """Without --output a run would be written to the copy of the working directory, which Ray deletes."""
    code, log = submit(head, "--data", str(images), "--set", "model.untrained=true")
    assert code == 1
    assert "error: --output (none) lies in the copy of the working directory that Ray deletes after the job" in log


def test_without_the_token_nothing_is_accepted(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """`ray job submit` says that a token is missing; another token is refused too."""
    other = tmp_path / "token"
    other.write_text("f" * 32)
    code, log = submit(head, "--help", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN_PATH=None)
    assert code != 0 and "token" in log.lower() and "Usage: evaluate.py" not in log
    code, log = submit(head, "--help", RAY_AUTH_TOKEN_PATH=str(other))
    assert code != 0 and "Usage: evaluate.py" not in log
