"""The study's whole protocol per image: ours against the floor of its required forward passes, and stock pieces.

Shape letters: B images, C channels, H W pixels.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

import numpy as np
import torch

from xaibatch.benchmark.end_to_end import measure_end_to_end
from xaibatch.benchmark.floor import Forward, Precision, best_forward
from xaibatch.benchmark.lines import Cell, Line, Part
from xaibatch.benchmark.machine import installed
from xaibatch.benchmark.profiling import device_busy
from xaibatch.benchmark.setting import Setting, paper_config, smaller
from xaibatch.benchmark.stock_protocol import NEEDED_PACKAGES, CountingModel, StockProtocol
from xaibatch.benchmark.timing import Clock, Spread, Timing, Work, interleaved, ratio
from xaibatch.explainers.base import EXPLAINERS, ExplainInput
from xaibatch.perturb.segmentation import segment
from xaibatch.pipeline.calibrate import calibrate, has_fast_bfloat16
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.local import run_group
from xaibatch.pipeline.work import Stopwatch
from xaibatch.pipeline.writing import write_explanations

FLOORS: Final[tuple[Precision, ...]] = ("float32", "bfloat16")
"""Precisions that a run may choose."""

CLOCKS: Final[tuple[Clock, ...]] = ("wall", "cpu")

FLOOR_BATCHES = 4
"""Batches of the bare forward pass in each round."""


@dataclass(kw_only=True)
class OurProtocol:
    """One shard explained, scored and written in this process; keeps the last run's count of forward passes."""

    setting: Setting
    job: Job
    passes: dict[Any, int] = field(default_factory=dict)

    def run(self) -> None:
        session = self.setting.session(self.job)
        shard = self.setting.shard()
        explained = session.explain(shard)
        write_explanations(self.job, shard, explained)
        for group in self.job.groups:
            run_group(session, self.job, shard, group, explained, Stopwatch())
        by_precision = {}
        for label in ("", *self.job.precisions):
            precision = self.job.precisions.get(label, self.job.dtype)
            by_precision[precision] = session.runner(label).num_forward_passes
        traced = session.num_forward_passes - sum(by_precision.values())
        by_precision[self.job.dtype] += traced
        self.passes = by_precision


def measure_protocol(setting: Setting) -> list[Part]:
    """The protocol itself, then end-to-end runs with and without Ray."""
    few = smaller(setting, setting.options.heavy_images)
    config = paper_config(few)
    ours = {"ours, float32": OurProtocol(setting=few, job=few.job(config.explainers, config.metrics, **_kept(config)))}
    notes = []
    if has_fast_bfloat16(torch.device(setting.device)):
        chosen, how = _calibrated(setting, config)
        notes.append(how)
        if "bfloat16" in chosen.values():
            job = few.job(config.explainers, config.metrics, chosen, **_kept(config))
            ours["ours, precision auto"] = OurProtocol(setting=few, job=job)
    else:
        notes.append("no bfloat16 line: this device has no fast bfloat16")
    part = _measured(few, config, ours, notes)
    return [part, measure_end_to_end(setting, config)]


