"""Every part of the package puts tokens on the same pixels: patches that are not square, sizes that leave a rest,
models that shrink their features, images of one channel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import xaibatch
from tests.toy import MODEL, Watch, toy_config, toy_images
from xaibatch.errors import ConfigError
from xaibatch.maps import MapOptions, PlacedMapOptions, TokenGrid, on_pixels, on_tokens, pixel_map
from xaibatch.models.token_grid import token_grid_of
from xaibatch.perturb.segmentation import segment
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate

OPTIONS: dict[str, dict[str, Any]] = {
    "transformer_lrp": {},
    "attn_lrp": {"level": "pixel"},
    "input_gradient": {"level": "pixel"},
    "attention_rollout": {},
    "lime": {"num_samples": 20, "segmentation": "grid"},
    "kernel_shap": {"num_samples": 20, "segmentation": "slic"},
    "rise": {"num_masks": 20},
    "occlusion": {"window": 16, "stride": 8},
    "occlusion_patch": {},
    "random": {},
}
"""Explainers of every native granularity."""


def vit(img_size: int | tuple[int, int], patch_size: int | tuple[int, int], **options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3}
    return VisionTransformer(img_size=img_size, patch_size=patch_size, **sizes, **options).eval()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("size", "patch", "grid"),
    [((32, 48), (8, 16), (4, 3)), ((70, 70), 16, (4, 4)), ((30, 24), (8, 4), (3, 6)), ((64, 48), 8, (8, 6))],
)
def test_maps_come_on_the_models_own_grid(name: str, size: tuple[int, int], patch: Any, grid: tuple[int, int]) -> None:
    model, images = vit(size, patch), torch.randn(2, 3, *size)
    maps = xaibatch.explain(model, images, name, **OPTIONS[name])
    assert maps.shape == (2, *grid)
    assert maps.isfinite().all()


class OneToken(torch.nn.Module):
    """Answers with the mean of one patch of a ViT's grid: only that token may get anything."""

    def __init__(self, model: VisionTransformer, row: int, column: int) -> None:
        super().__init__()
        self.patch_embed, (height, width) = model.patch_embed, model.patch_embed.patch_size
        self.rows = slice(row * height, (row + 1) * height)
        self.columns = slice(column * width, (column + 1) * width)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        score = images_BCHW[:, :, self.rows, self.columns].mean((1, 2, 3))
        return torch.stack([score, -score], 1)


@pytest.mark.parametrize("name", ["lime", "kernel_shap", "occlusion", "occlusion_patch"])
@pytest.mark.parametrize(("size", "patch"), [((32, 48), (8, 16)), ((70, 70), 16)])
def test_what_one_token_decides_is_found_at_that_token(name: str, size: tuple[int, int], patch: Any) -> None:
    options = {
        **OPTIONS[name],
        **({"segmentation": "grid", "num_samples": 60} if "segment" in str(OPTIONS[name]) else {}),
    }
    options |= {"window": 8, "stride": 8} if name == "occlusion" else {}
    model, images = OneToken(vit(size, patch), 2, 1), 1 + torch.rand(1, 3, *size)
    options |= {"hide": 0.0} if name == "lime" else {"baseline": 0.0}
    (found,) = xaibatch.explain(model, images, name, 0, **options)
    assert divmod(int(found.argmax()), found.shape[1]) == (2, 1)
    others = found.clone()
    others[2, 1] = 0
    assert found[2, 1] > (1.5 if name == "occlusion" else 3) * others.abs().max()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vit_tiny_patch16_224", {}, TokenGrid(14, 14, 16, 16)),
        ("deit_tiny_distilled_patch16_224", {}, TokenGrid(14, 14, 16, 16)),
        ("vit_tiny_patch16_224", {"img_size": (230, 224)}, TokenGrid(14, 14, 16, 16)),
        ("vit_tiny_patch16_224", {"dynamic_img_pad": True, "dynamic_img_size": True}, TokenGrid(15, 14, 16, 16)),
        ("vit_small_r26_s32_224", {}, TokenGrid(7, 7, 32, 32)),
        ("xcit_nano_12_p16_224", {}, TokenGrid(14, 14, 16, 16)),
        ("mixer_s32_224", {}, TokenGrid(7, 7, 32, 32)),
        ("swin_tiny_patch4_window7_224", {}, TokenGrid(15, 14, 16, 16)),
        ("resnet18", {}, TokenGrid(15, 14, 16, 16)),
    ],
)  # fmt: skip
def test_grids_of_timm_models(name: str, options: dict[str, Any], expected: TokenGrid) -> None:
    """At 230x224 pixels where the last row is a rest: dropped, padded, or covered by squares that are cut."""
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    assert token_grid_of(model, (230, 224)) == expected


def test_a_hybrid_whose_stem_pads_has_a_token_for_every_pixel_that_it_sees() -> None:
    model = timm.create_model("vit_small_r26_s32_224", img_size=80).eval()
    images = torch.rand(1, 3, 80, 80, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    assert gradient[..., -1, :].abs().sum() > 0  # 80 pixels are three tokens of 26 and a rest, which it sees
    grid = token_grid_of(model, (80, 80))
    assert grid == TokenGrid(3, 3, 27, 27)
    assert min(grid.covered) >= 80


def test_every_explainer_sees_the_same_grid_in_a_swin_transformer() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, depths=(1, 1, 1, 1)).eval()
    images = torch.randn(1, 3, 224, 224)
    for name, options in (
        ("random", {}),
        ("rise", {"num_masks": 2}),
        ("lime", {"num_samples": 4, "segmentation": "grid"}),
    ):
        assert xaibatch.explain(model, images, name, 0, **options).shape == (1, 14, 14)


