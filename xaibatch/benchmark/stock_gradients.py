"""A ViT, one image and a class in, one map out: attention and gradient methods as people write them, with hooks and
autograd, an image at a time.

Shape letters: C channels, H W pixels, N tokens, D width, h heads, g v token grid.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Loop = Callable[[Any, Tensor, int], Tensor]
"""(model, image_1CHW, target) -> map (g,v)."""


@contextmanager
def attention_hooks(vit: Any) -> Iterator[list[Tensor]]:
    """Within it every forward pass adds each block's attention (1,h,N,N) to the list, first block first."""
    kept: list[Tensor] = []
    fused = [block.attn.fused_attn for block in vit.blocks]
    handles = [
        block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        for block in vit.blocks
    ]
    for block in vit.blocks:
        block.attn.fused_attn = False
    try:
        yield kept
    finally:
        for block, was in zip(vit.blocks, fused, strict=True):
            block.attn.fused_attn = was
        for handle in handles:
            handle.remove()


def rollout(
    model: Any, image_1CHW: Tensor, target: int, *, fusion: Literal["mean", "min", "max"], discard_ratio: float = 0.0
) -> Tensor:
    """Attention rollout: whole matrices multiplied, block after block."""
    vit = _vit(model)
    with torch.no_grad(), attention_hooks(vit) as attentions:
        vit(image_1CHW)
        joint = torch.eye(attentions[0].shape[-1], device=image_1CHW.device)
        for attention_1hNN in attentions:
            fused = _FUSIONS[fusion](attention_1hNN, 1)
            flat = fused.flatten(1)
            lowest = flat.topk(int(flat.shape[1] * discard_ratio), -1, largest=False).indices
            flat[0, lowest[lowest != 0]] = 0
            mixed = (fused + torch.eye(fused.shape[-1], device=fused.device)) / 2
            joint = (mixed / mixed.sum(-1, keepdim=True))[0] @ joint
    return _grid(vit, joint[0, 1:])


def raw_attention(model: Any, image_1CHW: Tensor, target: int) -> Tensor:
    """The last block's class-token row, mean over heads."""
    vit = _vit(model)
    with torch.no_grad(), attention_hooks(vit) as attentions:
        vit(image_1CHW)
    return _grid(vit, attentions[-1][0].mean(0)[0, 1:])


def attention_times_gradient(model: Any, image_1CHW: Tensor, target: int) -> Tensor:
    """Chefer et al., ICCV 2021: R + mean over heads of (gradient × attention)⁺ times R, block after block."""
    vit = _vit(model)
    with torch.enable_grad(), attention_hooks(vit) as attentions:
        logits_1K = vit(image_1CHW.detach().requires_grad_())
        gradients = torch.autograd.grad(logits_1K[0, target], attentions)
    joint = torch.eye(attentions[0].shape[-1], device=image_1CHW.device)
    for attention, gradient in zip(attentions, gradients, strict=True):
        joint = joint + (attention * gradient)[0].detach().clamp(min=0).mean(0) @ joint
    return _grid(vit, joint[0, 1:])


def gradcam(model: Any, image_1CHW: Tensor, target: int) -> Tensor:
    """GradCAM at the last block's first norm, by a hook and a backward pass through the whole model."""
    vit, kept = _vit(model), []
    handle = vit.blocks[-1].norm1.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        with torch.enable_grad():
            image = image_1CHW.detach().requires_grad_()
            logits_1K = vit(image)
            gradient, _ = torch.autograd.grad(logits_1K[0, target], (kept[0], image))
    finally:
        handle.remove()
    features_ND, weights_D = kept[0][0, 1:].detach(), gradient[0, 1:].mean(0)
    return _grid(vit, (features_ND @ weights_D).clamp(min=0))


def input_times_gradient(model: Any, image_1CHW: Tensor, target: int) -> Tensor:
    """Image times gradient, summed over channels and patches."""
    vit = _vit(model)
    with torch.enable_grad():
        image = image_1CHW.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(vit(image)[0, target], image)
    return _patch_sums(vit, image_1CHW * gradient)


