"""TransformerLRP: golden numbers of the reference in float64, slow rewrites for models it never had, and properties."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.slow_vit import VARIANTS, images_for, make_vit, slow_transformer_lrp
from xaibatch.errors import ConfigError, ModelError
from xaibatch.explainers.base import EXPLAINERS, ExplainInput
from xaibatch.explainers.transformer_lrp import TransformerLRP, attention_relevance
from xaibatch.maps import MapOptions, pixel_map
from xaibatch.models.trace import record

METHODS = [
    "transformer_attribution",
    "grad",
    "rollout",
    "full",
    "last_layer",
    "last_layer_ablation",
    "last_layer_attn",
    "second_layer",
    "second_layer_ablation",
    "transformer_attribution_start1",
    "rollout_start1",
]


def small_vit(folder: Path) -> VisionTransformer:
    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=3)
    model.load_state_dict(load_file(folder / "small_vit.safetensors"))
    return model.double().eval()


def tiny_vit(shared: Path) -> Any:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    weights = load_file(shared / "models" / "vit_tiny_cxr3.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.double().eval()


def explainer(method: str) -> TransformerLRP:
    name, _, start = method.partition("_start")
    return TransformerLRP(method=name, start_layer=int(start or 0))


def errors(maps: Tensor, reference: NDArray[np.floating] | Tensor) -> Tensor:
    """Relative L2 error of every image."""
    ours, theirs = maps.double().flatten(1), torch.as_tensor(reference).double().flatten(1)
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1)


def targets_of(golden: Any, target: str) -> Tensor:
    return torch.as_tensor(golden["pred"] if target == "pred" else np.zeros_like(golden["pred"]))


@pytest.mark.parametrize("target", ["pred", "class0"])
def test_small_equals_the_reference(golden_small: Path, target: str) -> None:
    golden = np.load(golden_small / "small_lrp.npz")
    images = torch.as_tensor(golden["x"]).double()
    trace = record(small_vit(golden_small), images, targets_of(golden, target), images_per_part=len(images))
    assert len(trace.parts) == 1  # a CPU's default of one image each could not show a sum over the batch
    for method in METHODS:
        assert errors(trace.map(explainer(method).relevance), golden[f"{method}_{target}_f64"]).max() < 1e-8, method


@pytest.mark.parametrize("target", ["pred", "class0"])
def test_radiographs_equal_the_reference(shared: Path, target: str) -> None:
    """All twelve for the predicted class; for class 0 those that are predicted to be another."""
    golden = np.load(shared / "golden" / "tiny_lrp.npz")
    rows = slice(None) if target == "pred" else golden["pred"] != 0
    images, targets = torch.as_tensor(golden["x"][rows]).double(), targets_of(golden, target)[rows]
    maps = record(tiny_vit(shared), images, targets).map(TransformerLRP().relevance)
    assert errors(maps, golden[f"transformer_attribution_{target}_f64"][rows]).max() < 1e-8


def test_the_other_maps_of_three_radiographs_equal_the_reference(shared: Path) -> None:
    golden = np.load(shared / "golden" / "tiny_lrp.npz")
    images = torch.as_tensor(golden["x"][:3]).double()
    trace = record(tiny_vit(shared), images, targets_of(golden, "pred")[:3])
    for method in ("rollout", "full", "last_layer"):
        assert errors(trace.map(explainer(method).relevance), golden[f"{method}_pred_f64"][:3]).max() < 1e-8, method


def test_float32_is_as_near_as_the_reference_in_float32(shared: Path) -> None:
    """The golden file's own float32 run strays by up to 1.5e-2 from its float64 run on these images."""
    golden = np.load(shared / "golden" / "tiny_lrp.npz")
    trace = record(tiny_vit(shared).float(), torch.as_tensor(golden["x"]), targets_of(golden, "pred"))
    maps = trace.map(TransformerLRP().relevance)
    assert maps.dtype == torch.float32
    assert errors(maps, golden["transformer_attribution_pred_f64"]).max() < 3e-2
    options = MapOptions(upsampling="bilinear", normalise="min_max")
    pixels = np.stack([pixel_map(m.numpy(), (224, 224), options) for m in maps])
    assert np.abs(pixels - golden["map_pred_f32"][:, 0]).max() < 2e-2


