"""`python jobs/benchmark.py PART`: flags in, Markdown tables on the screen and a JSON file out."""

import json
import sys
import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from xaibatch.benchmark.lines import Part
from xaibatch.benchmark.options import BenchmarkOptions
from xaibatch.benchmark.setting import Setting, prepare
from xaibatch.config import parse_setting
from xaibatch.errors import UsageError
from xaibatch.options import validated

Option = typer.Option


class What(StrEnum):
    """What can be measured."""

    floor = "floor"
    explainers = "explainers"
    metrics = "metrics"
    protocol = "protocol"
    scaling = "scaling"
    sampling = "sampling"
    all = "all"


def benchmark(
    what: Annotated[What, typer.Argument(help="sampling, which takes no times, is not in all")] = What.all,
    model: Annotated[str | None, Option(help="timm model name [vit_tiny_patch16_224]")] = None,
    checkpoint: Annotated[str | None, Option(help="weights; without them untrained ones, which cost the same")] = None,
    data: Annotated[str | None, Option(help="folder or manifest; without it random pictures")] = None,
    images: Annotated[int | None, Option(min=1, help="images of a batch of trace explainers")] = None,
    heavy_images: Annotated[int | None, Option(min=1, help="images of sampling explainers and the protocol")] = None,
    device: Annotated[str | None, Option(help="cpu or cuda")] = None,
    threads: Annotated[int | None, Option(min=1, help="threads of PyTorch")] = None,
    runs: Annotated[int | None, Option(min=1, help="rounds; everything that is compared runs once in each")] = None,
    only: Annotated[str | None, Option(help="comma-separated explainers or metrics")] = None,
    profile: Annotated[bool, Option("--profile", help="also print where our own time goes")] = False,
    json_: Annotated[Path | None, Option("--json", help="write everything measured to this file")] = None,
    set_: Annotated[list[str] | None, Option("--set", help="any other option: num_samples=100")] = None,
) -> None:
    """Measure how close this package is to the bare forward pass, and how far ahead of the stock tools."""
    flags = {
        "model": model,
        "checkpoint": checkpoint,
        "data": data,
        "images": images,
        "heavy_images": heavy_images,
        "device": device,
        "threads": threads,
        "runs": runs,
        "only": tuple(only.split(",")) if only else None,
    }
    values = dict(parse_setting(text) for text in set_ or [])
    values |= {name: value for name, value in flags.items() if value is not None}
    options = validated(BenchmarkOptions, values, "benchmark")
    command = " ".join(["python jobs/benchmark.py", *sys.argv[1:]])
    measured = run(what, options, command=command, profile=profile)
    if json_ is not None:
        json_.write_text(json.dumps(measured, indent=1) + "\n")


def run(what: What, options: BenchmarkOptions, *, command: str, profile: bool = False) -> dict[str, Any]:
    """Measure, print each table as soon as it is there, and return everything as plain data."""
    import torch

    from xaibatch.benchmark.machine import describe, summary
    from xaibatch.benchmark.profiling import report

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is cuda but PyTorch finds no GPU here: leave --device out")
    if options.threads:
        torch.set_num_threads(options.threads)
    described = describe(options.device, command)
    print(f"{summary(described)}\n", flush=True)
    names = [name for name in What if name not in (What.all, What.sampling)] if what == What.all else [what]
    records = []
    with tempfile.TemporaryDirectory(prefix="xaibatch-benchmark-") as folder:
        setting = prepare(options, Path(folder))
        for name in names:
            for part in _measure(name)(setting):
                print(part.table(), flush=True)
                records.append(part.record())
                if profile:
                    for label, work in part.profiled.items():
                        print(f"#### where the time goes: {label}\n\n{report(work, options.device)}", flush=True)
    return {"machine": described, "options": options.model_dump(mode="json"), "parts": records}


def _measure(name: What) -> Callable[[Setting], list[Part]]:
    """The function of a part; imported here, since each takes its own packages along."""
    if name == What.floor:
        from xaibatch.benchmark.floor import measure_floor

        return lambda setting: [measure_floor(setting)]
    if name == What.explainers:
        from xaibatch.benchmark.explainers import measure_explainers

        return measure_explainers
    if name == What.metrics:
        from xaibatch.benchmark.metrics import measure_metrics

        return lambda setting: [measure_metrics(setting)]
    if name == What.protocol:
        from xaibatch.benchmark.protocol import measure_protocol

        return measure_protocol
    if name == What.sampling:
        from xaibatch.benchmark.sampling import measure_sampling

        return lambda setting: [measure_sampling(setting)]
    from xaibatch.benchmark.end_to_end import measure_scaling

    return measure_scaling
