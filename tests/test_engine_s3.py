"""Several machines that share no folder: images, checkpoint and results in an object store, keys from the
environment."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import timm
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import save_file

from tests.engine_cluster import assert_same_rows
from tests.toy import CLASSES, MODEL, Watch, toy_config
from xaibatch.cluster.driver import run_on_ray
from xaibatch.errors import EngineError, RunFolderError
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.record import job_of
from xaibatch.pipeline.run import evaluate
from xaibatch.pipeline.work import ShardWork
from xaibatch.results.lock import LOCK, RunLock
from xaibatch.results.parts import RunFolder

SETTINGS: dict[str, Any] = {
    "explainers": {"attention_rollout_max": {"discard_ratio": 0.5}, "random": {}},
    "metrics": {
        "faithfulness_correlation": {"num_runs": 4, "subset_size": 100},
        "effective_complexity": {"eps": 0.1},
    },
    "engine__threads": 1,
    "engine__shard_size": 3,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model's seeded weights with its class names."""
    path = tmp_path_factory.mktemp("model") / "toy.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(str(MODEL["model.name"]), num_classes=len(CLASSES), **MODEL["model.options"])
    save_file(model.state_dict(), path, metadata={"classes": str(list(CLASSES)).replace("'", '"')})
    return path


def test_two_nodes_and_a_store_that_fails_half_of_its_requests(
    cluster: Cluster, store: Path, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Each node has its own temporary folder and the run's files are in the store only. Every second request fails,
    some after they were carried out; the rows are those of the plain engine on local files."""
    local = toy_config(images, tmp_path / "plain", **SETTINGS, model__checkpoint=str(checkpoint))
    plain = evaluate(local, run_local, Watch())
    s3 = fsspec.filesystem("s3")
    s3.put(str(images), "chest/images", recursive=True)
    s3.put(str(checkpoint), "chest/toy.safetensors")

    other = tempfile.mkdtemp(prefix="xb-")
    node = cluster.add_node(num_cpus=2, temp_dir=other)
    (store / "fail").touch()
    try:
        config = toy_config(
            Path("images"), Path("run"), **SETTINGS, model__checkpoint="s3://chest/toy.safetensors",
            data__path="s3://chest/images", engine__replicas=2,
        )  # fmt: skip
        config = config.model_copy(update={"output": "s3://chest/runs/first"})
        outcome = evaluate(config, run_on_ray, Watch())
    finally:
        (store / "fail").unlink()
        cluster.remove_node(node)
    assert outcome.ok and len((store / "failed").read_text()) > 20
    assert_same_rows(outcome.folder, plain.folder)
    assert not outcome.folder.exists(LOCK)
    assert evaluate(config, run_on_ray, Watch()).num_cells_run == 0


def test_two_runs_at_once_on_a_store(store: Path) -> None:
    """The lock is a conditional PUT."""
    folder = RunFolder("s3://chest/runs/locked")
    with RunLock(folder), pytest.raises(RunFolderError, match=rf"in use by another run: process {os.getpid()} on "):
        RunLock(folder).__enter__()
    assert not folder.exists(LOCK)


CONTEND = """
import sys, time
from pathlib import Path
from xaibatch.errors import RunFolderError
from xaibatch.results.lock import RunLock
from xaibatch.results.parts import RunFolder
from xaibatch.results.retrying import Retries

lock = RunLock(RunFolder("s3://chest/runs/contended", retries=Retries(attempts=20, first_pause_s=0.01)), settle_s=0)
lock._file.read()  # the client is connected
print("ready", flush=True)
sys.stdin.readline()
try:
    lock.__enter__()
    print("won", flush=True)
except RunFolderError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("failing", [False, True])
def test_of_many_who_find_a_stale_lock_on_s3_one_wins(store: Path, failing: bool) -> None:
    """Six processes at once, and no waiting: the conditional PUT alone decides, also where answers are lost. The
    others are told who won."""
    folder = RunFolder("s3://chest/runs/contended")
    old = {"token": "t", "host": "elsewhere/1/2", "pid": 1, "process_started": "9", "since": 0.0, "heartbeat": 0.0}
    folder.write_json(old, LOCK)
    contenders = [
        subprocess.Popen([sys.executable, "-c", CONTEND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    try:
        answers = []
        for process in contenders:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if failing:
            (store / "fail").touch()
        for process in contenders:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in contenders if process.stdout is not None]
    finally:
        (store / "fail").unlink(missing_ok=True)
        for process in contenders:
            process.kill()
            process.communicate()
    winner = contenders[answers.index("won\n")]
    assert answers.count("won\n") == 1
    assert all(f"process {winner.pid} on " in answer for answer in answers if answer != "won\n"), answers
    folder.remove(LOCK)


def test_a_takeover_between_two_heartbeats_is_noticed(store: Path) -> None:
    """The heartbeat too is conditional: it does not write over the lock of whoever took the folder over meanwhile."""
    folder = RunFolder("s3://chest/runs/beaten")
    with RunLock(folder, beat_s=600, settle_s=0) as lock:
        read = lock._file.read()
        other = {"token": "t", "host": "elsewhere/1/2", "pid": 1, "process_started": "9", "since": 1.0}
        folder.write_json({**other, "heartbeat": time.time()}, LOCK)
        assert read is not None and not lock._file.replace(read.content, read)
    assert json.loads(folder.read_bytes(LOCK))["token"] == "t"


def test_a_local_folder_that_another_node_does_not_see(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """On several machines a path that only the driver sees is found out before images turn up as missing."""
    config = toy_config(images, tmp_path / "run", **SETTINGS)
    plain = evaluate(config, run_local, Watch())
    job = replace(job_of(plain.record, config, plain.folder), folder=plain.folder)
    job = replace(job, paths=("/only/here",))
    node = cluster.add_node(num_cpus=1)
    work: list[ShardWork] = []
    try:
        from xaibatch.data.sampling import shards
        from xaibatch.pipeline.run import choose_images

        for shard in shards(choose_images(config).records, 3):
            work.append(ShardWork(shard=shard, explain=True, groups=job.groups))
        with pytest.raises(EngineError, match=r"does not see '/only/here'.*shared file system or in an object store"):
            run_on_ray(job, work, Watch())
    finally:
        cluster.remove_node(node)
