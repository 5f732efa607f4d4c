"""Native metrics against the numbers captured from Quantus 0.6 and from the study's own, older Quantus.

The draws are made again from `np.random.seed(0)`, as they were when the numbers were captured.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.metrics_oracle import near
from xaibatch.metrics import METRICS
from xaibatch.perturb.plans import SubsetPlan


@cache
def replay_of(num_images: int, num_entries: int, batch: int, extra: int, runs: int = 100) -> np.ndarray:
    """Quantus's draws after np.random.seed(0): a subset per image, then one uniform number per image (0.6) or channel
    (the study's older release) that only its unused `uniform` baseline takes. (B,100,224)"""
    stream = np.random.RandomState(0)
    drawn = np.empty((num_images, runs, 224), np.int32)
    for first in range(0, num_images, batch):
        for run in range(runs):
            for row in range(first, first + batch):
                drawn[row, run] = stream.choice(num_entries, 224, replace=False)
            stream.uniform(size=extra * batch)
    return drawn


def golden_view(x: np.ndarray, logits: np.ndarray, label: int, map_hw: np.ndarray) -> Any:
    from xaibatch.maps import MapOptions
    from xaibatch.metrics.base import MapView
    from xaibatch.seeding import DrawKey

    return MapView(
        key=DrawKey(seed=0, image_id="golden"), shape_CHW=x.shape, label=label, predicted=int(logits.argmax()),
        logits_K=logits.astype(float), image_CHW=x, explainer="golden", target=label, map_hw=map_hw,
        map_options=MapOptions(),
    )  # fmt: skip


def study_map(folder: Any, name: str, kind: str) -> np.ndarray:
    if kind == "lrp":
        return np.load(folder / f"{name}_lrp.npz")["map_pred_f32"][:, 0]
    which = {"attn_mean": "mean_0", "attn_min": "min_0", "attn_max": "max_0.99"}[kind]
    return np.load(folder / f"{name}_rollout.npz")[f"rollout_{which}"][:, 0]


def check_captured(folder: Any, name: str, kind: str, batch: int) -> None:
    """Sums, deltas and scores that Quantus 0.6 was seen to compute, from its draws."""
    golden, inputs = np.load(folder / f"{name}_quantus.npz"), np.load(folder / f"{name}_lrp.npz")
    x, logits, maps = inputs["x"], inputs["logits_timm_b1"], study_map(folder, name, kind)
    prefix = f"FC_{kind}_bs{batch}"
    draws = replay_of(len(x), x[0].size, batch, extra=1)
    metric = METRICS["faithfulness_correlation"](normalise=False)
    from xaibatch.metrics.faithfulness_correlation import hidden_relevance

    for row in range(len(x)):
        label = int(golden["y"][row])
        view = golden_view(x[row], logits[row], label, maps[row])
        plan = SubsetPlan(index_SK=draws[row], entries="channel", baseline="black")
        sums = hidden_relevance(view.pixels_HW, plan)
        near(sums, golden[f"{prefix}_att_sums"][row], 1e-5)
        copies = np.repeat(view.logits_K[None], 100, 0)
        copies[:, label] -= golden[f"{prefix}_pred_deltas"][row]
        near(metric.score(view, plan, copies), golden[prefix][row], 1e-5)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("kind", ["lrp", "attn_mean", "attn_min", "attn_max"])
def test_faithfulness_correlation_equals_the_captured_numbers(golden_small: Any, kind: str, batch: int) -> None:
    check_captured(golden_small, "small", kind, batch)


@pytest.mark.parametrize(("kind", "batch"), [("lrp", 1), ("attn_mean", 1), ("attn_min", 12), ("attn_max", 12)])
def test_faithfulness_correlation_equals_the_captured_numbers_on_x_rays(shared: Any, kind: str, batch: int) -> None:
    check_captured(shared / "golden", "tiny", kind, batch)


@pytest.fixture(scope="module")
def small_model(golden_small: Any) -> Any:
    import torch
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=3, qkv_bias=True
    ).eval()
    model.load_state_dict(load_file(golden_small / "small_vit.safetensors"))
    torch.set_num_threads(1)
    return model


def x_ray_model(shared: Any) -> Any:
    """The vit_tiny that the captured numbers on X-rays belong to."""
    import timm
    from safetensors.torch import load_file

    weights = load_file(shared / "models" / "vit_tiny_cxr3.safetensors")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model


