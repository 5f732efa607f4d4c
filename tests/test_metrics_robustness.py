"""Sensitivity and stability against stock Quantus 0.6 with the identical noise, and the numbers captured from it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.metrics_oracle import Bench, key_of, near, replayed, status_of
from tests.test_metrics_captured import golden_view, study_map, x_ray_model
from tests.toy import Watch, toy_config
from xaibatch.maps import MapOptions, pixel_map
from xaibatch.metrics import METRICS
from xaibatch.metrics.base import VariantView
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate
from xaibatch.types import ALL_ZERO_MAP, CHANGED_PREDICTION, NAN_MAP, ZERO_DENOMINATOR


def noise_of(metric: Any, bench: Bench, rows: tuple[int, ...]) -> list[np.ndarray]:
    """What Quantus draws in one call per sample: the noise of all images of the batch."""
    asks = [metric.variants(bench.image_view(row)) for row in rows]
    return [
        np.stack([ask[sample].plan.noise_CHW(sample, bench.x.shape[1:]) for ask in asks])
        for sample in range(len(asks[0]))
    ]


CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "avg": ("avg_sensitivity", {"radius": 0.3}, "AvgSensitivity", {"lower_bound": 0.3}),
    "avg abs": ("avg_sensitivity", {"radius": 0.3, "abs": True}, "AvgSensitivity", {"lower_bound": 0.3, "abs": True}),
    "max": ("max_sensitivity", {"radius": 0.1}, "MaxSensitivity", {"lower_bound": 0.1}),
    "lipschitz": (
        "local_lipschitz_estimate", {"std": 0.2, "normalise": False},
        "LocalLipschitzEstimate", {"perturb_std": 0.2, "normalise": False},
    ),
    "ris": (
        "relative_input_stability", {"null_on_changed_prediction": False},
        "RelativeInputStability", {"return_nan_when_prediction_changes": False},
    ),
    "ros": (
        "relative_output_stability", {"null_on_changed_prediction": False},
        "RelativeOutputStability", {"return_nan_when_prediction_changes": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("rows", [(0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize("case", sorted(CASES))
def test_robustness_metrics_equal_quantus(case: str, rows: tuple[int, ...]) -> None:
    name, options, theirs_name, theirs_options = CASES[case]
    bench = Bench().explained()
    metric = METRICS[name](num_samples=5, target="original", **options)
    function = "normal" if case == "lipschitz" else "uniform"
    with replayed(function, noise_of(metric, bench, rows)):
        theirs = bench.quantus(theirs_name, rows, nr_samples=5, **theirs_options)
    near([bench.native(metric, row) for row in rows], theirs)


@pytest.mark.parametrize("case", ["lipschitz", "max"])
def test_normalisation_is_per_image_where_quantus_divides_by_the_largest_of_the_call(case: str) -> None:
    name, options, theirs_name, theirs_options = CASES[case]
    bench = Bench().explained()
    metric = METRICS[name](num_samples=4, target="original", **{**options, "normalise": True})
    function = "normal" if case == "lipschitz" else "uniform"

    def theirs(rows: tuple[int, ...]) -> list[float]:
        with replayed(function, noise_of(metric, bench, rows)):
            scores = bench.quantus(theirs_name, rows, nr_samples=4, **{**theirs_options, "normalise": True})
        return [float(score) for score in scores]

    alone = [theirs((row,))[0] for row in range(3)]
    near(bench.natives(metric), alone)
    assert np.abs(np.array(theirs((0, 1, 2))) / alone - 1).max() > 0.05


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_changed_prediction_is_null_exactly_where_quantus_returns_nan(case: str) -> None:
    name, options, theirs_name, theirs_options = CASES[case]
    bench = Bench(num=6).explained()
    strong = (
        {"radius": 0.9} if "radius" in options else {"std": 0.9} if case == "lipschitz" else {"low": -0.9, "high": 0.9}
    )
    metric = METRICS[name](
        **{**options, **strong, "num_samples": 3, "target": "original", "null_on_changed_prediction": True}
    )
    theirs_strong: dict[str, Any] = {
        "avg": {"lower_bound": 0.9}, "avg abs": {"lower_bound": 0.9}, "max": {"lower_bound": 0.9},
        "lipschitz": {"perturb_std": 0.9},
    }.get(case, {"perturb_func_kwargs": {"lower_bound": -0.9, "upper_bound": 0.9}})  # fmt: skip
    function = "normal" if case == "lipschitz" else "uniform"
    rows = tuple(range(6))
    with replayed(function, noise_of(metric, bench, rows)):
        theirs = bench.quantus(
            theirs_name, rows, nr_samples=3,
            **{**theirs_options, **theirs_strong, "return_nan_when_prediction_changes": True},
        )  # fmt: skip
    assert 0 < np.isnan(theirs).sum() < 6
    for row, value in enumerate(theirs):
        if np.isnan(value):
            assert status_of(lambda row=row: bench.native(metric, row)) == CHANGED_PREDICTION
        else:
            near(bench.native(metric, row), value)


# -- captured numbers: the study's rollout on the small model


def rollout_of(model: Any, side: int, grid: int) -> Callable[[np.ndarray], np.ndarray]:
    """The study's map of attention rollout (heads' mean): min-max on the token grid, then bilinear."""
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))

    def explain(x_BCHW: np.ndarray) -> np.ndarray:
        seen.clear()
        with torch.no_grad():
            model(torch.as_tensor(x_BCHW))
        product = torch.eye(grid**2 + 1)
        for attention in seen:
            product = (attention.mean(1) + torch.eye(grid**2 + 1)) / 2 @ product
        grids = product[:, 0, 1:].reshape(-1, grid, grid).numpy()
        low, high = grids.min((1, 2), keepdims=True), grids.max((1, 2), keepdims=True)
        return np.stack([pixel_map(one, (side, side), MapOptions()) for one in (grids - low) / (high - low)])

    return explain


@pytest.fixture(scope="module")
def rollout(golden_small: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The study's rollout on the small model."""
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=3, qkv_bias=True
    ).eval()
    model.load_state_dict(load_file(golden_small / "small_vit.safetensors"))
    return rollout_of(model, 64, 8)