def attn_lrp(
    model: Any,
    image_1CHW: Tensor,
    target: int,
    *,
    qk_factor: float,
    v_factor: float,
    gamma_conv: float = 0.25,
    gamma_linear: float = 0.05,
) -> Tensor:
    """AttnLRP (Achtibat et al., ICML 2024) with autograd functions whose backward pass is the rule."""
    vit = _vit(model)
    with torch.enable_grad():
        image = image_1CHW.detach().requires_grad_()
        projection = vit.patch_embed.proj
        patches = functional.unfold(image, projection.kernel_size, stride=projection.stride).transpose(1, 2)
        x = _gamma(patches, projection.weight.flatten(1), projection.bias, gamma_conv)
        x = torch.cat((vit.cls_token, x), dim=1) + vit.pos_embed
        for block in vit.blocks:
            layer = block.attn
            qkv = layer.qkv(_norm(block.norm1, x))
            q, k, v = qkv.view(*qkv.shape[:2], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = _scaled(q, qk_factor), _scaled(k, qk_factor), _scaled(v, v_factor)
            weights = (q @ k.transpose(-1, -2) * layer.scale).softmax(-1)
            x = x + layer.proj((weights @ v).transpose(1, 2).flatten(2))
            hidden = _gamma(_norm(block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias, gamma_linear)
            hidden = hidden * (block.mlp.act(hidden) / (hidden + 1e-10)).detach()
            x = x + _gamma(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias, gamma_linear)
        logits_1K = _gamma(_norm(vit.norm, x)[:, 0], vit.head.weight, vit.head.bias, gamma_linear)
        (gradient,) = torch.autograd.grad(logits_1K[0, target], image)
    return _patch_sums(vit, image_1CHW * gradient)


LOOPS: Mapping[str, Loop] = {
    "attention_rollout_mean": partial(rollout, fusion="mean"),
    "attention_rollout_min": partial(rollout, fusion="min"),
    "attention_rollout_max": partial(rollout, fusion="max"),
    "raw_attention": raw_attention,
    "attention_gradient": attention_times_gradient,
    "gradcam": gradcam,
    "input_gradient": input_times_gradient,
    "attn_lrp": partial(attn_lrp, qk_factor=0.25, v_factor=0.5),
    "attn_lrp_cp": partial(attn_lrp, qk_factor=0.0, v_factor=1.0),
}
"""The loop that each of our explainers of this name is held against."""


_FUSIONS: Mapping[str, Callable[[Tensor, int], Tensor]] = {"mean": torch.mean, "min": torch.amin, "max": torch.amax}


class _GammaLinear(torch.autograd.Function):
    """y = xWᵀ + b forward; backward the generalised gamma rule, as a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
        y = functional.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, y)
        ctx.gamma = gamma
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, bias, y = ctx.saved_tensors
        up, down = weight + ctx.gamma * weight.clamp(min=0), weight + ctx.gamma * weight.clamp(max=0)
        bias_up, bias_down = bias + ctx.gamma * bias.clamp(min=0), bias + ctx.gamma * bias.clamp(max=0)
        positive, negative = x.clamp(min=0), x.clamp(max=0)
        z_up = functional.linear(positive, up, bias_up) + functional.linear(negative, down)
        z_down = functional.linear(positive, down, bias_down) + functional.linear(negative, up)
        r = gradients[0] * y
        s_up = torch.where(y > 0, r / _stabilised(z_up, 1e-6), 0)
        s_down = torch.where(y < 0, r / _stabilised(z_down, 1e-6), 0)
        relevance = positive * (s_up @ up + s_down @ down) + negative * (s_up @ down + s_down @ up)
        return relevance / _stabilised(x, 1e-10), None, None, None


def _gamma(x: Tensor, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
    y: Tensor = _GammaLinear.apply(x, weight, bias, gamma)
    return y


def _stabilised(z: Tensor, eps: float) -> Tensor:
    return z + eps * torch.where(z >= 0, 1.0, -1.0)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm whose divisor is a constant in the backward pass."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt().detach()
    return centred / deviation * norm.weight + norm.bias


def _scaled(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient multiplied by a factor."""
    return x * factor + (x * (1 - factor)).detach()


def _patch_sums(vit: Any, image_1CHW: Tensor) -> Tensor:
    return functional.avg_pool2d(image_1CHW.sum(1), vit.patch_embed.patch_size, divisor_override=1)[0].detach()


def _grid(vit: Any, row_N: Tensor) -> Tensor:
    return row_N.reshape(*vit.patch_embed.grid_size)


def _vit(model: Any) -> Any:
    return getattr(model, "backbone", model)
