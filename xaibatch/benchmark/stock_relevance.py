"""A ViT, one image and a class in, TransformerLRP's map out: the slow way, rule by rule with autograd, as published.

Chefer, Gur, Wolf, CVPR 2021, section 3.1, `transformer_attribution`. What ours is timed against and checked with: every
layer keeps its inputs, computes its output anew when relevance comes back and asks autograd for the products, and a
linear layer takes eight matrix products (positive and negative parts of inputs and weights, for α and for β = 0).
One image at a time; plain timm ViTs with a class token.

Shape letters: C channels, H W pixels, N tokens, D width, h heads, d head width, g v token grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xaibatch.explainers.relevance import GUARD


def reference_lrp(model: Any, image_1CHW: Tensor, target: int) -> Tensor:
    """Relevance of the class per token (g,v), in the image's dtype; the model is left as it was."""
    vit = getattr(model, "backbone", model)
    with torch.enable_grad():
        run = _Run(vit, image_1CHW.detach())
        gradients = torch.autograd.grad(run.logits_1K[0, target], [block.attention for block in run.blocks])
        one_hot = functional.one_hot(torch.tensor([target], device=image_1CHW.device), run.logits_1K.shape[1])
        relevances = run.attention_relevance(one_hot.to(image_1CHW.dtype))
    joint = torch.eye(gradients[0].shape[-1], dtype=image_1CHW.dtype, device=image_1CHW.device)
    for gradient, relevance in zip(gradients, relevances, strict=True):
        layer = (gradient * relevance).clamp(min=0)[0].mean(0)
        joint = (layer + torch.eye(len(layer), dtype=layer.dtype, device=layer.device)) @ joint
    return joint[0, 1:].view(*vit.patch_embed.grid_size).detach()


def guarded(a: Tensor, b: Tensor) -> Tensor:
    """The published division: by b + 1e-9 of either sign, 0 where b is 0."""
    shifted = b.clamp(min=GUARD) + b.clamp(max=GUARD)
    shifted = shifted + shifted.eq(0).to(b.dtype) * GUARD
    return a / shifted * b.ne(0).to(b.dtype)


def leaf(x: Tensor) -> Tensor:
    """The tensor as an input that gradients are asked for."""
    return x.detach().requires_grad_()


def through_linear(weight: Tensor, x: Tensor, r: Tensor, alpha: float = 1.0) -> Tensor:
    """α-β rule with β = α - 1, both terms computed as published: eight products."""
    beta = alpha - 1
    parts_w = weight.clamp(min=0), weight.clamp(max=0)
    parts_x = leaf(x.clamp(min=0)), leaf(x.clamp(max=0))

    def term(w1: Tensor, w2: Tensor) -> Tensor:
        z1, z2 = functional.linear(parts_x[0], w1), functional.linear(parts_x[1], w2)
        s = guarded(r, z1 + z2).detach()
        (g1,) = torch.autograd.grad(z1, parts_x[0], s)
        (g2,) = torch.autograd.grad(z2, parts_x[1], s)
        return parts_x[0] * g1 + parts_x[1] * g2

    activating, inhibiting = term(parts_w[0], parts_w[1]), term(parts_w[1], parts_w[0])
    return (alpha * activating - beta * inhibiting).detach()