def noisy_maps(x: np.ndarray, explain: Callable[[np.ndarray], np.ndarray], batch: int, keep_first: bool) -> np.ndarray:
    """Maps of the copies that Quantus made after np.random.seed(0), (3,B,H,W)."""
    stream, maps = np.random.RandomState(0), np.empty((3, len(x), *x.shape[2:]))
    for first in range(0, len(x), batch):
        part = slice(first, first + batch)
        for sample in range(3):
            noise = stream.uniform(-0.33, 0.33, x[part].shape)
            if keep_first:
                noise[:, 0, 0, 0] = 0
            maps[sample, part] = explain((x[part] + noise).astype(np.float32))
    return maps


def captured_case(
    golden_small: Any, row: int, maps: np.ndarray, kind: str = "attn_mean"
) -> tuple[Any, tuple[VariantView, ...]]:
    inputs = np.load(golden_small / "small_lrp.npz")
    view = golden_view(inputs["x"][row], inputs["logits_timm_b1"][row], 0, study_map(golden_small, "small", kind)[row])
    return view, tuple(VariantView(map_hw=m[row], pixels_HW=m[row], logits_K=view.logits_K, target=0) for m in maps)


@pytest.mark.parametrize("batch", [1, 6])
def test_sensitivities_equal_the_captured_numbers(golden_small: Any, rollout: Any, batch: int) -> None:
    golden = np.load(golden_small / "small_quantus.npz")
    maps = noisy_maps(np.load(golden_small / "small_lrp.npz")["x"], rollout, batch, keep_first=False)
    for row in range(6):
        view, answers = captured_case(golden_small, row, maps)
        near(METRICS["avg_sensitivity"]().score(view, answers), golden[f"AvgSens_attn_mean_bs{batch}"][row], 1e-5)
        near(METRICS["max_sensitivity"]().score(view, answers), golden[f"MaxSens_attn_mean_bs{batch}"][row], 1e-5)


