"""Metrics that hide the model's tokens hide exactly those, also where the patches leave a rest of the image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.toy import MODEL, Watch, toy_config, toy_images
from xaibatch.maps import MapOptions, PlacedMapOptions, TokenGrid
from xaibatch.metrics import METRICS
from xaibatch.metrics.base import MapView, PlanMetric
from xaibatch.metrics.patches import patch_grid, patches_of, token_segments
from xaibatch.models.token_grid import token_grid_of
from xaibatch.perturb.expand import expand
from xaibatch.perturb.plans import SuperpixelPlan
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate
from xaibatch.seeding import DrawKey

SIZE, GRID = (38, 31), TokenGrid(4, 3, 8, 8)
"""Four rows and three columns of 8x8 patches; six rows and seven columns of pixels are left over."""

TOKEN_METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "sensitivity_n": ("sensitivity_n", {"num_runs": 5}),
    "infidelity": ("infidelity", {}),
    "infidelity of the paper": ("infidelity", {"semantics": "yeh-2019"}),
    "region_perturbation": ("region_perturbation", {}),
    "region_perturbation random": ("region_perturbation", {"order": "random"}),
    "selectivity": ("selectivity", {}),
    "faithfulness_correlation": ("faithfulness_correlation", {"entries": "patch", "num_runs": 20}),
}


def a_view(size: tuple[int, int] = SIZE, grid: TokenGrid = GRID, options: MapOptions | None = None) -> MapView:
    draws = np.random.default_rng(3)
    return MapView(
        key=DrawKey(seed=0, image_id="a.png"), shape_CHW=(3, *size), label=0, predicted=0, logits_K=np.zeros(2),
        image_CHW=draws.random((3, *size)), patch_size=grid.side, grid=grid, explainer="any", target=0,
        map_hw=draws.random(grid.shape),
        map_options=options or PlacedMapOptions(grid=grid),
    )  # fmt: skip


def tokens_of_pixels(size: tuple[int, int], grid: TokenGrid) -> np.ndarray:
    """Token of every pixel, -1 for none, as torch cuts the image for a patch embedding."""
    marked = torch.arange(size[0] * size[1], dtype=torch.float64).reshape(1, 1, *size)
    patches = nn.functional.unfold(marked, grid.patch, stride=grid.patch)[0].T.long().numpy()
    tokens = np.full(size[0] * size[1], -1)
    for token, pixels in enumerate(patches):
        tokens[pixels] = token
    return tokens.reshape(size)


@pytest.mark.parametrize("label", TOKEN_METRICS)
@pytest.mark.parametrize("grid", [GRID, TokenGrid(4, 7, 8, 4)])
def test_what_a_copy_hides_are_whole_tokens_and_never_the_rest(label: str, grid: TokenGrid) -> None:
    name, options = TOKEN_METRICS[label]
    metric, view = METRICS[name](**options), a_view(grid=grid)
    assert isinstance(metric, PlanMetric)
    plan = metric.plan(view)
    assert isinstance(plan, SuperpixelPlan)
    assert plan.num_samples == metric.num_forward_passes(1, view.shape_CHW, grid)
    tokens = tokens_of_pixels(SIZE, grid)
    hidden = np.zeros((plan.num_samples, grid.rows * grid.columns), bool)
    image = torch.full((3, *SIZE), 2.0, dtype=torch.float64)
    image[:, 0, 0] = 1.0  # the darkest pixel: what hidden pixels become
    copies = expand(plan, image, 0, plan.num_samples).numpy()
    changed = (copies == 1.0).all(1)
    changed[:, 0, 0] = changed[:, 0, 1]
    assert not changed[:, tokens < 0].any()
    for token in range(hidden.shape[1]):
        pixels = changed[:, tokens == token]
        assert (pixels == pixels[:, :1]).all(), "a token is hidden whole or not at all"
        hidden[:, token] = pixels[:, 0]
    assert hidden.any(0).all(), "every token's turn comes"
    logits = np.random.default_rng(0).random((plan.num_samples, 2))
    assert np.isfinite(metric.score(view, plan, logits))


def test_the_most_relevant_token_goes_first() -> None:
    view = a_view(options=PlacedMapOptions(grid=GRID, upsampling="nearest"))
    plan = METRICS["region_perturbation"](regions_evaluation=1).plan(view)  # type: ignore[attr-defined]
    assert np.flatnonzero(~plan.keep_SM[0]).tolist() == [int(view.map_hw.argmax())]


def test_tokens_of_a_model_of_384_pixels_and_patches_of_14() -> None:
    """27 x 27 tokens and six pixels left over at the right and below; a centred grid has 28 x 28 squares."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=384, patch_size=14, num_classes=3, depth=1)
    grid = token_grid_of(model, (384, 384))
    segments_HW = token_segments((384, 384), grid)
    tokens = tokens_of_pixels((384, 384), grid)
    np.testing.assert_array_equal(segments_HW, np.where(tokens < 0, 27 * 27, tokens))
    assert patch_grid((384, 384), 14).max() + 1 == 28 * 28


def test_an_explicit_size_keeps_the_centred_grid_of_quantus() -> None:
    view = a_view()
    patches = patches_of(view, 8)
    np.testing.assert_array_equal(patches.segments_HW, patch_grid(SIZE, 8))
    assert patches.num == patches.num_segments == 5 * 4
    for name in ("infidelity", "region_perturbation", "selectivity"):
        metric = METRICS[name](patch_size=8)
        assert isinstance(metric, PlanMetric)
        plan = metric.plan(view)
        np.testing.assert_array_equal(plan.segments_HW, patch_grid(SIZE, 8))  # type: ignore[union-attr]
        assert metric.num_forward_passes(1, view.shape_CHW, GRID) == plan.num_samples == 20


def test_patches_that_reach_beyond_the_image_are_tokens_too() -> None:
    """Of a model that pads, or the squares that stand in for tokens."""
    patches = patches_of(a_view(grid=TokenGrid(5, 4, 8, 8)))
    assert patches.num == patches.num_segments == 20


def test_a_runs_estimate_counts_its_models_tokens(tmp_path: Path) -> None:
    """36 pixels, patches of 8: 16 tokens, so 16 copies an image and metric, not 25."""
    config = toy_config(
        toy_images(tmp_path / "data", 1),
        tmp_path / "run",
        model__options={**MODEL["model.options"], "img_size": (36, 36), "patch_size": 8},
        model__preprocessing={"resize_short": 36, "interpolation": "bilinear"},
        explainers={"transformer_lrp": {}},
        metrics={"infidelity": {}, "selectivity": {}},
    )
    watch = Watch()
    outcome = evaluate(config, run_local, watch)
    assert outcome.ok
    assert (outcome.folder.read("scores").to_pandas().status == "ok").all()
    assert watch.expected.by_label["infidelity"] == watch.expected.by_label["selectivity"] == 3 * 16
    assert watch.finish()["num_forward_passes"] == watch.expected.num_forward_passes