def _measured(setting: Setting, config: Any, ours: Mapping[str, OurProtocol], notes: list[str]) -> Part:
    num = len(setting.dataset.records)
    precisions = {precision for one in ours.values() for precision in one.job.precisions.values()}
    floors = {name: best_forward(setting, name) for name in FLOORS if name in precisions}
    counting = CountingModel(copy.deepcopy(setting.model))  # a trace refuses a model with the counter's hook
    work: dict[str, Work] = {name: one.run for name, one in ours.items()}
    work |= {f"floor {name}": _floor(setting, forward) for name, forward in floors.items()}
    work["relevance"] = lambda: _relevance(setting, config)
    work["segmentation"] = lambda: _segmentation(setting, config)
    missing = [package for package in NEEDED_PACKAGES if not installed(package)]
    if not missing:
        stock = StockProtocol(counting, config, setting.device)
        work["stock"] = lambda: [
            stock.run(image_CHW, int(label))
            for image_CHW, label in zip(setting.images_BCHW, setting.labels_B, strict=True)
        ]
    timings, errors = interleaved(work, runs=setting.options.runs, device=setting.device, warm_up=False)
    counting.close()
    measured = _Measured(setting=setting, timings=timings, floors=floors, num_images=num)
    lines = []
    for name, one in ours.items():
        if name in errors:
            lines.append(Line(name=name, remark=f"failed: {errors[name]}"))
            continue
        lines.append(Line(name=name, cells=measured.cells(one, timings[name])))
    if missing:
        lines.append(Line(name="stock pieces", remark=f"{', '.join(missing)} not installed"))
    elif "stock" in errors:
        lines.append(Line(name="stock pieces", remark=f"failed: {errors['stock']}"))
    else:
        passes, refused = _stock_passes(setting, config)
        cells: dict[str, Cell] = {
            "s an image": timings["stock"].per(num),
            "CPU s an image": timings["stock"].per(num, "cpu").median,
            "forward passes": passes,
        }
        remark = "batch one, LIME batch ten, Quantus per explainer"
        if refused:
            remark += f"; Quantus refused {refused} of one image's calls (all-zero map)"
        lines.append(Line(name="stock pieces", cells=cells, remark=remark))
    batches = ", ".join(f"{name} {forward.batch}" for name, forward in floors.items())
    return Part(
        name="protocol",
        title=f"the study's protocol (paper.yaml), {setting.options.model}, images: {num}",
        lines=lines,
        profiled={name: one.run for name, one in ours.items()},
        notes=[
            f"floor: required forward passes times a bare one at its best batch size ({batches}), in the same rounds",
            "net / floor: without relevance passes (what traces take beyond one forward pass) and superpixels",
            *notes,
        ],
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """All timings of the rounds, from which the lines are taken apart."""

    setting: Setting
    timings: Mapping[str, Timing]
    floors: Mapping[Precision, Forward]
    num_images: int

    def cells(self, one: OurProtocol, timing: Timing) -> dict[str, Cell]:
        """Seconds an image of one of our lines."""
        num, stock = self.num_images, self.timings.get("stock")
        parts = {clock: self._parts(one, timing, clock) for clock in CLOCKS}
        floor, relevance, superpixels, net = parts["wall"]
        cells: dict[str, Cell] = {
            "s an image": timing.per(num),
            "CPU s an image": timing.per(num, "cpu").median,
            "forward passes": sum(one.passes.values()) / num,
            "floor s": median(floor) / num,
            "relevance s": median(relevance) / num,
            "superpixels s": median(superpixels) / num,
            "net / floor": Spread.of(net),
            "net / floor, CPU": median(parts["cpu"][3]),
            "stock / ours, wall": ratio(stock, timing) if stock else None,
            "stock / ours, CPU": ratio(stock, timing, "cpu").median if stock else None,
        }
        if self.setting.device == "cuda":
            cells["device busy"] = device_busy(one.run)
        return cells

    def _parts(self, one: OurProtocol, timing: Timing, clock: Clock) -> tuple[list[float], ...]:
        """By round: the floor's seconds, what relevance passes take beyond a forward pass, superpixels, and the rest of
        our seconds over the floor's."""
        passes = {
            name: [seconds / (FLOOR_BATCHES * forward.batch) for seconds in self._seconds(f"floor {name}", clock)]
            for name, forward in self.floors.items()
        }
        rounds = range(len(timing.wall_s))
        floor = [sum(num * passes[name][r] for name, num in one.passes.items()) for r in rounds]
        num_traced = self.num_images * _num_variants(one.job.config)
        traced = self._seconds("relevance", clock)
        relevance = [traced[r] - num_traced * passes["float32"][r] for r in rounds]
        superpixels = list(self._seconds("segmentation", clock))
        net = [(timing.seconds(clock)[r] - relevance[r] - superpixels[r]) / floor[r] for r in rounds]
        return floor, relevance, superpixels, net

    def _seconds(self, name: str, clock: Clock) -> tuple[float, ...]:
        return self.timings[name].seconds(clock)


def _calibrated(setting: Setting, config: Any) -> tuple[dict[str, str], str]:
    """Precisions as `auto` chooses them on the setting's images, and a sentence about it."""
    job = setting.job(config.explainers, config.metrics, **_kept(config))
    found = calibrate(setting.session(job), setting.shard())
    measured = ", ".join(
        f"{choice['label']} {choice['precision']} (worst error {choice['worst_error']:.3g})"
        for choice in found["measured"]
    )
    return dict(found["chosen"]), f"precision auto on {len(found['sample'])} images: {measured}"


def _kept(config: Any) -> dict[str, Any]:
    """The sections of the study's configuration that decide scores."""
    return {"maps": config.maps, "target": config.target, "precision": config.precision}


def _num_variants(config: Any) -> int:
    """Traced inputs of an image: itself and its noisy copies."""
    return 1 + int(config.metrics.get("avg_sensitivity", {}).get("num_samples", 0))


def _floor(setting: Setting, forward: Forward) -> Work:
    images_BCHW = setting.images(FLOOR_BATCHES * forward.batch)
    return lambda: forward.passes(images_BCHW)


def _relevance(setting: Setting, config: Any) -> None:
    """Every explainer that reads a trace, on as many inputs as the protocol traces, in batches as a run has them."""
    explainers = [
        EXPLAINERS[label](**options) for label, options in config.explainers.items() if EXPLAINERS[label].needs != "any"
    ]
    images_BCHW = setting.images(len(setting.dataset.records) * _num_variants(config))
    batch = setting.session(setting.job({}, {})).explain_batch_size
    for chunk_BCHW in torch.split(images_BCHW, batch):
        inputs = ExplainInput(
            model=setting.model,
            images_BCHW=chunk_BCHW,
            targets_B=torch.zeros(len(chunk_BCHW), dtype=torch.int64, device=chunk_BCHW.device),
            keys=(),
            run_plans=lambda requests: [],
        )
        for explainer in explainers:
            explainer.explain(inputs)


def _segmentation(setting: Setting, config: Any) -> None:
    """Superpixels of the images and of as many noisy copies as the protocol explains."""
    radius = float(config.metrics.get("avg_sensitivity", {}).get("radius", 0.0))
    generator = np.random.default_rng(0)
    for image_CHW in setting.images_BCHW.cpu().numpy():
        for variant in range(_num_variants(config)):
            noise = generator.uniform(-radius, radius, image_CHW.shape) if variant else 0.0
            segment((image_CHW + noise).astype(np.float32), setting.segmentation)


def _stock_passes(setting: Setting, config: Any) -> tuple[int, int]:
    """Images through the model for the first image's stock protocol, and Quantus calls that were refused; counted."""
    counting = CountingModel(setting.model)
    stock = StockProtocol(counting, config, setting.device)
    try:
        stock.run(setting.images_BCHW[0], int(setting.labels_B[0]))
        return counting.num_images, stock.num_refused
    finally:
        counting.close()
