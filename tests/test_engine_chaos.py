"""The short form of the chaos test: a replica, a score task, a writer, a node and the driver are killed in the middle
of their work, and the tables come out as if nothing had happened. `python jobs/chaos.py` is the long form."""

import os
import sys
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.engine_chaos import EXPLAINERS, KINDS, METRICS, Chaos, chaos_images, schedule, write_config
from tests.engine_cluster import ROOT, assert_same_rows, tables
from tests.toy import Watch, toy_config
from xaibatch.cluster.driver import run_on_ray
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate
from xaibatch.results.parts import STAGING


@pytest.mark.chaos
def test_nothing_lost_nothing_twice(cluster: Cluster, faults: Path, tmp_path: Path) -> None:
    images = chaos_images(tmp_path / "images")
    settings = {"explainers": EXPLAINERS, "metrics": METRICS, "engine__shard_size": 1, "engine__threads": 1}
    plain = evaluate(toy_config(images, tmp_path / "plain", **settings), run_local, Watch())
    config = toy_config(images, tmp_path / "run", **settings)
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py")]
    command += ["--config", str(write_config(config, tmp_path / "run.yaml")), "--address", cluster.address]
    kinds = schedule(len(KINDS), seed=0)
    chaos = Chaos(cluster, command, dict(os.environ), faults, tmp_path / "log.txt", seed=0, pause_s=0.5)
    kills = chaos.run(kinds, timeout_s=500)
    assert sorted(kill.kind for kill in kills) == sorted(KINDS)
    assert ray.is_initialized()

    again = evaluate(config, run_on_ray, Watch())
    assert not again.failed and again.num_cells_run == 0
    assert tables(again.folder)["failures"].index.to_list() == [("covid/broken.png", "read")]
    assert_same_rows(again.folder, plain.folder)
    assert not any(again.folder.problems(table) for table in ("scores", "maps", "predictions", "failures"))
    assert not list((tmp_path / "run" / STAGING).iterdir())
