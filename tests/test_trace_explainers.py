"""Rollout, raw attention, attention × gradient, GradCAM, input × gradient, random: golden numbers and slow rewrites."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import xaibatch
from tests.slow_vit import VARIANTS, attentions_and_gradients, images_for, make_vit, reading_row, watched
from tests.test_transformer_lrp import errors, small_vit, targets_of, tiny_vit
from xaibatch.errors import ConfigError
from xaibatch.explainers.base import EXPLAINERS, Attribution, ExplainInput
from xaibatch.maps import MapOptions, pixel_map
from xaibatch.seeding import DrawKey

TRACED = (
    "attention_gradient",
    "attention_rollout",
    "attention_rollout_max",
    "attention_rollout_mean",
    "attention_rollout_min",
    "attn_lrp",
    "attn_lrp_cp",
    "gradcam",
    "input_gradient",
    "raw_attention",
    "transformer_lrp",
)


def inputs_for(model: nn.Module, images: Tensor, targets: Tensor) -> ExplainInput:
    keys = tuple(DrawKey(seed=0, image_id=f"{b}.png") for b in range(len(images)))
    return ExplainInput(model=model, images_BCHW=images, targets_B=targets, keys=keys, run_plans=lambda plans: [])


def maps_of(inputs: ExplainInput, name: str, **options: Any) -> Tensor:
    attribution: Attribution = EXPLAINERS[name](**options).explain(inputs)
    return attribution.maps_Bhw


def golden_inputs(request: pytest.FixtureRequest, name: str, target: str) -> tuple[ExplainInput, dict[str, Path]]:
    if name == "small":
        folder: Path = request.getfixturevalue("golden_small")
        model: Any = small_vit(folder)
    else:
        shared: Path = request.getfixturevalue("shared")
        folder, model = shared / "golden", tiny_vit(shared)
    golden = np.load(folder / f"{name}_lrp.npz")
    count = 6 if name == "small" else 3
    images, targets = torch.as_tensor(golden["x"][:count]).double(), targets_of(golden, target)[:count]
    return inputs_for(model, images, targets), {kind: folder / f"{name}_{kind}.npz" for kind in ("others", "rollout")}


@pytest.mark.parametrize("target", ["pred", "class0"])
@pytest.mark.parametrize("model", ["small", "tiny"])
def test_gradient_explainers_equal_their_references(request: pytest.FixtureRequest, model: str, target: str) -> None:
    inputs, files = golden_inputs(request, model, target)
    golden = np.load(files["others"])
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (f"genattn_{target}_f64", "attention_gradient", {}),
        (f"gradcam_raw_{target}_f64", "gradcam", {"relu": False}),
        ("rawattn_mean_f64", "raw_attention", {}),
        (f"ixg_patch_{target}_f64", "input_gradient", {}),
        (f"ixg_patchabs_{target}_f64", "input_gradient", {"level": "patch_abs"}),
        (f"ixg_pixel_{target}_f64", "input_gradient", {"level": "pixel"}),
    ]
    compared = [case for case in cases if case[0] in golden]
    assert len(compared) >= 3
    for key, name, options in compared:
        maps = maps_of(inputs, name, **options)
        assert errors(maps, golden[key][: len(maps)]).max() < 1e-12, key


def test_gradcam_pixel_map_equals_the_package(request: pytest.FixtureRequest) -> None:
    """Its normalisation twice and its float32 resizing included, hence 1e-5."""
    inputs, files = golden_inputs(request, "small", "pred")
    maps = maps_of(inputs, "gradcam")
    assert (maps >= 0).all()
    options = MapOptions(upsampling="bilinear", normalise="min_max")
    pixels = np.stack([pixel_map(m.numpy(), (64, 64), options) for m in maps])
    np.testing.assert_allclose(pixels, np.load(files["others"])["gradcam_map_pred_f64"], atol=1e-5)


def test_a_mean_over_images_is_told_apart(request: pytest.FixtureRequest) -> None:
    inputs, files = golden_inputs(request, "small", "pred")
    wrong = np.load(files["others"])["genattn_control_batchmix_f64"]
    assert errors(maps_of(inputs, "attention_gradient"), np.stack([wrong] * 6)).min() > 0.5


def min_max(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)


@pytest.mark.parametrize("model", ["small", "tiny"])
def test_rollout_equals_the_study_and_row_normalisation(request: pytest.FixtureRequest, model: str) -> None:
    """The golden grids are min-max normalised; those with `_f64` are exact, the others from float32 models."""
    inputs, files = golden_inputs(request, model, "pred")
    golden = np.load(files["rollout"])
    for fusion, ratio, key in (("mean", 0.0, "mean_0"), ("min", 0.0, "min_0"), ("max", 0.99, "max_0.99")):
        cases = [("study", "_f64", 1e-12), ("study", "", 1e-5), ("rows", "_keepdim", 1e-5), ("rows", "_rownorm", 1e-5)]
        for normalisation, suffix, tolerance in cases:
            name = f"rollout_grid_{key}{suffix}"
            if name not in golden:
                continue
            maps = maps_of(inputs, f"attention_rollout_{fusion}", discard_ratio=ratio, normalisation=normalisation)
            reference = torch.as_tensor(golden[name][: len(maps)]).double()
            assert (min_max(maps) - reference).abs().max() < tolerance, name
        study = maps_of(inputs, f"attention_rollout_{fusion}", discard_ratio=ratio, normalisation="study")
        rows = maps_of(inputs, f"attention_rollout_{fusion}", discard_ratio=ratio)
        assert torch.allclose(study, rows) == (fusion == "mean")


def test_rollout_resized_as_in_the_study(request: pytest.FixtureRequest) -> None:
    inputs, files = golden_inputs(request, "small", "pred")
    grid = min_max(maps_of(inputs, "attention_rollout", normalisation="study")).float().numpy()
    pixels = np.stack([cv2.resize(g, (64, 64)) for g in grid])
    np.testing.assert_allclose(pixels, np.load(files["rollout"])["rollout_mean_0"][:, 0], atol=1e-5)


def slow_rollout(maps: list[Tensor], fusion: str, ratio: float, study: bool) -> Tensor:
    """The product of all mixed matrices in full (N,N), one entry discarded at a time."""
    product = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for heads in maps:
        fused = {"mean": heads.mean(0), "min": heads.min(0).values, "max": heads.max(0).values}[fusion]
        flat = fused.flatten().tolist()
        for index in sorted(range(len(flat)), key=lambda i: flat[i])[: int(len(flat) * ratio)]:
            if index:
                flat[index] = 0.0
        mixed = (torch.tensor(flat, dtype=torch.float64).reshape(fused.shape) + torch.eye(len(fused))) / 2
        mixed = mixed / (mixed.sum(-1) if study else mixed.sum(-1, keepdim=True))
        product = mixed @ product
    return product


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_vit_equals_slow_rewrites(variant: str) -> None:
    model = make_vit(variant)
    images, targets = images_for(model, count=2)
    inputs = inputs_for(model, images, targets)
    num_prefix = model.num_prefix_tokens
    expected: dict[str, list[Tensor]] = {"gradient": [], "raw": [], "cam": [], "ixg": []}
    rolled: dict[tuple[str, float, bool], list[Tensor]] = {}
    for b in range(2):
        maps, gradients = attentions_and_gradients(model, images[b : b + 1], int(targets[b]))
        row = reading_row(model, maps[0].shape[-1])
        product = torch.eye(len(row), dtype=torch.float64)
        for attention, gradient in zip(maps, gradients, strict=True):
            product = product + (attention * gradient).clamp(min=0).mean(0) @ product
        expected["gradient"].append((row @ product)[num_prefix:])
        expected["raw"].append((row @ maps[-1].mean(0))[num_prefix:])
        for fusion in ("mean", "min", "max"):
            for ratio in (0.0, 0.3, 0.9):
                for study in (False, True):
                    slow = row @ slow_rollout(maps, fusion, ratio, study)
                    rolled.setdefault((fusion, ratio, study), []).append(slow[num_prefix:])
        with watched(model) as (twin, _, outputs):
            leaf = images[b : b + 1].clone().requires_grad_()
            logit = twin(leaf)[0, int(targets[b])]
            features = outputs[f"blocks.{len(twin.blocks) - 1}.norm1"]
            g_features, g_image = torch.autograd.grad(logit, (features, leaf))
        patch_features, g_patches = features[0, num_prefix:].detach(), g_features[0, num_prefix:]
        expected["cam"].append(patch_features @ g_patches.mean(0))
        expected["ixg"].append((leaf.detach() * g_image).sum(1)[0])
    assert errors(maps_of(inputs, "attention_gradient"), torch.stack(expected["gradient"])).max() < 1e-10
    assert errors(maps_of(inputs, "raw_attention"), torch.stack(expected["raw"])).max() < 1e-10
    assert errors(maps_of(inputs, "gradcam", relu=False), torch.stack(expected["cam"])).max() < 1e-10
    assert errors(maps_of(inputs, "input_gradient", level="pixel"), torch.stack(expected["ixg"])).max() < 1e-10
    for (fusion, ratio, study), slow_maps in rolled.items():
        options = {"discard_ratio": ratio, "normalisation": "study" if study else "rows"}
        ours = maps_of(inputs, f"attention_rollout_{fusion}", **options)
        slow = torch.stack(slow_maps).reshape(ours.shape)  # all zero where everything but the diagonal is discarded
        torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-15)


def test_every_traced_explainer_shares_one_trace_and_fits_the_contract() -> None:
    model = make_vit("plain")
    images, targets = images_for(model)
    inputs = inputs_for(model, images, targets)
    for name in TRACED:
        cls = EXPLAINERS[name]
        maps = maps_of(inputs, name)
        assert maps.shape == (3, 3, 5), name
        assert maps.dtype == torch.float64
        assert not maps.requires_grad
        assert cls.needs == "vit"
        assert cls.title
        assert cls.paper
        assert "forward" in cls().cost()
        assert cls.signed == bool((maps < 0).any()), name
        alone = maps_of(inputs_for(model, images[1:2], targets[1:2]), name)
        assert errors(maps[1:2], alone).max() < 1e-9, name
    assert EXPLAINERS["attention_rollout"] is EXPLAINERS["attention_rollout_mean"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gradcam", {"relu": True}),
        ("gradcam", {"relu": False}),
        ("input_gradient", {"level": "patch_abs"}),
        ("input_gradient", {"level": "pixel"}),
        ("transformer_lrp", {"method": "full"}),
        ("transformer_lrp", {"method": "rollout"}),
        ("transformer_lrp", {"method": "last_layer_ablation"}),
        ("attn_lrp", {"level": "pixel"}),
        ("attn_lrp_cp", {"level": "token"}),
        ("lime", {"num_samples": 30, "output": "top_k_mask", "segmentation": "grid"}),
        ("lime", {"num_samples": 30, "segmentation": "grid"}),
    ],
)
def test_what_options_change_is_declared(name: str, options: dict[str, Any]) -> None:
    """Sign and granularity as the map shows them; where the sign hangs on an option, some map must have both signs."""
    model = make_vit("plain")
    images, _ = images_for(model, count=4)
    maps = xaibatch.explain(model, images, name, [0, 1, 2, 3], resolution="native", **options)
    explainer = EXPLAINERS[name](**options)
    assert explainer.signed == bool((maps < 0).any())
    height, width = images.shape[2:]
    assert (explainer.granularity == "token") == (maps.shape[1:] == (height // 8, width // 8))
    assert (explainer.granularity == "token") or maps.shape[1:] == (height, width)


def test_all_zero_and_nan_maps_are_returned_as_they_are() -> None:
    model = make_vit("plain")
    images, targets = images_for(model)
    images[1] = torch.nan
    model.head.weight.data[int(targets[0])] = 0
    inputs = inputs_for(model, images, targets)
    for name in ("attention_gradient", "gradcam", "input_gradient", "transformer_lrp"):
        maps = maps_of(inputs, name)
        assert maps[1].isnan().all(), name
        assert maps[2].isfinite().all(), name
        assert maps[2].any(), name
        assert not maps[0].any(), name


@pytest.mark.parametrize("grid", ["plain", "dynamic_grey", "other"])
def test_random_map_hangs_on_the_key_alone(grid: str) -> None:
    if grid == "other":
        model, images, shape = nn.Conv2d(3, 2, 1), torch.zeros(3, 3, 64, 48), (4, 3)
    else:
        model = make_vit(grid)
        images, shape = images_for(model)[0], (3, 5) if grid == "plain" else (4, 10)
    inputs = inputs_for(model, images, torch.zeros(3, dtype=torch.int64))
    maps = maps_of(inputs, "random")
    assert maps.shape == (3, *shape)
    assert maps.dtype == images.dtype
    expected = inputs.keys[2].generator("random_map").random(shape)
    np.testing.assert_array_equal(maps[2].numpy(), expected.astype(maps.numpy().dtype))
    assert (maps[0] != maps[1]).all()


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="discard_ratio"):
        EXPLAINERS["attention_rollout"](discard_ratio=1.0)
    with pytest.raises(ConfigError, match="Did you mean 'normalisation'"):
        EXPLAINERS["attention_rollout_max"](normalization="rows")
    with pytest.raises(ConfigError, match="level"):
        EXPLAINERS["input_gradient"](level="pixels")
