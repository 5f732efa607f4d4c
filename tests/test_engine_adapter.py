"""Quantus metrics as they are on the cluster: one task per (shard, explainer, metric), answered by the replica."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError

from tests.engine_cluster import assert_same_rows
from tests.toy import Watch, toy_config
from xaibatch.cluster import tasks
from xaibatch.cluster.driver import run_on_ray
from xaibatch.data.sampling import shards
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.record import job_of
from xaibatch.pipeline.run import choose_images, evaluate
from xaibatch.pipeline.session import Session

SETTINGS: dict[str, Any] = {
    "explainers": {"attention_rollout_max": {"discard_ratio": 0.5}, "random": {}},
    "metrics": {
        "quantus:FaithfulnessCorrelation": {"nr_runs": 6, "subset_size": 100},
        "quantus:AvgSensitivity": {"nr_samples": 2},
        "quantus:ModelParameterRandomisation": {},
        "effective_complexity": {"eps": 0.1},
    },
    "engine__threads": 1,
    "data__limit": 6,
    "engine__shard_size": 3,
}


def test_quantus_tasks_ask_the_replica(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """Predictions, explanations of noisy copies and randomised models inside Quantus give the plain engine's rows: with
    one replica and two CPUs the waiting tasks neither block it nor the other cells."""
    watches = Watch(), Watch()
    plain = evaluate(toy_config(images, tmp_path / "plain", **SETTINGS), run_local, watches[0])
    found = evaluate(toy_config(images, tmp_path / "run", **SETTINGS), run_on_ray, watches[1])
    assert plain.ok and found.ok and found.num_cells_run == 2 * (2 + 2 * 3)
    assert_same_rows(found.folder, plain.folder)
    for watch in watches:  # what the replica answered is the model's time
        reports = [report for report in watch.reports if "FaithfulnessCorrelation" in report.stage]
        assert len(reports) == 4 and all(report.num_forward_passes > 0 for report in reports)
        assert all(report.seconds["model"] > 0 and report.seconds["score"] > 0 for report in reports)
    passes = [sum(report.num_forward_passes for report in watch.reports) for watch in watches]
    assert passes[0] == passes[1]


def test_a_replica_s_loss_is_no_score(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantus's wrapper turns errors into rows with a reason; that a replica died is a reason to try again."""
    config = toy_config(images, tmp_path / "plain", **SETTINGS)
    plain = evaluate(config, run_local, Watch())
    job = job_of(plain.record, config, plain.folder)
    shard = shards(choose_images(config).records, 3)[0]
    explained = Session(job).explain(shard)
    group = next(group for group in job.groups if "FaithfulnessCorrelation" in group.name)
    replica = SimpleNamespace(forward=SimpleNamespace(remote=lambda images_BCHW: None))

    def lost(ref: object) -> None:
        raise ActorDiedError()

    monkeypatch.setattr(tasks.ray, "get", lost)
    with pytest.raises(ActorDiedError):
        tasks.adapter_cell(job, shard, group, explained, job.read(shard)[0], replica)
