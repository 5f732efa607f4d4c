"""Training options come in; Ray Train's TorchTrainer runs `fit` on one CPU, several GPUs or a cluster."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import ray
import ray.train
import ray.train.torch
import torch

from xaibatch.cluster.connect import connected
from xaibatch.config import EngineConfig
from xaibatch.data.dataset import open_dataset
from xaibatch.errors import UsageError, XaibatchError
from xaibatch.pipeline.stopping import Interrupted, handlers_kept
from xaibatch.training.fit import LOG_NAME, Place, fit
from xaibatch.training.options import TrainOptions
from xaibatch.training.splits import splits_of

MAX_FAILURES: Final = 3
"""Times that lost workers are replaced; each time the run goes on after its last complete epoch."""


def train_on_ray(options: TrainOptions, *, address: str | None = None) -> None:
    """Train with `options.num_workers` processes; joins the cluster at `address` or starts one of this machine's own.

    The output folder must be reachable by every worker under the same path (a shared file system on a cluster).
    Progress is printed as it is written to `train.log`. Raises the worker's own XaibatchError for a mistake in data
    or options, UsageError where the cluster is too small.
    """
    splits_of(open_dataset(options.data, layout=options.layout))  # a mistake in the data shows before Ray starts
    output = Path(options.output).resolve()
    with connected(EngineConfig(address=address)):
        use_gpu = options.use_gpu if options.use_gpu is not None else _has_gpus(options.num_workers)
        _check_resources(options, use_gpu)
        settings = options.model_copy(update={"output": str(output), "use_gpu": use_gpu})
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"options": settings.model_dump(mode="json")},
            scaling_config=ray.train.ScalingConfig(
                num_workers=options.num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": options.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=str(output),
                failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        with _shown(output / LOG_NAME), _quiet(), _stoppable():
            mistake = _fitted(trainer)
    if mistake is not None:
        raise mistake


def _fitted(trainer: Any) -> XaibatchError | None:
    """Run the trainer; the project's own error inside Ray's wrappers is handed back, any other is raised."""
    try:
        trainer.fit()
    except Exception as error:
        if (mistake := _own_error(error)) is None:
            raise
        return mistake
    return None


def _worker(config: dict[str, Any]) -> None:
    """One process of the run: finds its place, then trains. A user's mistake is not retried."""
    options = TrainOptions.model_validate(config["options"])
    torch.set_num_threads(options.cpus_per_worker)
    context = ray.train.get_context()
    place = Place(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=str(ray.train.torch.get_device()) if options.use_gpu else "cpu",
    )
    fit(options, place, report=lambda row: ray.train.report(row))


@contextmanager
def _shown(path: Path) -> Iterator[None]:
    """Print what is appended to the log while the block runs."""
    over = threading.Event()
    start = path.stat().st_size if path.is_file() else 0

    def follow() -> None:
        position = start
        while True:
            last_round = over.wait(0.5)
            if path.is_file():
                with path.open(encoding="utf-8") as file:
                    file.seek(position)
                    print(file.read(), end="", flush=True)
                    position = file.tell()
            if last_round:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Train's own progress lines are left out: the log says what a person wants to know."""
    logger = logging.getLogger("ray.train")
    before = logger.level
    logger.setLevel(logging.ERROR)
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ray Train ends a run at SIGINT by an exit from inside its own code; here at SIGTERM too. Raises Interrupted."""
    numbers: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        numbers.append(number)
        interrupt: Any = signal.getsignal(signal.SIGINT)
        interrupt(signal.SIGINT, frame)

    with handlers_kept():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)
        try:
            yield
        except (SystemExit, SystemError) as error:  # the second is what is left of the first where C++ called it
            if not isinstance(error, SystemExit) and not isinstance(error.__cause__, SystemExit):
                raise
            raise Interrupted(numbers[0] if numbers else signal.SIGINT) from None


def _has_gpus(num_workers: int) -> bool:
    return bool(_resources().get("GPU", 0) >= num_workers)


def _check_resources(options: TrainOptions, use_gpu: bool) -> None:
    have = _resources()
    wanted = {"CPU": options.num_workers * options.cpus_per_worker, "GPU": options.num_workers if use_gpu else 0}
    short = [f"{name}s: {need} wanted, {have.get(name, 0):g} there" for name, need in wanted.items()
             if need > have.get(name, 0)]  # fmt: skip
    if short:
        raise UsageError(f"the cluster is too small ({'; '.join(short)}): lower num_workers or cpus_per_worker")


def _resources() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def _own_error(error: BaseException) -> XaibatchError | None:
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None or isinstance(seen, XaibatchError):
            return seen
        failures = getattr(seen, "worker_failures", None)
        seen = next(iter(failures.values()), None) if failures else (getattr(seen, "cause", None) or seen.__cause__)
    return None
