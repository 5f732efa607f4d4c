"""The Ray engine gives the rows of the plain engine, bit for bit, however many replicas, and takes up what is
missing."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.engine_cluster import assert_same_rows
from tests.toy import Watch, toy_config
from xaibatch.cluster.driver import run_on_ray
from xaibatch.cluster.telemetry import ReplicaMeter
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.progress import ProgressWatcher
from xaibatch.pipeline.run import Outcome, evaluate
from xaibatch.results.parts import RunFolder

SETTINGS = {
    "explainers": {
        "transformer_lrp": {},
        "lime": {"num_samples": 24, "segmentation": "slic", "segmentation_options": {"n_segments": 8}},
        "random": {},
    },
    "metrics": {
        "faithfulness_correlation": {"num_runs": 8, "subset_size": 100},
        "pixel_flipping": {"features_in_step": 256},
        "avg_sensitivity": {"num_samples": 2},
        "effective_complexity": {"eps": 0.1},
    },
    "repeats": 2,
    "engine__threads": 1,
}


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The undisturbed run of the plain engine."""
    outcome = evaluate(toy_config(images, tmp_path_factory.mktemp("plain") / "run", **SETTINGS), run_local, Watch())
    assert outcome.ok
    return outcome.folder


def run(images: Path, output: Path, **settings: object) -> tuple[Outcome, str]:
    """One run on Ray and what it printed."""
    lines = io.StringIO()
    watcher = ProgressWatcher(stream=lines, line_s=0.0)
    return evaluate(toy_config(images, output, **SETTINGS | settings), run_on_ray, watcher), lines.getvalue()


def metrics(run_name: str, name: str, enough: float) -> dict[str, list[float]]:
    """What Prometheus would read from the node's agent about one run, by metric, once the values of `name` add up to
    `enough` or some seconds have passed."""
    (port,) = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    deadline = time.monotonic() + 10
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if f'run="{run_name}"' in line]
        found = re.findall(r"^ray_(xaibatch_\w+)\{.*\} (\S+)$", "\n".join(lines), re.MULTILINE)
        values: dict[str, list[float]] = {}
        for key, value in found:
            values.setdefault(key, []).append(float(value))
        if sum(values.get(name, [])) >= enough or time.monotonic() > deadline:
            return values
        time.sleep(0.5)


def test_equals_plain_engine_and_resumes(
    cluster: Cluster, images: Path, tmp_path: Path, plain: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """Two replicas against the plain loop: predictions, maps (superpixels made in CPU tasks, noisy copies' too) and
    scores are equal to the last bit. Then some parts are removed, one is cut short and a stranger is put beside them:
    only what is missing is done again, and the rows are the same. A third call has nothing to do."""
    outcome, printed = run(images, tmp_path / "same-rows", engine__replicas=2)
    assert outcome.ok and outcome.num_cells_run == 3 * 5
    assert "15 of 15 cells, 12 images" in printed
    assert "where the time went: model" in printed
    assert_same_rows(outcome.folder, plain)

    state = json.loads((tmp_path / "same-rows" / "progress.json").read_text())
    assert state["state"] == "done" and state["num_cells"] == 15 and state["seconds_by_stage"]["segmentation"] > 0
    num_passes = state["num_forward_passes"]
    assert num_passes == plain.read_json("run.json")["sessions"][0]["num_forward_passes"]
    # what came in since the last report may be lost
    shown = metrics("same-rows", "xaibatch_forward_passes_total", num_passes)
    assert 0 < sum(shown["xaibatch_forward_passes_total"]) <= num_passes
    assert 0 < sum(shown["xaibatch_images_total"]) <= 12
    assert {"xaibatch_shards_open", "xaibatch_cells_waiting", "xaibatch_replicas_ready"} <= set(shown)
    assert len(shown["xaibatch_device_busy_share"]) == 2
    assert all(0 <= share <= 1 for share in shown["xaibatch_device_busy_share"])

    parts = sorted((tmp_path / "same-rows" / "scores").rglob("*.parquet"))
    parts[0].unlink()
    parts[4].write_bytes(parts[4].read_bytes()[:100])
    (tmp_path / "same-rows" / "maps" / "shard-00002.parquet").unlink()
    (tmp_path / "same-rows" / "scores" / "notes.txt").write_text("mine")
    other = tmp_path / "same-rows" / "scores" / "another_metric" / "shard-00000.parquet"
    other.parent.mkdir()
    shutil.copy(parts[1], other)
    caplog.clear()
    again, _ = run(images, tmp_path / "same-rows", engine__replicas=1, engine__shards_in_flight=1)
    assert again.ok and again.num_cells_run == 3
    said = [record.getMessage() for record in caplog.records]
    assert sorted(line for line in said if line.startswith("left out of the run")) == sorted(
        f"left out of the run: {path}: {problem}"
        for path, problem in (
            (parts[4], "truncated or not Parquet"),
            (tmp_path / "same-rows" / "scores" / "notes.txt", "not a Parquet part"),
            (other, f"a copy of the part '{parts[1].parent.name}/{parts[1].stem}'"),
        )
    )
    other.unlink()
    assert_same_rows(outcome.folder, plain)

    watch = Watch()
    third = evaluate(toy_config(images, tmp_path / "same-rows", **SETTINGS), run_on_ray, watch)
    assert third.num_cells_run == 0 and watch.reports == []


def test_the_busy_share_follows_the_device(cluster: Cluster) -> None:
    """Half of a window, then nothing to do, then a call that is longer than a window."""
    now = [0.0]
    meter = ReplicaMeter("busy-share", "one", clock=lambda: now[0])
    with meter.busy():
        now[0] += 2
    now[0] += 2
    assert meter.beat() == 0.5
    now[0] += 5
    assert meter.beat() == 0
    with meter.busy():
        now[0] += 5
        assert meter.beat() == 1
        now[0] += 3
    now[0] += 3
    assert meter.beat() == 0.5


def test_tasks_and_driver_need_no_torch() -> None:
    """Importing what a CPU task and the driver's loop import leaves the heavy packages out (an idle worker with torch
    weighs fifteen times one without)."""
    code = (
        "import sys, xaibatch.cluster.tasks, xaibatch.cluster.driver\n"
        "heavy = {'torch', 'timm', 'quantus', 'lime', 'skimage', 'sklearn', 'pandas', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
