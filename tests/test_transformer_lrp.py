"""TransformerLRP against the reference's golden numbers in float64, and what must differ."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from xaibatch.explainers.transformer_lrp import TransformerLRP
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


def explainer(method: str) -> TransformerLRP:
    name, _, start = method.partition("_start")
    return TransformerLRP(method=name, start_layer=int(start or 0))


def worst(maps: Tensor, reference: NDArray[np.floating]) -> float:
    """Largest relative L2 error over images."""
    ours, theirs = maps.double().flatten(1), torch.as_tensor(reference).double().flatten(1)
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["pred", "class0"])
def test_small_equals_the_reference_in_float64(golden_small: Path, method: str, target: str) -> None:
    golden = np.load(golden_small / "small_lrp.npz")
    images = torch.as_tensor(golden["x"]).double()
    targets = torch.as_tensor(golden["pred"]) if target == "pred" else torch.zeros(len(images), dtype=torch.int64)
    trace = record(small_vit(golden_small), images, targets)
    assert worst(trace.map(explainer(method).relevance), golden[f"{method}_{target}_f64"]) < 1e-8