def test_sensitivities_equal_the_captured_numbers_on_x_rays(shared: Any) -> None:
    golden, inputs = (np.load(shared / "golden" / f"tiny_{what}.npz") for what in ("quantus", "lrp"))
    x, originals = inputs["x"], study_map(shared / "golden", "tiny", "attn_mean")
    maps = noisy_maps(x, rollout_of(x_ray_model(shared), 224, 14), 12, keep_first=False)
    for row in range(12):
        view = golden_view(x[row], inputs["logits_timm_b1"][row], 0, originals[row])
        answers = tuple(VariantView(map_hw=m[row], pixels_HW=m[row], logits_K=view.logits_K, target=0) for m in maps)
        near(METRICS["avg_sensitivity"]().score(view, answers), golden["AvgSens_attn_mean_bs12"][row], 1e-5)
        near(METRICS["max_sensitivity"]().score(view, answers), golden["MaxSens_attn_mean_bs12"][row], 1e-5)


def test_the_study_form_of_sensitivity_equals_the_study_own_quantus(golden_small: Any, rollout: Any) -> None:
    """Over the norm of the image. The study's release also leaves the first channel entry of every copy as it was."""
    fork = np.load(golden_small / "small_quantus_authors_fork.npz")["fork_AvgSens_attn_mean_bsB"]
    maps = noisy_maps(np.load(golden_small / "small_lrp.npz")["x"], rollout, 6, keep_first=True)
    metric = METRICS["avg_sensitivity"](semantics="paper-2023", num_samples=3, radius=0.33)
    assert metric.needs == {"image"}
    assert METRICS["avg_sensitivity"]().needs == frozenset()
    for row in range(6):
        view, answers = captured_case(golden_small, row, maps)
        near(metric.score(view, answers), fork[row], 1e-6)


def test_sensitivities_of_transformer_lrp_equal_the_captured_numbers(golden_small: Any) -> None:
    """Each copy's map explains the class predicted for that copy, as the study had it (`target="as_configured"`). The
    reference's relevance has float32 noise of up to 1.5e-2 against itself in float64, hence the tolerance."""
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    from xaibatch.explainers.base import ExplainInput
    from xaibatch.explainers.resolve import resolve_explainer

    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=3, qkv_bias=True
    ).eval()
    model.load_state_dict(load_file(golden_small / "small_vit.safetensors"))
    golden, x = np.load(golden_small / "small_quantus.npz"), np.load(golden_small / "small_lrp.npz")["x"]
    explainer = resolve_explainer("transformer_lrp")()

    def explain(x_BCHW: np.ndarray) -> np.ndarray:
        targets = model.double()(torch.as_tensor(x_BCHW).double()).argmax(1)
        inputs = ExplainInput(
            model=model, images_BCHW=torch.as_tensor(x_BCHW).double(), targets_B=targets,
            keys=(), run_plans=lambda requests: [],
        )  # fmt: skip
        grids = explainer.explain(inputs).maps_Bhw.detach().numpy()
        return np.stack([pixel_map(grid, (64, 64), MapOptions(normalise="min_max")) for grid in grids])

    maps = noisy_maps(x, explain, 6, keep_first=False)
    for row in range(6):
        view, answers = captured_case(golden_small, row, maps, "lrp")
        near(METRICS["avg_sensitivity"]().score(view, answers), golden["AvgSens_lrp_bs6"][row], 2e-2)
        near(METRICS["max_sensitivity"]().score(view, answers), golden["MaxSens_lrp_bs6"][row], 2e-2)


# -- sharing and draws


def test_average_and_max_sensitivity_ask_for_the_same_copies() -> None:
    bench = Bench()
    average, largest = METRICS["avg_sensitivity"](), METRICS["max_sensitivity"](abs=True)
    assert average.cell_key() == largest.cell_key()
    assert average.variants(bench.image_view(0)) == largest.variants(bench.image_view(0))
    assert METRICS["relative_input_stability"]().cell_key() == METRICS["relative_output_stability"]().cell_key()
    symmetric = METRICS["relative_input_stability"](low=-0.2)
    assert symmetric.cell_key() == average.cell_key()
    assert symmetric.variants(bench.image_view(0)) == average.variants(bench.image_view(0))
    for other in ({"radius": 0.3}, {"num_samples": 3}, {"draws": "paired"}, {"target": "original"}):
        assert METRICS["avg_sensitivity"](**other).cell_key() != average.cell_key()


