"""Explainers: images a second, forward passes' worth, peak memory, and the ratio to the stock implementation.

Shape letters: B images, C channels, H W pixels, K classes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xaibatch.benchmark.explainer_bench import COPIES_BATCH, ExplainerBench
from xaibatch.benchmark.explainer_duels import UNMEASURED, Duel, duels_of
from xaibatch.benchmark.lines import Cell, Line, Part, announce, megabytes
from xaibatch.benchmark.machine import installed
from xaibatch.benchmark.memory import peak_bytes
from xaibatch.benchmark.setting import Setting
from xaibatch.benchmark.stock_gradients import attention_hooks
from xaibatch.benchmark.timing import Timing, Work, interleaved, ratio
from xaibatch.explainers.base import EXPLAINERS
from xaibatch.models.trace import record
from xaibatch.perturb.segmentation import segment

SEVEN = (
    "attention_rollout_mean",
    "raw_attention",
    "attention_gradient",
    "gradcam",
    "input_gradient",
    "transformer_lrp",
    "attn_lrp",
)
"""The explainers of one trace that are set against TransformerLRP alone."""


def measure_explainers(setting: Setting) -> list[Part]:
    """One line an explainer; then seven of one trace together, and TransformerLRP's memory against autograd's."""
    options = setting.options
    light = ExplainerBench(setting, options.images)
    heavy = ExplainerBench(setting, min(options.heavy_images, options.images))
    lines, profiled = [], {}
    for name in EXPLAINERS:
        if name in UNMEASURED or not _chosen(setting, name):
            continue
        bench = heavy if any(duel.heavy for duel in duels_of(name, light)) else light
        for duel in duels_of(name, bench):
            announce(duel.name)
            lines.append(_line(bench, duel))
            profiled[duel.name] = bench.ours([duel.explainer], duel.given_segments)
    if _chosen(setting, "lime"):
        lines += _segmentation_line(heavy)
    each = Part(
        name="explainers",
        title=f"explainers, {options.model}",
        lines=lines,
        profiled=profiled,
        notes=(
            "forward equivalents: seconds an image over those of one bare forward pass an image, at the same batch "
            f"(sampling explainers: at their {COPIES_BATCH[setting.device]} copies a batch)",
            "ratios: stock over ours, wall time and processor time, within each round; ours explains the images in one "
            "batch, stock one by one",
            "peak memory: above what was held before, in MiB",
        ),
    )
    if not _chosen(setting, "transformer_lrp"):
        return [each]
    title = f"one trace, many explainers, {options.model}"
    return [each, Part(name="one_trace", title=title, lines=_seven_lines(light) + _memory_lines(light))]


def _chosen(setting: Setting, name: str) -> bool:
    return not setting.options.only or name in setting.options.only


def _line(bench: ExplainerBench, duel: Duel) -> Line:
    """Ours, stock and a bare forward pass in alternation."""
    options = bench.setting.options
    forward_batch = bench.copies_batch if duel.heavy else bench.num_images
    work: dict[str, Work] = {
        "forward": bench.forward(forward_batch),
        "ours": bench.ours([duel.explainer], duel.given_segments),
    }
    remark = duel.stock_name
    if duel.stock is not None and not installed(duel.package):
        remark = f"stock: {duel.package} not installed"
    elif duel.stock is not None:
        work["stock"] = bench.stock(duel.stock)
    if duel.given_segments:
        _ = bench.segments
    timings, errors = interleaved(work, runs=options.runs, device=options.device, warm_up=not duel.heavy)
    if "ours" in errors:
        return Line(name=duel.name, remark=f"failed: {errors['ours']}")
    if "stock" in errors:
        remark = f"{remark}: {errors['stock']}"
    cells = _cells(timings, bench.num_images, forward_batch)
    cells["peak MiB"] = megabytes(peak_bytes(work["ours"], options.device))
    if "stock" in timings:
        cells["stock peak MiB"] = megabytes(peak_bytes(work["stock"], options.device))
    return Line(name=duel.name, cells=cells, remark=remark)


def _cells(timings: Mapping[str, Timing], num_images: int, forward_batch: int) -> dict[str, Cell]:
    ours = timings["ours"]
    cells: dict[str, Cell] = {"images": num_images, "images/s": ours.rate(num_images)}
    if "forward" in timings:
        scale = forward_batch / num_images
        cells["forward equivalents"] = ratio(ours, timings["forward"], scale=scale)
        cells["equivalents, CPU time"] = ratio(ours, timings["forward"], "cpu", scale=scale).median
    stock = timings.get("stock")
    cells["stock images/s"] = stock.rate(num_images) if stock else None
    cells["stock / ours, wall"] = ratio(stock, ours) if stock else None
    cells["stock / ours, CPU"] = ratio(stock, ours, "cpu").median if stock else None
    return cells


def _segmentation_line(bench: ExplainerBench) -> list[Line]:
    """What superpixels alone cost, in the same unit."""
    options, pixels = bench.setting.options, bench.images_BCHW.cpu().numpy()
    work: dict[str, Work] = {
        "forward": bench.forward(bench.copies_batch),
        "ours": lambda: [segment(image_CHW, bench.setting.segmentation) for image_CHW in pixels],
    }
    timings, _ = interleaved(work, runs=options.runs, device=options.device)
    name = f"superpixels alone ({bench.setting.segmentation})"
    cells = _cells(timings, bench.num_images, bench.copies_batch)
    return [Line(name=name, cells=cells, remark="on CPUs beside the model in a Ray run")]


def _seven_lines(bench: ExplainerBench) -> list[Line]:
    """Explainers that share one trace, together and TransformerLRP alone."""
    options, num = bench.setting.options, bench.num_images
    names = [name for name in SEVEN if name in EXPLAINERS]
    work: dict[str, Work] = {
        "forward": bench.forward(num),
        "lrp": bench.ours([EXPLAINERS["transformer_lrp"]()]),
        "together": bench.ours([EXPLAINERS[name]() for name in names]),
        "trace": partial(_trace, bench),
    }
    timings, errors = interleaved(work, runs=options.runs, device=options.device)
    title = f"{len(names)} explainers of one trace together"
    if errors:
        return [Line(name=title, remark="; ".join(errors.values()))]
    missing = sorted(set(SEVEN) - set(names))
    together = _cells({"ours": timings["together"], "forward": timings["forward"]}, num, num)
    together["over TransformerLRP alone"] = ratio(timings["together"], timings["lrp"])
    together["over it, CPU time"] = ratio(timings["together"], timings["lrp"], "cpu").median
    together["peak MiB"] = megabytes(peak_bytes(work["together"], options.device))
    return [
        Line(
            name="trace alone (forward and backward)",
            cells=_cells({"ours": timings["trace"], "forward": timings["forward"]}, num, num),
        ),
        Line(name=title, cells=together, remark=f"missing: {', '.join(missing)}" if missing else ", ".join(names)),
    ]


def _trace(bench: ExplainerBench) -> None:
    """The recorded forward and the plain backward that explainers share."""
    inputs = bench.inputs()
    for part in record(inputs.model, inputs.images_BCHW, inputs.targets_B).parts:
        _ = part.attention_gradients


def _memory_lines(bench: ExplainerBench) -> list[Line]:
    """TransformerLRP's peak against autograd's forward and backward that keep every activation of the same batch:
    weights ask for gradients, as in training, so that inputs of linear layers are kept too, and gradients of all
    attention maps are computed."""
    device = bench.setting.device
    lrp = bench.ours([EXPLAINERS["transformer_lrp"]()])
    autograd = partial(_forward_and_backward, bench.setting.model, bench.images_BCHW, bench.targets)
    _, errors = interleaved({"lrp": lrp, "autograd": autograd}, runs=1, device=device, warm_up=False)
    name = "TransformerLRP's memory"
    if errors:
        return [Line(name=name, remark="; ".join(errors.values()))]
    ours, theirs = peak_bytes(lrp, device), peak_bytes(autograd, device)
    cells: dict[str, Cell] = {
        "images": bench.num_images,
        "peak MiB": megabytes(ours),
        "stock peak MiB": megabytes(theirs),
    }
    cells["ours / stock, memory"] = ours / theirs if ours is not None and theirs else None
    return [Line(name=name, cells=cells, remark="autograd forward and backward that keep the same activations")]


def _forward_and_backward(model: Any, images_BCHW: Tensor, targets: Sequence[int]) -> None:
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad(), attention_hooks(model.backbone) as attentions:
            logits_BK = model(images_BCHW)
            torch.autograd.grad(logits_BK[range(len(targets)), targets].sum(), attentions)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
