"""Explainers and metrics that misbehave on command, and a slow or full disk: what the engine's tests run in its
workers.

A fault is on while a file of its name lies in the folder that the environment variable XAIBATCH_TEST_FAULTS names.
While `markers` is on, a worker in the middle of a step shows a file `<step>-<node>-<driver's pid>-<pid>`, so that a
test can kill it, its node or its driver just there.
"""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray._private.state import state
from torch import Tensor

from xaibatch.errors import NotScoredError
from xaibatch.metrics.base import ImageView, MapMetric, MapView, PlanMetric
from xaibatch.perturb.plans import PerturbationPlan
from xaibatch.seeding import DrawKey
from xaibatch.types import MISSING_LABEL

STEP_S = 0.25
"""Seconds that a marked step lasts at least."""


def fault(name: str) -> Path | None:
    """The file that switches a fault on, if it is there."""
    folder = os.environ.get("XAIBATCH_TEST_FAULTS")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.exists() else None


@cache
def place() -> tuple[str, int]:
    """The node that this process is on and the process id of the driver that it works for; ("here", 0) without Ray."""
    if not ray.is_initialized() or not sys.argv[0].endswith("default_worker.py"):
        return "here", 0
    context = ray.get_runtime_context()
    drivers = {job["JobID"]: job["DriverPid"] for job in state.job_table()}
    return context.get_node_id(), drivers[context.get_job_id()]


def blind_paths(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Paths that this node cannot see: all, where the fault `blind` names it."""
    return paths if (switch := fault("blind")) and switch.read_text() == place()[0] else ()


def broken_paths(paths: tuple[str, ...]) -> tuple[str, ...]:
    """None is away, but a package is missing on the nodes that the fault `broken` names, and on those that `dying`
    names the process ends."""
    if (switch := fault("broken")) and place()[0] in switch.read_text():
        raise ModuleNotFoundError("No module named 'timm'")
    if (switch := fault("dying")) and place()[0] in switch.read_text():
        os._exit(1)
    return ()


@contextlib.contextmanager
def marked(step: str) -> Iterator[None]:
    """Show that this process is in a step, and take some time over it."""
    switch = fault("markers")
    if switch is None:
        yield
        return
    node_id, driver = place()
    marker = switch.parent / f"{step}-{node_id}-{driver}-{os.getpid()}"
    marker.touch()
    time.sleep(STEP_S)
    yield
    marker.unlink(missing_ok=True)


def _faulty_fsync(file: int) -> None:
    """A disk that is full while the fault is on, and slow enough to be killed in the middle of a write."""
    if switch := fault("disk_full"):
        with (switch.parent / "disk_full_hits").open("a") as hits:
            hits.write("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with marked("write"):
        _fsync(file)


_fsync = os.fsync
if sys.argv[0].endswith("default_worker.py"):
    os.fsync = _faulty_fsync  # type: ignore[assignment]


def brightness(model: Any, images_BCHW: Tensor, targets_B: Tensor, keys: tuple[DrawKey, ...] = ()) -> Tensor:
    """A map that is the image itself. Ends its process on the images named in the fault `crash`, runs out of memory on
    more than two images while `out_of_memory` is on, finds the device in error on the node named in `sick`, and refuses
    the images named in `refuse`."""
    with marked("replica"):
        if (switch := fault("sick")) and switch.read_text() == place()[0]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (injected)")
        if (switch := fault("crash")) and {key.image_id for key in keys} & set(switch.read_text().split()):
            with (switch.parent / "crashes").open("a") as crashes:
                crashes.write("x")
            os._exit(1)
        if (switch := fault("out_of_memory")) and len(images_BCHW) > 2:
            with (switch.parent / "out_of_memory_hits").open("a") as hits:
                hits.write("x")
            raise torch.OutOfMemoryError("out of memory (injected)")
        if (switch := fault("refuse")) and {key.image_id for key in keys} & set(switch.read_text().split()):
            raise ValueError("not this one")
        return images_BCHW.mean(1)


class Peak(MapMetric):
    """The largest value of the map."""

    name = "peak"
    title = "Largest value"
    family = "complexity"
    paper = "none: a test's own"
    higher_is_better = None
    bounds = (-np.inf, np.inf)

    def score(self, view: MapView) -> float:
        with marked("score"):
            return float(view.pixels_HW.max())


class Refusing(PlanMetric):
    """Cannot make a plan while the fault `no_plan` is on; else has none to make."""

    name = "refusing"
    title = "Refusing"
    family = "faithfulness"
    paper = "none: a test's own"
    higher_is_better = None
    bounds = (0, 1)
    plan_uses_map = False

    def plan(self, view: ImageView) -> PerturbationPlan:
        if fault("no_plan"):
            raise ArithmeticError("no plan today")
        raise NotScoredError(MISSING_LABEL, "it never has a plan")

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: Any) -> float:
        raise AssertionError("there is nothing to score")
