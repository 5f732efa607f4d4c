"""Steps of a backward pass over a recorded forward: gradient at a layer's output in, at its input out, no graph.

The rules are a parameter: `PlainRules` gives the ordinary gradient, a subclass the changed gradients of AttnLRP. A step
per half block lets the caller stop where it has what it wants, and keep only that.

Shape letters: B images, C channels, P patches, N tokens, Q read tokens, D width, A attention width, h heads, d head
width, F hidden width, K classes, I pixels of a patch. `g_` marks a gradient.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from xaibatch.models.forward import BlockRecord, ForwardRecord, heads, side_by_side, split_heads
from xaibatch.models.vit import Affine

Values = Callable[[], Tensor]
"""A layer's values, computed when called: the ordinary gradient does without, so that they need not be kept."""


class PlainRules:
    """The ordinary gradient of every layer.

    `qk_factor` and `v_factor` multiply the gradients into queries and keys, and into values; `gate_factor` those into
    both factors of a gated MLP.
    """

    qk_factor = 1.0
    v_factor = 1.0
    gate_factor = 1.0

    def linear(self, layer: Affine, x: Values, y: Tensor, g: Tensor) -> Tensor:
        """MLP layers and head: from input x, output y and the output's gradient g."""
        return g @ layer.weight_OI

    def patch(self, layer: Affine, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """The patch projection, on flattened patches."""
        return g @ layer.weight_OI

    def norm(self, norm: nn.Module, x: Tensor, g: Tensor) -> Tensor:
        """LayerNorm or RmsNorm over the last dimension, at input x."""
        if isinstance(norm, nn.Identity):
            return g
        if isinstance(norm, nn.LayerNorm):
            shape, weight, bias = list(norm.normalized_shape), norm.weight, norm.bias
            _, mean, inverse = torch.native_layer_norm(x, shape, weight, bias, norm.eps)
            only_input = [True, False, False]
            return torch.ops.aten.native_layer_norm_backward(g, x, shape, mean, inverse, weight, bias, only_input)[0]
        inverse = inverse_scale(norm, x)
        normed, g = x * inverse, weighted(norm, g) * inverse
        return g - normed * (g * normed).mean(-1, keepdim=True)

    def activation(self, act: Callable[[Tensor], Tensor], t: Tensor, y: Values, g: Tensor) -> Tensor:
        """An element-wise activation from input t, output y and the output's gradient g."""
        if isinstance(act, nn.GELU):
            return torch.ops.aten.gelu_backward(g, t, approximate=act.approximate)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = t.detach().requires_grad_()
            return torch.autograd.grad(act(leaf), leaf, g)[0]


def inverse_scale(norm: nn.Module, x: Tensor) -> Tensor:
    """One over what the norm divides by: the standard deviation, for RmsNorm the root mean square, (..., 1)."""
    assert isinstance(norm.eps, float)
    if isinstance(norm, nn.LayerNorm):
        return torch.native_layer_norm(x, list(norm.normalized_shape), None, None, norm.eps)[2].to(x.dtype)
    return torch.rsqrt((x * x).mean(-1, keepdim=True) + norm.eps)


def weighted(norm: nn.Module, g: Tensor) -> Tensor:
    """g times the norm's weight, if it has one."""
    return g * norm.weight.detach() if isinstance(norm.weight, Tensor) else g


def one_hot(targets_B: Tensor, record: ForwardRecord) -> Tensor:
    """The gradient of each image's explained logit at the logits (B,K)."""
    return functional.one_hot(targets_B, record.logits_BK.shape[1]).to(record.logits_BK.dtype)


def through_head(record: ForwardRecord, g_BK: Tensor, rules: PlainRules) -> Tensor:
    """Logits to the last block's output (B,Q,D)."""
    layers = record.layers
    g_BD = rules.linear(layers.head, lambda: record.features_BD, record.logits_BK, g_BK)
    g_BD = rules.norm(layers.fc_norm, record.pooled_BD, g_BD)
    g = torch.zeros_like(record.final_BQD)
    if layers.class_pooling:
        g[:, 0] = g_BD
    else:
        pooled = g[:, layers.pooled_from :]
        pooled += g_BD[:, None] / pooled.shape[1]
    return rules.norm(layers.norm, record.out_BQD, g)


def through_mlp(block: BlockRecord, g_BQD: Tensor, rules: PlainRules) -> Tensor:
    """A block's output to the residual stream between attention and MLP (B,Q,D)."""
    layers = block.layers
    hidden = cache(block.hidden)
    g = rules.linear(layers.mlp_out, hidden, block.f_BQD, g_BQD)
    if layers.gated:
        gate, value = layers.halves(block.pre_BQF)
        active = layers.act(gate)
        g = g * rules.gate_factor if rules.gate_factor != 1 else g
        g = layers.join(rules.activation(layers.act, gate, lambda: active, g * value), g * active)
    else:
        g = rules.activation(layers.act, block.pre_BQF, hidden, g)
    g = rules.linear(layers.mlp_in, lambda: block.n2_BQD, block.pre_BQF, g)
    return g_BQD + rules.norm(layers.norm2, block.middle, g)


def to_mixed(block: BlockRecord, g_middle_BQD: Tensor) -> Tensor:
    """The residual stream after attention to the heads' outputs (B,h,Q,d)."""
    return heads(g_middle_BQD @ block.layers.out.weight_OI, block.layers.num_heads).contiguous()


def to_attention(block: BlockRecord, g_mixed_BhQd: Tensor) -> Tensor:
    """The heads' outputs to the attention weights (B,h,Q,N)."""
    return g_mixed_BhQd @ block.v_BhNd.transpose(-1, -2)


def through_attention(
    block: BlockRecord, g_mixed_BhQd: Tensor, g_attention_BhQN: Tensor | None, rules: PlainRules
) -> Tensor:
    """The heads' outputs to norm1's output (B,N,D); the gradient at the weights is taken if it was computed before."""
    layers, weights = block.layers, block.attention_BhQN
    width = block.mixed_BQA.shape[-1]
    g_v = weights.transpose(-1, -2) @ g_mixed_BhQd
    if not rules.qk_factor:
        return (side_by_side(g_v) * rules.v_factor) @ layers.to_qkv.weight_OI[2 * width :]
    g_weights = to_attention(block, g_mixed_BhQd) if g_attention_BhQN is None else g_attention_BhQN
    mean = (g_mixed_BhQd * heads(block.mixed_BQA, layers.num_heads)).sum(
        -1, keepdim=True
    )  # = (g_weights * weights).sum
    g_dots = (g_weights - mean).mul_(weights)
    g_qkv = torch.zeros_like(block.qkv_BNA)
    to_q, to_k, to_v = split_heads(g_qkv, layers.num_heads)
    factor, read = rules.qk_factor * layers.scale, slice(block.num_read)
    torch.mul(g_dots @ block.k_BhNd, factor, out=to_q[:, :, read])
    torch.mul(g_dots.transpose(-1, -2) @ block.q_BhNd[:, :, read], factor, out=to_k)
    torch.mul(g_v, rules.v_factor, out=to_v)
    q_raw, k_raw, _ = split_heads(block.qkv_BNA, layers.num_heads)
    for norm, raw, g in ((layers.q_norm, q_raw, to_q), (layers.k_norm, k_raw, to_k)):
        if not isinstance(norm, nn.Identity):
            g.copy_(rules.norm(norm, raw, g))
    return g_qkv @ layers.to_qkv.weight_OI


def to_block_input(block: BlockRecord, g_middle_BQD: Tensor, g_n1_BND: Tensor, rules: PlainRules) -> Tensor:
    """Residual branch and norm1's output to the block's input (B,N,D)."""
    g = rules.norm(block.layers.norm1, block.x_BND, g_n1_BND)
    g[:, : block.num_read] += g_middle_BQD
    return g


def to_first_block(record: ForwardRecord, g_BK: Tensor, rules: PlainRules) -> Tensor:
    """Logits to the first block's input (B,N,D), keeping nothing on the way."""
    g = through_head(record, g_BK, rules)
    for block in reversed(record.blocks):
        g_middle = through_mlp(block, g, rules)
        g_n1 = through_attention(block, to_mixed(block, g_middle), None, rules)
        g = to_block_input(block, g_middle, g_n1, rules)
    return g


def through_position(record: ForwardRecord, g_BND: Tensor, rules: PlainRules) -> Tensor:
    """The first block's input to the tokens before the position embedding is added (B,N,D)."""
    return rules.norm(record.layers.norm_pre, record.tokens_BND, g_BND)


def through_embedding(record: ForwardRecord, g_BND: Tensor, rules: PlainRules) -> Tensor:
    """The first block's input to the flattened patches (B,P,I)."""
    layers = record.layers
    g = through_position(record, g_BND, rules)[:, layers.num_prefix :]
    g = rules.norm(layers.embed_norm, record.projected_BPD, g)
    return rules.patch(layers.patch, record.patches(), record.projected_BPD, g)
