"""A function in, a report of where its time goes out: Python's and PyTorch's own profilers."""

import cProfile
import io
import pstats
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from xaibatch.benchmark.timing import Work

NUM_ROWS = 20
"""Functions and operators listed."""


def report(work: Work, device: str) -> str:
    """Functions by their own processor time, then operators by theirs, each from a run of its own."""
    profiler = cProfile.Profile(time.process_time)  # a busy neighbour does not show
    profiler.runcall(work)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(NUM_ROWS)
    with profile(activities=_activities(device)) as operators:
        work()
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    table = operators.key_averages().table(sort_by=order, row_limit=NUM_ROWS, max_name_column_width=45)
    return f"{text.getvalue().strip()}\n\n{table}\n"


def device_busy(work: Work) -> float:
    """Share of wall time in which a kernel or copy ran on the GPU, from the profiler's trace (kernels of one stream do
    not overlap); the profiler itself slows the host down, so this is a lower bound."""
    torch.cuda.synchronize()
    with profile(activities=_activities("cuda")) as traced:
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    rows: Any = traced.key_averages()
    return float(sum(row.self_device_time_total for row in rows)) / 1e6 / seconds


def _activities(device: str) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