@pytest.mark.parametrize("kind", ["lrp", "attn_mean"])
def test_the_study_form_equals_the_study_own_quantus(golden_small: Any, small_model: Any, kind: str) -> None:
    import torch

    from xaibatch.perturb.runner import PlanRunner

    inputs = np.load(golden_small / "small_lrp.npz")
    fork = np.load(golden_small / "small_quantus_authors_fork.npz")[f"fork_FC_{kind}"]
    labels = np.load(golden_small / "small_quantus.npz")["y"]
    maps, draws = study_map(golden_small, "small", kind), replay_of(6, 64 * 64, 1, extra=3)
    metric = METRICS["faithfulness_correlation"](semantics="paper-2023", normalise=False)
    runner = PlanRunner(model=small_model, batch_size=100)
    for row in range(6):
        view = golden_view(inputs["x"][row], inputs["logits_timm_b1"][row], int(labels[row]), maps[row])
        drawn = metric.plan(view)
        assert isinstance(drawn, SubsetPlan)
        assert (drawn.entries, drawn.index_SK.shape) == ("pixel", (100, 224))
        plan = SubsetPlan(index_SK=draws[row], entries=drawn.entries, baseline=drawn.baseline)
        (logits_SK,) = runner.run(torch.as_tensor(inputs["x"]), [(row, plan)])
        near(metric.score(view, plan, logits_SK.astype(float)), fork[row], 1e-5)


def test_the_captured_deltas_are_what_the_plan_runs_to(golden_small: Any, small_model: Any) -> None:
    import torch

    from xaibatch.perturb.runner import PlanRunner

    inputs, golden = np.load(golden_small / "small_lrp.npz"), np.load(golden_small / "small_quantus.npz")
    draws = replay_of(6, inputs["x"][0].size, 1, extra=1)
    plans = [(row, SubsetPlan(index_SK=draws[row], entries="channel", baseline="black")) for row in range(6)]
    logits = PlanRunner(model=small_model, batch_size=64).run(torch.as_tensor(inputs["x"]), plans)
    for row in range(6):
        label = int(golden["y"][row])
        deltas = inputs["logits_timm_b1"][row, label] - logits[row][:, label]
        np.testing.assert_allclose(deltas, golden["FC_lrp_bs1_pred_deltas"][row], atol=3e-6)


def check_captured_curves(folder: Any, name: str, kind: str, model: Any, rows: range) -> None:
    """Where a step ends between unequal values; elsewhere the captured order of the tied entries is lost."""
    import torch

    from xaibatch.perturb.runner import PlanRunner

    inputs, golden = np.load(folder / f"{name}_lrp.npz"), np.load(folder / f"{name}_quantus.npz")
    maps, captured = study_map(folder, name, kind), golden[f"PF_{kind}_bs1"]
    metric = METRICS["pixel_flipping"](features_in_step=inputs["x"][0].size // captured.shape[1])
    runner = PlanRunner(model=model, batch_size=48)
    for row in rows:
        view = golden_view(inputs["x"][row], inputs["logits_timm_b1"][row], int(golden["y"][row]), maps[row])
        plan = metric.plan(view)
        (logits_SK,) = runner.run(torch.as_tensor(inputs["x"]), [(row, plan)])
        ordered = np.tile(maps[row].ravel(), 3)[plan.order_N]
        clean = np.append(ordered[plan.counts_S[:-1] - 1] != ordered[plan.counts_S[:-1]], True)
        curve = metric.curve(view, logits_SK)
        assert clean.sum() >= 8
        np.testing.assert_allclose(curve[clean], captured[row][clean], atol=5e-6)
        np.testing.assert_allclose(curve, captured[row], atol=0.1)


@pytest.mark.parametrize("kind", ["lrp", "attn_mean"])
def test_pixel_flipping_equals_the_captured_curves(golden_small: Any, small_model: Any, kind: str) -> None:
    check_captured_curves(golden_small, "small", kind, small_model, range(6))


def test_pixel_flipping_equals_the_captured_curves_on_x_rays(shared: Any) -> None:
    check_captured_curves(shared / "golden", "tiny", "lrp", x_ray_model(shared), range(1))
