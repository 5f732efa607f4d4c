"""`precision: auto` where the sample cannot be measured: nothing is chosen without evidence, the run goes on in float32
and says so, and a signal, a lost device or a lost cluster ends it like at any other time."""

import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from tests.toy import Watch, toy_config, toy_images
from xaibatch.cluster import calibration
from xaibatch.cluster.calibration import calibrate_on_ray
from xaibatch.cluster.replica import Replica
from xaibatch.data.sampling import sample
from xaibatch.data.storage import StoreError
from xaibatch.errors import EngineError, StoppedError
from xaibatch.perturb.runner import PlanRunner
from xaibatch.pipeline import calibrate, run
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.local import calibrate_local, run_local
from xaibatch.pipeline.run import Calibrate, Outcome, choose_images, evaluate
from xaibatch.types import ZERO_DENOMINATOR, Score, Shard

SETTINGS: dict[str, Any] = {
    "explainers": {"random": {}},
    "metrics": {"faithfulness_correlation": {"num_runs": 8, "subset_size": 100}},
    "precision__default": "auto",
    "precision__num_images": 3,
    "engine__threads": 1,
}


@pytest.fixture(autouse=True)
def _worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "WORTH_IMAGES", 1)
    monkeypatch.setattr(calibrate, "has_fast_bfloat16", lambda device: True)


def calibrated(images: Path, output: Path, calibration: Calibrate = calibrate_local) -> Outcome:
    return evaluate(toy_config(images, output, **SETTINGS), run_local, Watch(), calibration)


def assert_float32(outcome: Outcome, why: str, caplog: pytest.LogCaptureFixture) -> None:
    precision = outcome.folder.read_json("run.json")["precision"]
    assert outcome.ok and set(precision["chosen"].values()) == {"float32"}
    assert precision["why"] == why
    assert [m for m in caplog.messages if why in m and "the whole run is computed in float32" in m]


def test_a_sample_that_cannot_be_read_decides_nothing(tmp_path: Path) -> None:
    """Its images are broken: no score was compared, so none shows that bfloat16 does no harm."""
    images = toy_images(tmp_path / "images")
    config = toy_config(images, tmp_path / "run", **SETTINGS)
    for record in sample(choose_images(config), 3, config.seed).records:
        Path(record.path).write_bytes(b"")
    outcome = calibrated(images, tmp_path / "run")
    precision = outcome.folder.read_json("run.json")["precision"]
    assert precision["sample"] == [] and set(precision["chosen"].values()) == {"float32"}
    (choice,) = precision["measured"]
    assert (choice["precision"], choice["num_pairs"], choice["num_images"]) == ("float32", 0, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.2, None], ("bfloat16", 2, 2)),
        ([0.1, None, None], ("float32", 1, 1)),
        ([None, None, None], ("float32", 0, 0)),
        ([], ("float32", 0, 0)),
    ],
)
def test_one_image_is_too_few(values: list[float | None], expected: tuple[str, int, int]) -> None:
    scores = [
        Score(image_id=str(row), explainer="e", metric="m", repeat=0, value=value, **({} if value else NULL))
        for row, value in enumerate(values)
    ]
    choice = calibrate._choose("m", scores, scores, 0.01)
    assert (choice.precision, choice.num_pairs, choice.num_images) == expected


NULL: dict[str, Any] = {"status": ZERO_DENOMINATOR, "reason": "constant"}


def test_a_store_that_fails_meanwhile(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> bytes:
        raise StoreError("the share is gone")

    def during(job: Job, shard: Shard) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr("xaibatch.data.load.read_bytes", failing)
            return calibrate_local(job, shard)

    outcome = calibrated(images, tmp_path / "run", during)
    assert_float32(outcome, "calibrating on 3 images failed (StoreError: the share is gone)", caplog)


@pytest.mark.parametrize(
    ("happens", "error", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), StoppedError, "stopped by SIGTERM"),
        (lambda: device_error(), EngineError, r"until this process ends \(CUDA error: injected\)"),
    ],
    ids=["a signal", "a device in error"],
)
def test_what_ends_a_run_ends_it_here_too(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    happens: Callable[[], None],
    error: type[Exception],
    words: str,
) -> None:
    batches, attempt = [0], PlanRunner._attempt

    def third(runner: PlanRunner, *arguments: Any) -> Any:
        batches[0] += 1
        if batches[0] == 3:
            happens()
        return attempt(runner, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PlanRunner, "_attempt", third)
        with pytest.raises(error, match=words) as caught:
            calibrated(images, tmp_path / "run")
    assert batches == [3] and getattr(caught.value, "exit_code", 0) == (143 if error is StoppedError else 1)
    assert calibrated(images, tmp_path / "run").ok


def device_error() -> None:
    raise RuntimeError("CUDA error: injected")


class Modelless(Replica):
    """A replica that starts at once."""

    def load(self) -> tuple[str, tuple[str, ...]]:
        return "none", ()


class Dying(Modelless):
    def calibrate(self, shard: Shard) -> dict[str, Any]:
        os._exit(1)


class Refusing(Modelless):
    def calibrate(self, shard: Shard) -> dict[str, Any]:
        raise StoreError("the share is gone")


@pytest.mark.parametrize(
    ("actor", "why"),
    [(Dying, "RuntimeError: 2 replicas were lost over the sample: "), (Refusing, "StoreError: the share is gone")],
)
def test_a_replica_that_cannot_calibrate_leaves_float32(
    cluster: Cluster, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, actor: type[Replica], why: str
) -> None:
    outcome = calibrated(images, tmp_path / "run", partial(calibrate_on_ray, actor=actor))
    found = outcome.record["precision"]["why"]
    assert found.startswith(f"calibrating on 3 images failed ({why}")
    assert_float32(outcome, found, caplog)


@pytest.mark.parametrize("end", ["a signal", "the cluster"])
def test_waiting_for_a_replica_is_said_and_ends(
    cluster: Cluster,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    end: str,
) -> None:
    class Empty(SimpleNamespace):
        """No replica ever starts; at the third look something else happens."""

        ready, looks, closed = (), 0, False

        def refresh(self) -> None:
            Empty.looks += 1
            if Empty.looks == 3 and end == "a signal":
                os.kill(os.getpid(), signal.SIGINT)
            if Empty.looks == 3 and end == "the cluster":
                raise RayError("the head is gone")

        def waiting_for(self) -> str:
            return "1 of 1 waits for a GPU"

        def close(self) -> None:
            Empty.closed = True

    monkeypatch.setattr(calibration, "ReplicaPool", Empty)
    monkeypatch.setattr(calibration, "WARN_S", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began this in background
    expected, words = (
        (StoppedError, "stopped by SIGINT")
        if end == "a signal"
        else (EngineError, r"the cluster was lost \(RayError: the head is gone\)")
    )
    try:
        with caplog.at_level(logging.WARNING), pytest.raises(expected, match=words):
            calibrated(images, tmp_path / "run", calibrate_on_ray)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "no model replica is ready to calibrate: 1 of 1 waits for a GPU" in caplog.text
    assert Empty.looks == 3 and Empty.closed
