"""The long chaos test: `python jobs/chaos.py --kills 100` kills parts of a running evaluation again and again.

A cluster of three nodes on this machine evaluates small images with a tiny model while replicas, score tasks, writers
of parts, whole nodes and the driver are killed with SIGKILL in the middle of their work, at random times; and any
process of the run at any moment, start-up, lock and record included. One of the images is broken. After some
kills a run may end and another one begins, until there were enough. In the end every table must equal that of an
undisturbed run, key for key and bit for bit. The result is printed as JSON; the exit code is 0 if nothing was lost,
doubled or changed.

`tests/test_engine_chaos.py` is the short form.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ray.cluster_utils import Cluster

from tests.engine_chaos import ANYWHERE, EXPLAINERS, KINDS, METRICS, Chaos, chaos_images, schedule, write_config
from tests.engine_cluster import FAULTS, KEYS, ROOT
from tests.toy import Watch, toy_config
from xaibatch.cluster.connect import SYSTEM_CONFIG
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate
from xaibatch.results.parts import STAGING, RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-per-run", type=int, default=25, help="kills in one run before it may end")
    parser.add_argument(
        "--images", type=int, default=60, help="images of a run, one a shard; more give more time to kill"
    )
    parser.add_argument("--pause", type=float, default=2.0, help="mean seconds between two kills")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one run may take")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    # short, because Ray's sockets lie in it
    folder = Path(tempfile.mkdtemp(prefix="xb-"))
    faults = folder / "faults"
    faults.mkdir()
    os.environ |= {
        "PYTHONPATH": str(ROOT), FAULTS: str(faults), "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    head = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "_system_config": SYSTEM_CONFIG}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=2)
        found = run(asked, cluster, folder, faults)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=2))
    raise SystemExit(1 if found["lost"] or found["doubled"] or found["different"] else 0)


def run(asked: argparse.Namespace, cluster: Cluster, folder: Path, faults: Path) -> dict[str, Any]:
    """Runs until there were enough kills, and the sum of what was wrong with their tables."""
    images = chaos_images(folder / "images", num_per_class=-(-asked.images // 3))
    settings: dict[str, Any] = {
        "explainers": EXPLAINERS, "metrics": METRICS, "engine__shard_size": 1, "engine__threads": 1,
    }  # fmt: skip
    plain = evaluate(toy_config(images, folder / "plain", **settings), run_local, Watch())
    kinds = schedule(asked.kills, asked.seed, (*KINDS, *ANYWHERE))
    counted: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    start = time.monotonic()
    num_runs = 0
    while kinds:
        now, kinds = kinds[: asked.kills_per_run], kinds[asked.kills_per_run :]
        output = folder / f"run-{num_runs}"
        config = toy_config(images, output, **settings)
        command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--address", cluster.address]
        command += ["--config", str(write_config(config, folder / "run.yaml"))]
        chaos = Chaos(
            cluster, command, dict(os.environ), faults, folder / "log.txt",
            seed=asked.seed + num_runs, pause_s=asked.pause, say=lambda line: print(line, flush=True),
        )  # fmt: skip
        kills = chaos.run(now, timeout_s=asked.timeout)
        counted.update(kill.kind for kill in kills)
        again = evaluate(config, run_local, Watch())
        assert not again.failed and again.num_cells_run == 0
        assert not any((output / STAGING).iterdir())
        wrong.update(differences(again.folder, plain.folder))
        num_runs += 1
    return {
        "kills": dict(counted),
        "runs": num_runs,
        "score_rows_per_run": plain.folder.read("scores").num_rows,
        "lost": wrong["lost"],
        "doubled": wrong["doubled"],
        "different": wrong["different"],
        "minutes": round((time.monotonic() - start) / 60, 1),
    }


def differences(found: RunFolder, expected: RunFolder) -> Counter[str]:
    """Rows of all tables that are missing (`lost`), there more than once (`doubled`) or not the same (`different`)."""
    counted: Counter[str] = Counter()
    for table, key in KEYS.items():
        rows, wanted = (
            [
                (tuple(row[name] for name in key), repr([row[name] for name in row if name not in ("run", "path")]))
                for row in folder.read(table).to_pylist()
            ]
            for folder in (found, expected)
        )
        contents = dict(rows)
        counted["doubled"] += len(rows) - len(contents)
        counted["lost"] += sum(key not in contents for key, _ in wanted)
        counted["different"] += sum(key in contents and contents[key] != content for key, content in wanted)
        counted["different"] += len(contents.keys() - dict(wanted).keys())
    return counted


if __name__ == "__main__":
    main()