def test_token_maps_are_laid_on_the_pixels_that_tokens_cover() -> None:
    """70 pixels, patches of 16: four tokens cover 64, the model never sees the last 6."""
    grid = TokenGrid(4, 4, 16, 16)
    token_map = np.arange(1.0, 17).reshape(4, 4)
    placed = pixel_map(token_map, (70, 70), PlacedMapOptions(upsampling="nearest", grid=grid))
    np.testing.assert_array_equal(placed[:64, :64], np.kron(token_map, np.ones((16, 16))))
    assert not placed[64:].any()
    assert not placed[:, 64:].any()
    np.testing.assert_array_equal(on_tokens(placed, grid), token_map)
    bilinear = on_pixels(token_map, (70, 70), PlacedMapOptions(grid=grid))
    np.testing.assert_array_equal(bilinear[:64, :64], pixel_map(token_map, (64, 64), MapOptions()))


def test_tokens_that_reach_beyond_the_image() -> None:
    grid = TokenGrid(2, 2, 16, 16)
    token_map = np.array([[1.0, 2.0], [3.0, 4.0]])
    placed = on_pixels(token_map, (20, 32), PlacedMapOptions(upsampling="nearest", grid=grid))
    assert placed.shape == (20, 32)
    assert placed[15, 15] == 1
    assert placed[16, 16] == 4
    np.testing.assert_array_equal(on_tokens(placed, grid), token_map)


def test_maps_of_another_shape_span_the_image() -> None:
    options = PlacedMapOptions(upsampling="nearest", grid=TokenGrid(4, 4, 16, 16))
    assert on_pixels(np.ones((7, 7)), (70, 70), options).all()


@pytest.mark.parametrize("algorithm", ["quickshift", "slic", "felzenszwalb", "grid"])
def test_superpixels_of_a_grey_image_are_those_of_its_three_equal_channels(algorithm: str) -> None:
    image_1HW = np.kron(np.random.default_rng(0).normal(size=(1, 4, 4)), np.ones((1, 8, 8))).astype(np.float32)
    segments = segment(image_1HW, algorithm)
    np.testing.assert_array_equal(segments, segment(np.repeat(image_1HW, 3, 0), algorithm))
    assert segments.max() > 0


def test_quickshift_refuses_other_channels_by_number() -> None:
    with pytest.raises(ConfigError, match=r"quickshift.*1 or 3 channels, received 4: use slic"):
        segment(np.zeros((4, 24, 24), np.float32), "quickshift")


def test_a_model_of_one_channel_is_evaluated_end_to_end(tmp_path: Path) -> None:
    config = toy_config(
        toy_images(tmp_path / "data", 1),
        tmp_path / "run",
        model__options={**MODEL["model.options"], "in_chans": 1},
        explainers={"transformer_lrp": {}, "lime": {"num_samples": 12}, "kernel_shap": {"num_samples": 12}},
    )
    outcome = evaluate(config, run_local, Watch())
    assert outcome.ok
    scores = outcome.folder.read("scores").to_pandas()
    assert (scores.groupby(["explainer", "metric"], observed=True).size() == 3).all()
    assert set(scores.explainer) == {"transformer_lrp", "lime", "kernel_shap"}


def test_superpixels_that_cannot_be_made_are_refused_before_the_run(tmp_path: Path) -> None:
    config = toy_config(
        toy_images(tmp_path / "data", 1),
        tmp_path / "run",
        explainers={"lime": {"segmentation": "slic", "segmentation_options": {"n_segment": 9}}},
    )
    with pytest.raises(ConfigError, match="'slic' of scikit-image has no option 'n_segment'"):
        evaluate(config, run_local, Watch())


@pytest.mark.parametrize(
    ("size", "patch", "grid"), [((36, 36), [8, 8], (4, 4)), ((32, 32), [8, 16], (4, 2)), ((36, 36), [16, 8], (2, 4))]
)
def test_a_run_stores_and_scores_maps_on_the_models_grid(
    tmp_path: Path, size: tuple[int, int], patch: list[int], grid: tuple[int, int]
) -> None:
    config = toy_config(
        toy_images(tmp_path / "data", 1),
        tmp_path / "run",
        model__options={**MODEL["model.options"], "img_size": size, "patch_size": patch},
        model__preprocessing={"resize_short": min(size), "interpolation": "bilinear"},
        explainers={"transformer_lrp": {}, "lime": {"num_samples": 12, "segmentation": "grid"}, "random": {}},
    )
    outcome = evaluate(config, run_local, Watch())
    assert outcome.ok
    maps = outcome.folder.read("maps").to_pandas()
    assert {(row.rows, row.columns) for row in maps.itertuples()} == {grid}
    assert (outcome.folder.read("scores").to_pandas().status == "ok").all()
