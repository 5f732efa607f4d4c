"""Functions in, seconds of each in alternating rounds out: ratios that a busy machine does not spoil.

Everything that is compared runs in the same process on the same threads, one after the other in every round, so that a
neighbour's load hits all alike; a ratio is taken within each round. Beside wall time stands the processor time of all
threads of this process, which other processes do not add to (threads that spin while they wait do).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch

Work = Callable[[], object]

Clock = Literal["wall", "cpu", "device"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median, smallest and largest of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """
        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
        """
        return cls(median=median(values), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one piece of work, one entry a round; `device_s` by CUDA events, empty on a CPU."""

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    device_s: tuple[float, ...] = ()

    def seconds(self, clock: Clock = "wall") -> tuple[float, ...]:
        return {"wall": self.wall_s, "cpu": self.cpu_s, "device": self.device_s}[clock]

    def per(self, num: int, clock: Clock = "wall") -> Spread:
        """Seconds per image, for work on `num` images."""
        return Spread.of([seconds / num for seconds in self.seconds(clock)])

    def rate(self, num: int) -> Spread:
        """Images a second, for work on `num` images."""
        return Spread.of([num / seconds for seconds in self.wall_s])


def ratio(of: Timing, to: Timing, clock: Clock = "wall", scale: float = 1.0) -> Spread:
    """`scale` times the seconds of one over those of the other, round by round."""
    return Spread.of([scale * a / b for a, b in zip(of.seconds(clock), to.seconds(clock), strict=True)])


def interleaved(
    work: Mapping[str, Work], *, runs: int, device: str, warm_up: bool = True
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Run everything once per round; return timings by name, and for what raised an error its first line instead.

    warm_up: run everything once before the first round (first calls allocate, import and choose kernels).
    """
    rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in work}
    errors: dict[str, str] = {}
    for number in range(-1 if warm_up else 0, runs):
        for name, call in work.items():
            if name in errors:
                continue
            try:
                spent = _timed(call, device)
            except Exception as error:  # stock tools raise whatever they raise; the line then says so
                errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                continue
            if number >= 0:
                rounds[name].append(spent)
    timings = {}
    for name, spent_by_round in rounds.items():
        if name not in errors:
            wall, cpu, on_device = zip(*spent_by_round, strict=True)
            timings[name] = Timing(wall_s=wall, cpu_s=cpu, device_s=on_device if device == "cuda" else ())
    return timings, errors


def _timed(call: Work, device: str) -> tuple[float, float, float]:
    """Wall, processor and device seconds of one call; a GPU's queue is empty before and after."""
    if device != "cuda":
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - wall, time.process_time() - cpu, 0.0
    event: Any = torch.cuda.Event  # untyped there
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu, begin.elapsed_time(end) / 1000