def through_product(
    product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Both factors of a matrix product get half."""
    a, b = leaf(a), leaf(b)
    z = product(a, b)
    grad_a, grad_b = torch.autograd.grad(z, (a, b), guarded(r, z).detach())
    return (a * grad_a).detach() / 2, (b * grad_b).detach() / 2


def through_sum(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """A residual sum: shares by value, rescaled so that their totals split the whole by absolute size."""
    a, b = leaf(a), leaf(b)
    z = a + b
    grad_a, grad_b = torch.autograd.grad(z, (a, b), guarded(r, z).detach())
    share_a, share_b = (a * grad_a).detach(), (b * grad_b).detach()
    total_a, total_b, total = share_a.sum(), share_b.sum(), r.sum()
    weight = total_a.abs() + total_b.abs()
    factor_a = guarded(guarded(total_a.abs(), weight) * total, total_a)
    factor_b = guarded(guarded(total_b.abs(), weight) * total, total_b)
    return share_a * factor_a, share_b * factor_b


def through_copy(x: Tensor, *relevances: Tensor) -> Tensor:
    """A value used several times."""
    return x * sum(guarded(r, x) for r in relevances)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """What one block saw; `attention` is part of autograd's graph, the rest is detached."""

    block: Any
    x: Tensor
    n1: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attention: Tensor
    mixed: Tensor
    a: Tensor
    middle: Tensor
    n2: Tensor
    hidden: Tensor
    f: Tensor


class _Run:
    """One forward pass with everything kept."""

    def __init__(self, vit: Any, image_1CHW: Tensor) -> None:
        self.vit = vit
        x = vit.patch_embed(leaf(image_1CHW))
        x = torch.cat((vit.cls_token, x), dim=1) + vit.pos_embed
        self.blocks = []
        for block in vit.blocks:
            record, x = _forward_block(block, x)
            self.blocks.append(record)
        self.final = vit.norm(x)
        self.logits_1K: Tensor = vit.head(self.final[:, 0])

    def attention_relevance(self, r_1K: Tensor) -> list[Tensor]:
        """Relevance at the attention weights of every block, first to last."""
        token = self.final[:, 0].detach()
        r = through_linear(self.vit.head.weight, token, r_1K)
        r_final = torch.zeros_like(self.final)
        r_final[:, 0] = through_copy(token, r)
        r, relevances = r_final.detach(), []
        for record in reversed(self.blocks):
            r, at_attention = _relevance_of_block(record, r)
            relevances.append(at_attention)
        return relevances[::-1]


def _forward_block(block: Any, x: Tensor) -> tuple[_Block, Tensor]:
    attention_layer = block.attn
    n1 = block.norm1(x)
    qkv = attention_layer.qkv(n1)
    q, k, v = qkv.view(*qkv.shape[:2], 3, attention_layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (_dots(q, k) * attention_layer.scale).softmax(-1)
    mixed = _mix(weights, v).transpose(1, 2).flatten(2)
    a = attention_layer.proj(mixed)
    middle = x + a
    n2 = block.norm2(middle)
    hidden = block.mlp.act(block.mlp.fc1(n2))
    f = block.mlp.fc2(hidden)
    kept = {"x": x, "n1": n1, "q": q, "k": k, "v": v, "mixed": mixed, "a": a, "middle": middle, "n2": n2,
            "hidden": hidden, "f": f}  # fmt: skip
    detached = {name: value.detach() for name, value in kept.items()}
    return _Block(block=block, attention=weights, **detached), middle + f


def _relevance_of_block(record: _Block, r: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance at the block's input and at its attention weights; norms and activations pass it on unchanged."""
    block = record.block
    r_middle, r_f = through_sum(record.middle, record.f, r)
    r_f = through_linear(block.mlp.fc2.weight, record.hidden, r_f)
    r_f = through_linear(block.mlp.fc1.weight, record.n2, r_f)
    r = through_copy(record.middle, r_middle, r_f)
    r_x, r_a = through_sum(record.x, record.a, r)
    r_mixed = through_linear(block.attn.proj.weight, record.mixed, r_a)
    r_heads = r_mixed.view(*r_mixed.shape[:2], block.attn.num_heads, -1).transpose(1, 2)
    r_attention, r_v = through_product(_mix, record.attention, record.v, r_heads)
    r_q, r_k = through_product(_dots, record.q, record.k, r_attention)
    r_qkv = torch.stack((r_q, r_k, r_v)).permute(1, 3, 0, 2, 4).flatten(2)
    r_n1 = through_linear(block.attn.qkv.weight, record.n1, r_qkv)
    return through_copy(record.x, r_x, r_n1), r_attention


def _dots(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    return weights @ v
