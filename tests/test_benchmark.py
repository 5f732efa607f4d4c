"""The benchmark: stock implementations equal ours, timings alternate, tables hold what was measured, packages may be
missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from xaibatch.api import explain
from xaibatch.benchmark.command import What, run
from xaibatch.benchmark.lines import Line, Part
from xaibatch.benchmark.memory import peak_bytes
from xaibatch.benchmark.metrics import pairs
from xaibatch.benchmark.options import BenchmarkOptions
from xaibatch.benchmark.setting import paper_config, prepare
from xaibatch.benchmark.stock_gradients import LOOPS
from xaibatch.benchmark.stock_relevance import reference_lrp
from xaibatch.benchmark.timing import Spread, Timing, interleaved, ratio

TINY: dict[str, Any] = {
    "model_options": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
    "preprocessing": {"resize_short": 32},
    "images": 2,
    "heavy_images": 1,
    "metric_images": 2,
    "num_samples": 8,
    "num_steps": 4,
    "runs": 1,
    "max_batch": 2,
    "compiled": False,
    "end_to_end_images": 1,
    "driver_cells": 4,
}


def small_vit(folder: Path) -> VisionTransformer:
    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=3)
    model.load_state_dict(load_file(folder / "small_vit.safetensors"))
    return model.double().eval().requires_grad_(False)


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest relative L2 error over images."""
    a, b = ours.double().flatten(1), theirs.double().flatten(1)
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def lines_of(measured: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    (found,) = (record for record in measured["parts"] if record["name"] == part)
    return {line["name"]: line for line in found["lines"]}


# -- the stock side computes the same maps, so that the ratios compare like with like


def test_the_slow_relevance_equals_the_reference_numbers_and_ours(golden_small: Path) -> None:
    golden = np.load(golden_small / "small_lrp.npz")
    model, images = small_vit(golden_small), torch.as_tensor(golden["x"]).double()
    targets = [int(target) for target in golden["pred"]]
    slow = torch.stack([reference_lrp(model, images[b : b + 1], target) for b, target in enumerate(targets)])
    assert worst(slow, torch.as_tensor(golden["transformer_attribution_pred_f64"])) < 1e-12
    assert worst(explain(model, images, "transformer_lrp", targets), slow) < 1e-10


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_every_stock_loop_equals_ours(golden_small: Path, name: str) -> None:
    golden = np.load(golden_small / "small_lrp.npz")
    model, images = small_vit(golden_small).float(), torch.as_tensor(golden["x"][:2])
    targets = [int(target) for target in golden["pred"][:2]]
    loop = torch.stack([LOOPS[name](model, images[b : b + 1], target) for b, target in enumerate(targets)])
    assert worst(loop, explain(model, images, name, targets)) < 2e-5
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(block.attn.fused_attn for block in model.blocks)


def test_quantus_gets_as_many_steps_as_ours(tmp_path: Path) -> None:
    setting = prepare(BenchmarkOptions(images=1, num_steps=49), tmp_path)
    by_name = {pair.ours: pair for pair in pairs(setting)}
    step = by_name["pixel_flipping"].options["features_in_step"]
    assert by_name["pixel_flipping"].quantus_options["features_in_step"] == step
    assert 224 * 224 % step == 0 and 3 * 224 * 224 / step == 48
    assert len(by_name) >= 10


# -- the clockwork


def test_everything_runs_once_a_round_in_turn_and_failures_are_named() -> None:
    calls: list[str] = []

    def failing() -> None:
        raise ValueError("no such layer\nmore")

    work = {"ours": lambda: calls.append("ours"), "broken": failing, "stock": lambda: calls.append("stock")}
    timings, errors = interleaved(work, runs=3, device="cpu")
    assert calls == ["ours", "stock"] * 4  # a warm-up round first
    assert errors == {"broken": "ValueError: no such layer"}
    assert {name: len(timing.wall_s) for name, timing in timings.items()} == {"ours": 3, "stock": 3}


def test_ratios_are_taken_within_rounds() -> None:
    slow = Timing(wall_s=(4.0, 40.0, 6.0), cpu_s=(2.0, 2.0, 2.0))
    fast = Timing(wall_s=(2.0, 10.0, 3.0), cpu_s=(1.0, 1.0, 1.0))
    assert ratio(slow, fast) == Spread(median=2.0, low=2.0, high=4.0)
    assert ratio(slow, fast, "cpu", scale=0.5) == Spread(median=1.0, low=1.0, high=1.0)
    assert slow.per(2) == Spread(median=3.0, low=2.0, high=20.0)


def test_peak_memory_sees_what_was_held_and_given_back() -> None:
    def hold() -> None:
        torch.ones(16, 2**20).sum()

    hold()
    peak = peak_bytes(hold, "cpu")
    if peak is None:
        pytest.skip("this system cannot reset the high-water mark of a process")
    assert 60 < peak / 2**20 < 80


def test_a_table_is_markdown_and_its_record_is_json() -> None:
    line = Line(name="lime", cells={"images/s": Spread(median=2.0, low=1.0, high=3.0), "batch": 8}, remark="r")
    part = Part(name="x", title="t", lines=[line, Line(name="rise", remark="captum not installed")], notes=["n"])
    rows = [row.split("|")[1:-1] for row in part.table().splitlines() if row.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert [cell.strip() for cell in rows[2]] == ["lime", "2.00 (1.00–3.00)", "8", "r"]
    assert json.loads(json.dumps(part.record()))["lines"][0]["images/s"]["high"] == 3.0


# -- each part, tiny


def test_floor_measures_every_precision_and_says_what_it_skips(capsys: pytest.CaptureFixture[str]) -> None:
    measured = run(What.floor, BenchmarkOptions(**TINY), command="benchmark floor")
    lines = lines_of(measured, "floor")
    assert lines["float32, eager"]["images/s"]["median"] > 0
    assert lines["bfloat16, eager"]["batch"] in (1, 2)
    assert "skipped" in lines["float32, compiled"]["remark"]
    assert "| float32, eager" in capsys.readouterr().out
    assert json.dumps(measured["machine"]["versions"])


def test_explainers_are_held_against_stock_and_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    options = BenchmarkOptions(**TINY, only=("transformer_lrp", "lime", "occlusion"))
    measured = run(What.explainers, options, command="benchmark explainers", profile=True)
    lines = lines_of(measured, "explainers")
    for name in ("transformer_lrp", "lime", "lime, superpixels given", "occlusion"):
        assert lines[name]["stock / ours, wall"]["median"] > 0, lines[name]
        assert lines[name]["forward equivalents"]["median"] > 0
    together = lines_of(measured, "one_trace")["7 explainers of one trace together"]
    assert together["over TransformerLRP alone"]["median"] > 0 and together["peak MiB"] > 0
    assert "where the time goes: transformer_lrp" in capsys.readouterr().out


def test_metrics_are_held_against_quantus() -> None:
    only = (
        "faithfulness_correlation",
        "pixel_flipping",
        "region_perturbation",
        "avg_sensitivity",
        "complexity",
        "irof",
    )
    measured = run(What.metrics, BenchmarkOptions(**TINY, only=only), command="benchmark metrics")
    lines = lines_of(measured, "metrics")
    assert set(lines) == {*only, "avg_sensitivity, one trace"}
    for name in set(lines) - {"irof"}:
        assert lines[name]["stock / ours, 4 expl."]["median"] > 0, lines[name]
    assert "itself fails" in lines["irof"]["remark"]  # Quantus 0.6 on images with three channels


def test_sampling_errors_fall_with_the_number_of_samples() -> None:
    model = {**TINY["model_options"], "img_size": 96, "patch_size": 16}  # large enough for several superpixels
    changes = {"model_options": model, "preprocessing": {"resize_short": 96}, "num_samples": 150, "runs": 3}
    options = BenchmarkOptions(**{**TINY, **changes})
    lines = lines_of(run(What.sampling, options, command="benchmark sampling"), "sampling")
    assert list(lines) == [f"{size} samples" for size in (50, 100, 200, 300)]
    for kind in ("independent", "antithetic"):
        errors = [line[f"error, {kind}"]["median"] for line in lines.values()]
        assert errors[0] > errors[-1] > 0
        assert lines["300 samples"][f"agreement, {kind}"] > lines["50 samples"][f"agreement, {kind}"]


@pytest.mark.slow
def test_protocol_counts_the_required_passes_and_runs_through_ray() -> None:
    options = BenchmarkOptions(**TINY)
    measured = run(What.protocol, options, command="benchmark protocol")
    lines = lines_of(measured, "protocol")
    noisy, runs = 3, 100
    explained = 1 + 1 + options.num_samples  # prediction, trace, LIME
    assert lines["ours, float32"]["forward passes"] == (1 + noisy) * explained + runs
    assert lines["ours, float32"]["stock / ours, wall"]["median"] > 0
    assert lines["stock pieces"]["forward passes"] > lines["ours, float32"]["forward passes"]
    assert lines_of(measured, "end_to_end")["through Ray"]["working s"]["median"] > 0


def test_it_runs_where_ray_quantus_lime_and_captum_are_missing(tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("ray", "quantus", "lime", "captum"):
    sys.modules[name] = None
import json
from xaibatch.benchmark.command import What, run
from xaibatch.benchmark.options import BenchmarkOptions
tiny = {TINY!r}
parts = []
some = {{What.explainers: ("lime",), What.metrics: ("complexity",), What.protocol: (), What.scaling: ()}}
for what, only in some.items():
    parts += run(what, BenchmarkOptions(**tiny, only=only), command="")["parts"]
open({str(tmp_path / "parts.json")!r}, "w").write(json.dumps(parts))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = {"parts": json.loads((tmp_path / "parts.json").read_text())}
    assert lines_of(measured, "explainers")["lime"]["remark"] == "stock: lime not installed"
    assert lines_of(measured, "explainers")["lime"]["images/s"]["median"] > 0
    assert lines_of(measured, "metrics")["complexity"]["remark"] == "stock: quantus not installed"
    assert lines_of(measured, "protocol")["stock pieces"]["remark"] == "lime, quantus not installed"
    assert lines_of(measured, "protocol")["ours, float32"]["s an image"]["median"] > 0
    assert lines_of(measured, "end_to_end")["through Ray"]["remark"] == "ray not installed"
    assert lines_of(measured, "scaling")["replicas and driver"]["remark"] == "ray not installed"


def test_the_protocol_is_the_study_configuration(tmp_path: Path) -> None:
    config = paper_config(prepare(BenchmarkOptions(**TINY), tmp_path))
    assert config.explainers["lime"]["num_samples"] == TINY["num_samples"]
    assert sorted(config.metrics) == ["avg_sensitivity", "effective_complexity", "faithfulness_correlation"]