def test_the_noise_of_a_copy_hangs_on_image_and_repeat_only() -> None:
    bench = Bench()
    three = METRICS["avg_sensitivity"](num_samples=3).variants(bench.image_view(0))
    five = METRICS["avg_sensitivity"](num_samples=5).variants(bench.image_view(0))
    other = METRICS["avg_sensitivity"](num_samples=3).variants(bench.image_view(1))
    again = METRICS["avg_sensitivity"](num_samples=3).variants(replace(bench.image_view(0), key=key_of(0, repeat=1)))
    noise = [asks[2].plan.noise_CHW(2, (3, 8, 8)) for asks in (three, five, other, again)]
    np.testing.assert_array_equal(noise[0], noise[1])
    assert (noise[0] != noise[2]).all()
    assert (noise[0] != noise[3]).all()
    assert np.abs(noise[0]).max() < 0.2


@pytest.mark.parametrize("explainer", ["random", "lime"])
def test_a_random_explainer_is_as_sensitive_as_its_draws(images: Path, tmp_path: Path, explainer: str) -> None:
    """A whole run of 12 images and two repeats (DESIGN rule 8). With fresh draws two independent uniform maps differ by
    about E||a-b||/||a|| = sqrt((1/6)/(1/3)) = 0.707; with the same draws for the copy the map does not move at all.
    LIME's follows its samples as far, though noise of a thousandth hardly moves the image."""
    asked = {"use": "avg_sensitivity", "num_samples": 3, "radius": 1e-3, "target": "original"}
    options = {"num_samples": 24, "segmentation": "grid"} if explainer == "lime" else {}
    config = toy_config(
        images, tmp_path / "run", explainers={explainer: options}, repeats=2, maps__upsampling="nearest",
        metrics={draws: {**asked, "draws": draws} for draws in ("fresh", "paired")},
    )  # fmt: skip
    outcome = evaluate(config, run_local, Watch())
    assert outcome.ok
    scores = outcome.folder.read("scores").to_pandas()
    table = scores.pivot_table("score", ["image_id", "repeat"], "metric", observed=True)
    assert len(table) == 24
    if explainer == "random":
        assert (table["paired"] == 0).all()
        assert abs(table["fresh"].mean() - 0.707) < 0.06
    else:
        assert (table["paired"] > 0).all()
        assert (table["paired"] < table["fresh"] / 10).all()


# -- undefined scores


ROBUSTNESS = [name for name in METRICS if METRICS[name].family == "robustness"]


@pytest.mark.parametrize("name", ROBUSTNESS)
def test_a_map_that_cannot_be_read_is_null_and_a_copy_is_named(name: str) -> None:
    bench = Bench(num=1).explained()
    metric = METRICS[name](num_samples=2, null_on_changed_prediction=False)
    answers = tuple(bench.answer(0, ask) for ask in metric.variants(bench.image_view(0)))
    broken = (answers[0], replace(answers[1], pixels_HW=np.zeros((32, 32))))
    assert status_of(lambda: metric.score(bench.view(0), broken)) == ALL_ZERO_MAP
    with pytest.raises(Exception, match="noisy copy 1"):
        metric.score(bench.view(0), broken)
    bench.maps = np.full((1, 32, 32), np.nan)
    assert status_of(lambda: metric.score(bench.view(0), answers)) == NAN_MAP


def test_a_black_image_has_no_norm_to_divide_by() -> None:
    bench = Bench(num=1)
    bench.x = np.zeros_like(bench.x)
    metric = METRICS["avg_sensitivity"](semantics="paper-2023", num_samples=1)
    assert status_of(lambda: bench.native(metric, 0)) == ZERO_DENOMINATOR
