"""Metrics: the ratio to stock Quantus on the same images, maps, model and threads, with one and with four explainers.

Shape letters: B images, C channels, H W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xaibatch.benchmark.lines import Cell, Line, Part, announce
from xaibatch.benchmark.machine import installed
from xaibatch.benchmark.setting import Setting, smaller
from xaibatch.benchmark.stock_quantus import stock_score
from xaibatch.benchmark.timing import Work, interleaved, ratio
from xaibatch.maps import pixel_map
from xaibatch.pipeline.job import GroupPlan, Job, ShardExplanations
from xaibatch.pipeline.scoring import plan_group, score_group
from xaibatch.pipeline.session import Session
from xaibatch.pipeline.work import pixels_for

EXPLAINERS = ("transformer_lrp", "attention_rollout_mean", "attention_rollout_min", "attention_rollout_max")
"""Whose maps are scored: the first one alone, then all four. The first adds a relevance pass of its own to the trace
that they share."""

ONE_TRACE = ("attention_gradient", "gradcam", "input_gradient", "raw_attention")
"""Four that read one trace and add no pass of their own: what re-explaining noisy copies can share is all shared."""

NUM_NOISY = 5
"""Noisy copies of the robustness metrics."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One of our metrics and the Quantus class that computes the same, with equal work on both sides."""

    ours: str
    quantus: str
    options: Mapping[str, Any] = field(default_factory=dict)
    quantus_options: Mapping[str, Any] = field(default_factory=dict)
    explainers: tuple[str, ...] = EXPLAINERS

    @property
    def title(self) -> str:
        return self.ours if self.explainers == EXPLAINERS else f"{self.ours}, one trace"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A session with explanations made beforehand, and the same as arrays for Quantus."""

    setting: Setting
    job: Job
    session: Session
    explained: ShardExplanations
    maps: Mapping[str, NDArray[np.float32]]
    """Pixel maps (B,1,H,W) by explainer."""

    def ours(self) -> None:
        """Plan, answer and score every group of the job."""
        shard = self.setting.shard()
        for group in self.job.groups:
            batch = pixels_for(self.job, group, lambda: self.session.hold(shard).batch)
            plan = GroupPlan(questions=())
            if group.kind != "map":
                plan = plan_group(self.job, group, self.explained, batch)
            answers = self.session.answer(shard, plan, group.metrics[0])
            score_group(self.job, group, self.explained, plan, answers, batch)

    def stock(self, pair: Pair, batch_size: int) -> None:
        """The Quantus metric for each explainer in turn; a noisy copy is explained by our own session, in batches."""
        for label, maps_B1HW in self.maps.items():
            stock_score(
                pair.quantus,
                pair.quantus_options,
                model=self.setting.model,
                x_BCHW=self.setting.images_BCHW.cpu().numpy(),
                y_B=self.setting.labels_B,
                maps_B1HW=maps_B1HW,
                explain_func=self._explain_func(label),
                batch_size=batch_size,
                device=self.setting.device,
            )

    def _explain_func(self, label: str) -> Callable[..., NDArray[np.float32]]:
        def explain(model: Any, inputs: Any, targets: Any, **_: Any) -> NDArray[np.float32]:
            keys = [self.job.key(f"call-{row}", 0) for row in range(len(inputs))]
            native = self.session.explain_images(label, np.asarray(inputs), [int(k) for k in targets], keys)
            return _pixels(self.job, native, inputs.shape[-2:])

        return explain


def measure_metrics(setting: Setting) -> Part:
    """One line for every pair."""
    few = smaller(setting, setting.options.metric_images)
    lines, profiled = [], {}
    for pair in pairs(few):
        if setting.options.only and pair.ours not in setting.options.only:
            continue
        announce(pair.title)
        benches = {num: bench(few, pair, num) for num in (1, len(pair.explainers))}
        lines.append(_line(few, pair, benches))
        profiled[pair.title] = benches[len(pair.explainers)].ours
    return Part(
        name="metrics",
        title=f"metrics, {setting.options.model}",
        lines=lines,
        profiled=profiled,
        notes=(
            "stock / ours: Quantus called once an explainer at the better of two batch sizes (1, all images), over "
            "ours for all explainers; maps are given to both, ours plans, runs and scores",
            f"{len(few.dataset.records)} images, {setting.options.num_steps} steps; noisy copies are explained in "
            "batches by our explainers on both sides",
            f"explainers: {', '.join(EXPLAINERS)}; one trace: {', '.join(ONE_TRACE)}",
        ),
    )


def pairs(setting: Setting) -> tuple[Pair, ...]:
    """What is compared: equal numbers of forward passes and equal options for one image and map."""
    channels, height, width = setting.images_BCHW.shape[1:]
    steps = setting.options.num_steps
    step = entries_in_step(channels, height * width, steps)
    side = -(-height // isqrt(steps))
    by_step = {"features_in_step": step}
    regions = {"patch_size": side}
    num_classes = len(setting.model.class_names)
    shares = [100 * (s + 1) // (steps + 1) for s in range(steps)]
    subset = min(224, channels * height * width // 4)
    noisy, stock_noisy = {"num_samples": NUM_NOISY}, {"nr_samples": NUM_NOISY}
    return (
        Pair(
            ours="faithfulness_correlation",
            quantus="FaithfulnessCorrelation",
            options={"num_runs": 2 * steps, "subset_size": subset},
            quantus_options={"nr_runs": 2 * steps, "subset_size": subset},
        ),
        Pair(ours="faithfulness_estimate", quantus="FaithfulnessEstimate", options=by_step, quantus_options=by_step),
        Pair(
            ours="monotonicity",
            quantus="MonotonicityCorrelation",
            options={"features_in_step": 4 * step, "num_samples": 4},
            quantus_options={"features_in_step": 4 * step, "nr_samples": 4},
        ),
        Pair(ours="monotonicity_arya", quantus="Monotonicity", options=by_step, quantus_options=by_step),
        Pair(ours="pixel_flipping", quantus="PixelFlipping", options=by_step, quantus_options=by_step),
        Pair(ours="region_perturbation", quantus="RegionPerturbation", options=regions, quantus_options=regions),
        Pair(ours="selectivity", quantus="Selectivity", options=regions, quantus_options=regions),
        Pair(
            ours="sensitivity_n",
            quantus="SensitivityN",
            options={**by_step, "semantics": "quantus-0.6"},
            quantus_options=by_step,
        ),
        Pair(ours="irof", quantus="IROF"),
        Pair(ours="road", quantus="ROAD", options={"percentages": shares}, quantus_options={"percentages": shares}),
        Pair(
            ours="infidelity",
            quantus="Infidelity",
            options=regions,
            quantus_options={"perturb_patch_sizes": [side], "n_perturb_samples": 1},
        ),
        Pair(ours="avg_sensitivity", quantus="AvgSensitivity", options=noisy, quantus_options=stock_noisy),
        Pair(
            ours="avg_sensitivity",
            quantus="AvgSensitivity",
            options=noisy,
            quantus_options=stock_noisy,
            explainers=ONE_TRACE,
        ),
        Pair(ours="max_sensitivity", quantus="MaxSensitivity", options=noisy, quantus_options=stock_noisy),
        Pair(
            ours="local_lipschitz_estimate",
            quantus="LocalLipschitzEstimate",
            options=noisy,
            quantus_options=stock_noisy,
        ),
        Pair(
            ours="relative_input_stability",
            quantus="RelativeInputStability",
            options=noisy,
            quantus_options=stock_noisy,
        ),
        Pair(
            ours="relative_output_stability",
            quantus="RelativeOutputStability",
            options=noisy,
            quantus_options=stock_noisy,
        ),
        Pair(ours="random_logit", quantus="RandomLogit", quantus_options={"num_classes": num_classes}),
        Pair(
            ours="random_logit",
            quantus="RandomLogit",
            quantus_options={"num_classes": num_classes},
            explainers=ONE_TRACE,
        ),
        Pair(ours="sparseness", quantus="Sparseness"),
        Pair(ours="complexity", quantus="Complexity"),
        Pair(ours="effective_complexity", quantus="EffectiveComplexity"),
    )


def entries_in_step(channels: int, num_pixels: int, num_steps: int) -> int:
    """Entries of a step, so that there are about `num_steps`; Quantus wants a divisor of the number of pixels.

    >>> entries_in_step(3, 224 * 224, 49)  # 48 steps
    3136
    """
    divisors = (size for size in range(1, num_pixels + 1) if num_pixels % size == 0)
    return min(divisors, key=lambda size: abs(channels * num_pixels // size - num_steps))


def bench(setting: Setting, pair: Pair, num_explainers: int) -> Bench:
    """Explain the images once with the first explainers, so that only the metric is measured."""
    labels = pair.explainers[:num_explainers]
    job = setting.job({label: {} for label in labels}, {pair.ours: dict(pair.options)})
    session = setting.session(job)
    explained = session.explain(setting.shard())
    size = (explained.shape_CHW[1], explained.shape_CHW[2])
    maps = {label: _pixels(job, explained.maps[label, 0].maps_Bhw, size) for label in labels}
    return Bench(setting=setting, job=job, session=session, explained=explained, maps=maps)


def _line(setting: Setting, pair: Pair, benches: Mapping[int, Bench]) -> Line:
    """Ours and stock in alternation, with one and with all explainers."""
    options, cells = setting.options, dict[str, Cell]()
    best, failure = (1, "stock: quantus not installed")
    if installed("quantus"):
        best, failure = _best_batch(setting, pair, benches[max(benches)])
    for num, one in benches.items():
        work: dict[str, Work] = {"ours": one.ours}
        if not failure:
            work["stock"] = partial(one.stock, pair, best)
        timings, errors = interleaved(work, runs=options.runs, device=options.device)
        if errors:
            return Line(name=pair.title, cells=cells, remark="; ".join(f"{k}: {v}" for k, v in errors.items()))
        ours, stock = timings["ours"], timings.get("stock")
        cells[f"ms an image, {num} expl."] = 1000 * ours.per(len(setting.dataset.records)).median
        cells[f"stock / ours, {num} expl."] = ratio(stock, ours) if stock else None
        cells[f"CPU time, {num} expl."] = ratio(stock, ours, "cpu").median if stock else None
    cells["stock batch"] = None if failure else best
    return Line(name=pair.title, cells=cells, remark=failure or pair.quantus)


def _best_batch(setting: Setting, pair: Pair, one: Bench) -> tuple[int, str]:
    """The batch size at which Quantus is faster and refuses no explainer's maps (it refuses a batch of negative values
    only), and why it cannot be run where it cannot."""
    sizes = sorted({1, len(setting.dataset.records)})
    work: dict[str, Work] = {str(size): partial(one.stock, pair, size) for size in sizes}
    timings, errors = interleaved(work, runs=1, device=setting.device, warm_up=False)
    if not timings:
        return 1, f"{pair.quantus} itself fails: {next(iter(errors.values()))}"
    return int(min(timings, key=lambda size: timings[size].wall_s[0])), ""


def _pixels(job: Job, maps: Any, size: tuple[int, int]) -> NDArray[np.float32]:
    """Maps of any granularity as pixel maps (B,1,H,W)."""
    pixels = [pixel_map(map_hw, (size[0], size[1]), job.map_options) for map_hw in maps]
    return np.stack(pixels)[:, None].astype(np.float32)
