"""Quantus metrics as they are on the cluster: one task per (shard, explainer, metric), answered by the replica."""

from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.engine_cluster import assert_same_rows
from tests.toy import Watch, toy_config
from xaibatch.cluster.driver import run_on_ray
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate

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
    plain = evaluate(toy_config(images, tmp_path / "plain", **SETTINGS), run_local, Watch())
    found = evaluate(toy_config(images, tmp_path / "run", **SETTINGS), run_on_ray, Watch())
    assert plain.ok and found.ok and found.num_cells_run == 2 * (2 + 2 * 3)
    assert_same_rows(found.folder, plain.folder)
