"""A run that is killed again and again: which process is killed when, and what must come out in the end.

Processes in the middle of a step show a marker with their node and their driver (tests/engine_faults.py), so every kill
of KINDS hits work in progress for the driver that runs now, and none hits a start-up. `replica`, `score` and `write` (a
part being written) are killed by their marker, `node` is a raylet with all its workers, `driver` is the command itself,
which is then started again. The kinds of ANYWHERE are killed at random moments, whatever they do: reading, planning,
segmenting, starting up, taking the lock, writing the record. Used by tests/test_engine_chaos.py, in short, and by
jobs/chaos.py, at length.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from ray.cluster_utils import Cluster

from tests.toy import toy_images
from xaibatch.config import RunConfig

KINDS: Final = ("replica", "score", "write", "node", "driver")
ANYWHERE: Final = ("any worker", "any node", "any driver")

EXPLAINERS: Final[dict[str, Any]] = {"tests.engine_faults:brightness": {}, "random": {}}
METRICS: Final[dict[str, Any]] = {
    "tests.engine_faults:Peak": {},
    "effective_complexity": {"eps": 0.1},
    "faithfulness_correlation": {"num_runs": 4, "subset_size": 100},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """What was killed, and how many seconds after the run began."""

    kind: str
    at_s: float


class Chaos:
    """Runs a command to its end while killing what it consists of.

    command:   starts the run or takes it up, and exits with 1 when everything is done (one image is broken).
    markers:   the folder where workers in the middle of a step show it.
    pause_s:   mean of the exponentially distributed pause between a kill and the next one.
    """

    def __init__(
        self,
        cluster: Cluster,
        command: Sequence[str],
        environment: dict[str, str],
        markers: Path,
        log: Path,
        *,
        seed: int,
        pause_s: float = 1.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._cluster, self._command, self._environment = cluster, list(command), environment
        self._markers, self._log, self._pause_s, self._say = markers, log, pause_s, say
        self._random = random.Random(seed)
        self._nodes: list[Any] = []
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, kinds: Sequence[str], timeout_s: float) -> list[Kill]:
        """Kill one of each of `kinds`, in that order, then let the run end; AssertionError if it ends too early, fails
        or takes longer than `timeout_s`."""
        start = time.monotonic()
        (self._markers / "markers").touch()
        kills: list[Kill] = []
        self._nodes.append(self._cluster.add_node(num_cpus=2))
        self._start()
        try:
            for kind in kinds:
                wait_until = time.monotonic() + self._random.expovariate(1 / self._pause_s)
                while not (
                    (kind in ANYWHERE or self._busy(kind)) and time.monotonic() >= wait_until and self._kill(kind)
                ):
                    self._check(kills, start + timeout_s, len(kinds))
                    time.sleep(0.01)
                kills.append(Kill(kind=kind, at_s=time.monotonic() - start))
                self._say(f"{len(kills)} of {len(kinds)}: killed {kind}")
            while self._ended() is None:
                assert time.monotonic() < start + timeout_s, self._report("the run does not end", kills)
                time.sleep(0.1)
            assert self._ended() == 1, self._report("the run failed", kills)
            return kills
        finally:
            self._kill_driver()
            for node in self._nodes:
                with contextlib.suppress(Exception):
                    self._cluster.remove_node(node)

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _ended(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def _busy(self, kind: str) -> list[int]:
        """Processes that are in the middle of a step of this kind for the driver that runs now: of any step for the
        driver, of any step on the node that is killed next for a node."""
        assert self._process is not None
        step = kind if kind in ("replica", "score", "write") else "*"
        node = self._nodes[-1].node_id if kind == "node" else "*"
        found = []
        for marker in self._markers.glob(f"{step}-{node}-{self._process.pid}-*"):
            pid = int(marker.name.rpartition("-")[2])
            try:
                os.kill(pid, 0)
                found.append(pid)
            except ProcessLookupError:
                marker.unlink(missing_ok=True)
        return found

    def _workers(self) -> list[int]:
        """Ray's worker processes on all nodes, whatever they do (not the agents, with which a node ends)."""
        raylets = {
            raylet.process.pid
            for node in self._cluster.list_all_nodes()
            for raylet in node.all_processes.get("raylet", ())
        }
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                title = (process / "cmdline").read_bytes().rstrip(b"\0 ")
                if parent in raylets and title.startswith(b"ray::") and not title.endswith(b"Agent"):
                    found.append(int(process.name))
        return sorted(found)

    def _kill(self, kind: str) -> bool:
        """True if something of this kind was killed; False if it was gone already."""
        if kind in ("driver", "any driver"):
            self._kill_driver()
            self._start()
            return True
        if kind in ("node", "any node"):
            self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)
            self._nodes.append(self._cluster.add_node(num_cpus=2))
            return True
        workers = self._workers() if kind == "any worker" else self._busy(kind)
        self._random.shuffle(workers)
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def _kill_driver(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _check(self, kills: list[Kill], deadline: float, num_wanted: int) -> None:
        assert self._ended() is None, self._report(f"the run ended before {num_wanted} kills", kills)
        assert time.monotonic() < deadline, self._report("nothing left to kill in time", kills)

    def _report(self, what: str, kills: list[Kill]) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-40:]
        return "\n".join([f"{what} (exit code {self._ended()}, kills {[kill.kind for kill in kills]})", *lines])


def schedule(num_kills: int, seed: int, kinds: Sequence[str] = KINDS) -> list[str]:
    """Kinds in random order, each as often as the others as far as the number allows."""
    rounds = -(-num_kills // len(kinds))
    found = list(kinds) * rounds
    random.Random(seed).shuffle(found)
    return found[:num_kills]


def chaos_images(folder: Path, num_per_class: int = 4) -> Path:
    """Toy images, and one that is none: a row of the table of failures."""
    toy_images(folder, num_per_class)
    (folder / "covid" / "broken.png").write_bytes(b"no image")
    return folder


def write_config(config: RunConfig, path: Path) -> Path:
    """The configuration as the file that the command line takes."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    return path
