"""The floor: bare forward passes a second of the model at its best batch size, per precision, eager and compiled.

Shape letters: B images, C channels, H W pixels, K classes.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from xaibatch.benchmark.lines import Line, Part
from xaibatch.benchmark.setting import Setting
from xaibatch.benchmark.timing import Timing, interleaved, ratio

Precision = Literal["float32", "TF32", "bfloat16", "bfloat16 weights"]
"""`bfloat16` is autocast over float32 weights, what a run uses; `bfloat16 weights` a copy of the model in it."""

PROBES = 2
"""Runs of each batch size when the best one is looked for."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One way of running the model: at `batch` images at a time it is fastest."""

    name: str
    run: Callable[[Tensor], Tensor]
    batch: int

    def passes(self, images_BCHW: Tensor) -> None:
        """All images, `batch` at a time."""
        for chunk_BCHW in torch.split(images_BCHW, self.batch):
            self.run(chunk_BCHW)


def measure_floor(setting: Setting) -> Part:
    """Images a second for every precision and mode, and on a GPU what copies to and from it cost."""
    forwards, skipped = {}, []
    for precision in precisions(setting.device):
        for compiled in (False, True):
            name = f"{precision}, {'compiled' if compiled else 'eager'}"
            try:
                run = forward_in(setting, precision, compiled=compiled)
                forwards[name] = Forward(name=name, run=run, batch=best_batch(setting, run))
            except Exception as error:  # no compiler, an operator that bfloat16 lacks: say so, go on
                first = str(error).strip().splitlines() or [""]
                skipped.append(Line(name=name, remark=f"skipped: {type(error).__name__}: {first[0][:120]}"))
    num_images = setting.options.largest_batch
    images_BCHW = setting.images(num_images)
    timings, errors = interleaved(
        {name: partial(forward.passes, images_BCHW) for name, forward in forwards.items()},
        runs=setting.options.runs,
        device=setting.device,
    )
    eager = timings.get("float32, eager")
    lines = [_line(forwards[name], timing, eager, num_images) for name, timing in timings.items()] + [
        Line(name=name, remark=text) for name, text in errors.items()
    ]
    return Part(
        name="floor",
        title=f"floor: bare forward passes, {setting.options.model}",
        lines=[*lines, *skipped, *_copies(setting)],
        notes=(
            f"{num_images} images a round in batches of the best size (powers of two up to {num_images} are tried); "
            "median (smallest–largest) of the rounds",
        ),
    )


def precisions(device: str) -> tuple[Precision, ...]:
    return ("float32", "TF32", "bfloat16", "bfloat16 weights") if device == "cuda" else (
        "float32", "bfloat16", "bfloat16 weights",
    )  # fmt: skip


def forward_in(setting: Setting, precision: Precision, *, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    """The bare forward pass in one precision. Raises RuntimeError where it is to be compiled and nothing can."""
    model: Any = setting.model
    if precision == "bfloat16 weights":
        model = deepcopy(setting.model).to(torch.bfloat16)
    if compiled:
        refusal = _no_compiler(setting)
        if refusal:
            raise RuntimeError(refusal)
        model = torch.compile(model)

    def run(images_BCHW: Tensor) -> Tensor:
        with torch.inference_mode(), _in_precision(precision, setting.device):
            if precision == "bfloat16 weights":
                images_BCHW = images_BCHW.to(torch.bfloat16)
            logits_BK: Tensor = model(images_BCHW)
            return logits_BK

    return run


def best_batch(setting: Setting, run: Callable[[Tensor], Tensor]) -> int:
    """The power of two with the fewest seconds an image."""
    best, best_s = 1, float("inf")
    size = 1
    while size <= setting.options.largest_batch:
        images_BCHW = setting.images(size)
        try:
            run(images_BCHW)
        except torch.OutOfMemoryError:
            break
        seconds = min(_seconds(run, images_BCHW, setting.device) for _ in range(PROBES)) / size
        if seconds < best_s:
            best, best_s = size, seconds
        size *= 2
    return best


def best_forward(setting: Setting, precision: Precision) -> Forward:
    """The eager forward pass of one precision at its best batch size: the floor that a protocol is held against."""
    run = forward_in(setting, precision)
    return Forward(name=precision, run=run, batch=best_batch(setting, run))


def _seconds(run: Callable[[Tensor], Tensor], images_BCHW: Tensor, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(images_BCHW)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _line(forward: Forward, timing: Timing, eager: Timing | None, num_images: int) -> Line:
    cells: dict[str, Any] = {
        "batch": forward.batch,
        "images/s": timing.rate(num_images),
        "ms an image": _milliseconds(timing, num_images, "wall"),
        "CPU ms an image": _milliseconds(timing, num_images, "cpu"),
    }
    if timing.device_s:
        cells["GPU ms an image"] = _milliseconds(timing, num_images, "device")
    cells["speed over float32 eager"] = ratio(eager, timing) if eager else None
    return Line(name=forward.name, cells=cells)


def _milliseconds(timing: Timing, num_images: int, clock: Any) -> float:
    return 1000 * timing.per(num_images, clock).median


@contextmanager
def _tf32() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _in_precision(precision: Precision, device: str) -> AbstractContextManager[Any]:
    if precision == "TF32":
        return _tf32()
    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _no_compiler(setting: Setting) -> str:
    """Why nothing is compiled, empty if it can be."""
    if not setting.options.compiled:
        return "torch.compile was not asked for"
    if setting.device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return "no C++ compiler (g++ or clang++) for torch.compile"
    return ""


def _copies(setting: Setting) -> list[Line]:
    """Seconds of copying a batch to the GPU from pageable and from pinned memory, of its copy on the GPU, and of
    logits back."""
    if setting.device != "cuda":
        return []
    on_device = setting.images(setting.options.largest_batch)
    pageable = on_device.cpu()
    pinned = pageable.pin_memory()
    logits_BK = setting.model(on_device[:1]).detach().repeat(len(on_device), 1)
    work: Mapping[str, Callable[[], object]] = {
        "host to device, pageable": lambda: pageable.to("cuda"),
        "host to device, pinned": lambda: pinned.to("cuda", non_blocking=True),
        "copy on the device": lambda: on_device.clone(),
        "logits to host": lambda: logits_BK.cpu(),
    }
    timings, _ = interleaved(work, runs=setting.options.runs, device="cuda")
    num_bytes = on_device.numel() * on_device.element_size()
    lines = []
    for name, timing in timings.items():
        size = logits_BK.numel() * logits_BK.element_size() if name.startswith("logits") else num_bytes
        cells = {"ms an image": _milliseconds(timing, len(on_device), "wall"), "GB/s": size / min(timing.wall_s) / 1e9}
        lines.append(Line(name=name, cells=cells))
    return lines
