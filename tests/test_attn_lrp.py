"""AttnLRP in both variants: golden numbers of its authors' code, a slow rewrite by autograd, and what must differ."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.slow_vit import VARIANTS, images_for, make_vit, slow_attn_lrp
from tests.test_transformer_lrp import errors, small_vit, targets_of, tiny_vit
from xaibatch.errors import ConfigError
from xaibatch.explainers.attn_lrp import AttnLRP, AttnLRPHybrid
from xaibatch.models.trace import Trace, record

CLASSES = {"attn": AttnLRP, "cp": AttnLRPHybrid}


def setting(key: str) -> tuple[str, str, str, dict[str, float | None]]:
    """`patch_c0.25_l0.05_pred_f64` as level, target, precision, gammas."""
    level, *middle, target, precision = key.split("_")
    conv, linear = (None, None) if middle == ["none"] else (float(middle[0][1:]), float(middle[1][1:]))
    return level, target, precision, {"gamma_conv": conv, "gamma_linear": linear}


def compared_keys(golden: Any, precision: str) -> list[str]:
    return [key for key in golden.files if key.startswith(("patch", "token", "pixel")) and key.endswith(precision)]


def worst_errors(golden: Any, variant: str, traces: dict[str, Trace], precision: str) -> dict[str, float]:
    """Largest relative error of an image, by golden key."""
    worst: dict[str, float] = defaultdict(float)
    for key in compared_keys(golden, precision):
        level, target, _, gammas = setting(key)
        trace = traces[target]
        maps = trace.map(CLASSES[variant](level=level, **gammas).relevance)
        reference = golden[key][:, 1:] if level == "token" else golden[key]
        worst[key] = float(errors(maps, reference[: len(maps)]).max())
    return worst


@pytest.mark.parametrize("variant", CLASSES)
def test_small_equals_the_authors_code(golden_small: Path, variant: str) -> None:
    """Every key in float64; float32 to 2e-5, but 2e-3 with gamma 0 in the MLP (dividing by near-zero outputs)."""
    golden, images = np.load(golden_small / f"small_lxt_{variant}.npz"), np.load(golden_small / "small_lrp.npz")["x"]
    for precision, dtype in (("f64", torch.float64), ("f32", torch.float32)):
        model, x = small_vit(golden_small).to(dtype), torch.as_tensor(images).to(dtype)
        traces = {target: record(model, x, targets_of(golden, target)) for target in ("pred", "class0")}
        for key, error in worst_errors(golden, variant, traces, precision).items():
            assert error < (1e-11 if precision == "f64" else 2e-3 if "_l0_" in key else 2e-5), key


@pytest.mark.parametrize("variant", CLASSES)
def test_radiographs_equal_the_authors_code(shared: Path, variant: str) -> None:
    golden = np.load(shared / "golden" / f"tiny_lxt_{variant}.npz")
    images = torch.as_tensor(np.load(shared / "golden" / "tiny_lrp.npz")["x"][:1]).double()
    traces = {"pred": record(tiny_vit(shared), images, targets_of(golden, "pred")[:1])}
    worst = worst_errors(golden, variant, traces, "f64")
    assert len(worst) >= 6
    assert max(worst.values()) < 1e-11


@pytest.mark.parametrize("variant", CLASSES)
def test_wrong_ways_are_told_apart(golden_small: Path, variant: str) -> None:
    golden, images = np.load(golden_small / f"small_lxt_{variant}.npz"), np.load(golden_small / "small_lrp.npz")["x"]
    trace = record(small_vit(golden_small), torch.as_tensor(images).double(), targets_of(golden, "pred"))
    maps = trace.map(CLASSES[variant]().relevance)
    controls = [key for key in golden.files if key.startswith("control")]
    assert controls
    for key in controls:
        assert errors(maps, golden[key]).min() > 0.3, key
    other = trace.map(CLASSES["cp" if variant == "attn" else "attn"]().relevance)
    assert errors(maps, other).min() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_vit_equals_the_slow_rewrite(variant: str) -> None:
    model = make_vit(variant)
    images, targets = images_for(model, count=2)
    trace = record(model, images, targets)
    for cls, hybrid in ((AttnLRP, False), (AttnLRPHybrid, True)):
        for conv, linear in ((0.25, 0.05), (None, None), (0.0, 1.0)):
            maps = trace.map(cls(gamma_conv=conv, gamma_linear=linear, level="pixel").relevance)
            slow = [slow_attn_lrp(model, images[b : b + 1], int(targets[b]), hybrid, conv, linear) for b in range(2)]
            assert errors(maps, torch.stack(slow)).max() < 1e-9, (hybrid, conv, linear)


def test_patches_sum_their_pixels_and_batches_their_images() -> None:
    model = make_vit("plain")
    images, targets = images_for(model, count=4)
    trace = record(model, images, targets, images_per_part=3)
    pixels = trace.map(AttnLRP(level="pixel").relevance)
    patches = torch.nn.functional.avg_pool2d(pixels[:, None], 8)[:, 0] * 64
    maps = trace.map(AttnLRP().relevance)
    torch.testing.assert_close(maps, patches)
    single = [record(model, images[b : b + 1], targets[b : b + 1]).map(AttnLRP().relevance) for b in range(4)]
    assert errors(maps, torch.cat(single)).max() < 1e-9
    assert (maps < 0).any()
    with pytest.raises(ConfigError, match="gamma_linear"):
        AttnLRP(gamma_linear=-1)