def test_a_batch_that_mixes_images_is_told_apart(golden_small: Path) -> None:
    golden = np.load(golden_small / "small_lrp.npz")
    images = torch.as_tensor(golden["x"]).double()
    trace = record(small_vit(golden_small), images, targets_of(golden, "pred"), images_per_part=len(images))
    wrong = golden["batchmix_transformer_attribution_pred_f64"]
    strayed = errors(trace.map(TransformerLRP().relevance), wrong) > 0.1
    assert strayed.tolist() == [False, True, True, False, False, True]  # where the two branches' signs differ


def test_attention_relevance_of_one_image(golden_small: Path) -> None:
    """Last two blocks; the reference stored it in float32, in which its own lower blocks are noise (0.4 relative)."""
    golden = np.load(golden_small / "small_lrp.npz")
    images, targets = torch.as_tensor(golden["x"]).double(), targets_of(golden, "pred")
    (part,) = record(small_vit(golden_small), images[:1], targets[:1]).parts
    with torch.no_grad():
        ours = list(attention_relevance(part))[::-1]
    third, last = golden["img0_attn_cam_f32"][2:]
    assert not last[:, 1:].any()  # rows that are not computed carry no relevance
    assert errors(ours[3], last[None, :, :1]) < 1e-4
    assert errors(ours[2], third[None]) < 2e-3


@pytest.mark.parametrize("method", ["transformer_attribution", "full"])
def test_a_batch_gives_what_single_images_give(method: str) -> None:
    model = make_vit("plain")
    images, _ = images_for(model, count=5)
    targets = torch.tensor([0, 1, 2, 3, 0])
    relevance = TransformerLRP(method=method).relevance
    whole = record(model, images, targets, images_per_part=5).map(relevance)
    single = torch.cat([record(model, images[b : b + 1], targets[b : b + 1]).map(relevance) for b in range(5)])
    in_pairs = record(model, images, targets, images_per_part=2).map(relevance)
    assert errors(whole, single).max() < 1e-9
    assert errors(whole, in_pairs).max() < 1e-9
    order = torch.tensor([3, 0, 4, 1, 2])
    assert errors(record(model, images[order], targets[order]).map(relevance), whole[order]).max() < 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_vit_equals_the_slow_rewrite(variant: str) -> None:
    model = make_vit(variant)
    images, targets = images_for(model, count=2)
    trace = record(model, images, targets)
    for method in METHODS:
        name, _, start = method.partition("_start")
        if name in ("grad", "last_layer_attn") or (variant == "one_block" and (start or "second" in name)):
            continue
        ours = trace.map(TransformerLRP(method=name, start_layer=int(start or 0)).relevance)
        slow = [
            slow_transformer_lrp(model, images[b : b + 1], int(targets[b]), name, int(start or 0)) for b in range(2)
        ]
        assert errors(ours, torch.stack(slow)).max() < 1e-8, (variant, method)


def test_float64_on_request_for_a_float32_model(golden_small: Path) -> None:
    golden = np.load(golden_small / "small_lrp.npz")
    model, images = small_vit(golden_small).float(), torch.as_tensor(golden["x"])
    inputs = ExplainInput(
        model=model, images_BCHW=images, targets_B=targets_of(golden, "pred"), keys=(), run_plans=lambda plans: []
    )
    maps = EXPLAINERS["transformer_lrp"](precision="float64").explain(inputs).maps_Bhw
    assert errors(maps, golden["transformer_attribution_pred_f64"]).max() < 1e-8
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_block_that_is_not_there_is_refused() -> None:
    model = make_vit("one_block")
    trace = record(model, *images_for(model))
    with pytest.raises(ModelError, match=r"start_layer needs block 1, the model has blocks 0 to 0"):
        trace.map(TransformerLRP(start_layer=1).relevance)
    with pytest.raises(ModelError, match=r"'second_layer' needs block 1"):
        trace.map(TransformerLRP(method="second_layer").relevance)
    with pytest.raises(ConfigError, match="unknown option 'start_layr'"):
        TransformerLRP(start_layr=1)
