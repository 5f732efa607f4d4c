"""A number of films comes in; workers that hold the chest volume once render and write them, the manifest goes out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import ray

from xaibatch.cluster.connect import ONE_THREAD, connected
from xaibatch.config import EngineConfig
from xaibatch.simulate.dataset import check_number, make_films, missing_indices, prepare_output, write_manifest
from xaibatch.simulate.options import SimulationOptions
from xaibatch.simulate.radiograph import RadiographSimulator
from xaibatch.simulate.volume import ChestVolume, load_volume

FILMS_A_TASK: Final = 4
"""Films of one call: seconds of work, and little to repeat when a worker is lost."""
CALLS_A_WORKER: Final = 2
"""Calls waiting at each worker."""


def simulate_on_ray(
    output: Path,
    num: int,
    seed: int,
    options: SimulationOptions,
    report: Callable[[int, int], None] | None = None,
    *,
    address: str | None = None,
    num_workers: int | None = None,
    cache: Path | None = None,
) -> Path:
    """Make what is missing of a set of `num` films, one worker a CPU; return the manifest. Same files as `simulate`.

    The output folder must be reachable by every worker under the same path. A lost worker's films are rendered again.
    """
    check_number(num)
    output = output.resolve()
    prepare_output(output, seed, options)
    missing = missing_indices(output, num)
    if missing:
        volume = load_volume(cache)
        with connected(EngineConfig(address=address)):
            _render(output, seed, options, missing, volume, num_workers, lambda n: report and report(num - n, num))
    return write_manifest(output, seed, options, num)


def _render(
    output: Path,
    seed: int,
    options: SimulationOptions,
    missing: list[int],
    volume: ChestVolume,
    num_workers: int | None,
    left: Callable[[int], object],
) -> None:
    parts = [missing[k : k + FILMS_A_TASK] for k in range(0, len(missing), FILMS_A_TASK)]
    num_cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    count = min(num_workers or num_cpus, len(parts))
    actor: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=3, runtime_env={"env_vars": ONE_THREAD})(
        _Worker
    )
    stored = ray.put(volume)
    workers: list[Any] = [actor.remote(seed, options, str(output)) for _ in range(max(1, count))]
    waiting: dict[Any, Any] = {}
    number_left = len(missing)
    queue = iter(parts)
    for worker in workers * CALLS_A_WORKER:
        if (part := next(queue, None)) is not None:
            waiting[worker.render.remote(stored, part)] = worker
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        worker = waiting.pop(done)
        number_left -= ray.get(done)
        left(number_left)
        if (part := next(queue, None)) is not None:
            waiting[worker.render.remote(stored, part)] = worker


class _Worker:
    """Renders lists of indices; builds its simulator at the first call, and again after a restart."""

    def __init__(self, seed: int, options: SimulationOptions, output: str) -> None:
        self._seed, self._options, self._output = seed, options, Path(output)
        self._simulator: RadiographSimulator | None = None

    def render(self, volume: ChestVolume, indices: list[int]) -> int:
        if self._simulator is None:
            self._simulator = RadiographSimulator(volume, self._options, self._seed)
        return sum(1 for _ in make_films(self._output, self._simulator, indices))
