"""The rows of a run are of one model: whatever loads it later finds the checkpoint that the run began with, by a path
that means the same everywhere, or ends the run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.engine_cluster import assert_same_rows
from tests.run_folders import save_weights
from tests.toy import Watch, toy_config
from xaibatch.cluster.driver import run_on_ray
from xaibatch.config import RunConfig
from xaibatch.errors import ChangedWeightsError
from xaibatch.pipeline.adapter import _ChangedModels
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.place import placed
from xaibatch.pipeline.record import job_of
from xaibatch.pipeline.run import evaluate
from xaibatch.pipeline.work import FailedCell, Progress, ShardWork

CHANGED = r"checkpoint .*model\.safetensors' has changed since the run began \(SHA-256 .* now\): put the first one back"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_weights(path, seed=0)
    return path


def config(images: Path, weights: Path | str, output: Path) -> RunConfig:
    settings: dict[str, Any] = {
        "explainers": {"tests.engine_faults:brightness": {}},
        "metrics": {"effective_complexity": {"eps": 0.1}},
        "engine__shard_size": 4,
        "engine__threads": 1,
        "model__checkpoint": str(weights),
    }
    return toy_config(images, output, **settings)


def test_a_session_that_starts_later_refuses_other_weights(images: Path, tmp_path: Path, weights: Path) -> None:
    """A training job writes to the path between two shards, and whatever works on the second one loads the model anew.
    With the first weights back the run is that of one model."""
    asked, first = config(images, weights, tmp_path / "run"), weights.read_bytes()

    def swapping(job: Job, work: Sequence[ShardWork], progress: Progress) -> list[FailedCell]:
        failed = run_local(job, work[:1], progress)
        save_weights(weights, seed=7)
        return failed + run_local(job, work[1:], progress)

    watch = Watch()
    with pytest.raises(ChangedWeightsError, match=CHANGED):
        evaluate(asked, swapping, watch)
    assert {report.shard for report in watch.reports} == {"shard-00000"}
    weights.write_bytes(first)
    plain = evaluate(config(images, weights, tmp_path / "plain"), run_local, Watch())
    assert_same_rows(evaluate(asked, run_local, Watch()).folder, plain.folder)


def test_a_task_that_loads_the_model_itself_refuses_other_weights(images: Path, tmp_path: Path, weights: Path) -> None:
    outcome = evaluate(config(images, weights, tmp_path / "run"), run_local, Watch())
    models = _ChangedModels(job_of(outcome.record, config(images, weights, tmp_path / "run"), outcome.folder))
    assert models.original().source.sha256 == outcome.record["model"]["source"]["sha256"]
    save_weights(weights, seed=7)
    with pytest.raises(ChangedWeightsError, match=CHANGED):
        models.original()


@pytest.mark.parametrize("moment", ["before its first replica", "before a replica's second process"])
def test_a_replica_that_starts_later_refuses_other_weights(
    cluster: Cluster, faults: Path, images: Path, tmp_path: Path, weights: Path, moment: str
) -> None:
    """The second process is there because the device of the first one was in error. No attempt is made twice."""

    class Training(Watch):
        def start(self, *arguments: Any) -> None:
            super().start(*arguments)
            if moment == "before its first replica":
                save_weights(weights, seed=7)

        def done(self, report: Any) -> None:
            super().done(report)
            save_weights(weights, seed=7)
            (faults / "sick").write_text(cluster.head_node.node_id)

    watch = Training()
    asked = config(images, weights, tmp_path / "run")
    asked = asked.model_copy(update={"engine": asked.engine.model_copy(update={"shards_in_flight": 1})})
    with pytest.raises(ChangedWeightsError, match=CHANGED):
        evaluate(asked, run_on_ray, watch)
    assert not watch.failures and len(watch.reports) < 6


def test_a_relative_checkpoint_is_the_driver_s(
    cluster: Cluster, images: Path, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster's processes work in another folder than this one. The run is known by the path as it was written."""
    monkeypatch.chdir(weights.parent)
    asked = config(images, weights.name, tmp_path / "run")
    outcome = evaluate(asked, run_on_ray, Watch())
    assert outcome.ok and outcome.record["config"]["model"]["checkpoint"] == "model.safetensors"
    assert evaluate(asked, run_on_ray, Watch()).num_cells_run == 0
    job = placed(job_of(outcome.record, asked, outcome.folder))
    assert job.config.model.checkpoint == str(weights) and str(weights) in job.paths


@pytest.mark.parametrize("checkpoint", ["embedded", "s3://chest/model.safetensors"])
def test_what_is_no_local_path_travels_as_it_is(images: Path, tmp_path: Path, weights: Path, checkpoint: str) -> None:
    outcome = evaluate(config(images, weights, tmp_path / "run"), run_local, Watch())
    job = placed(job_of(outcome.record, config(images, checkpoint, tmp_path / "run"), outcome.folder))
    assert job.config.model.checkpoint == checkpoint
