"""TransformerLRP: a trace in, positive relevance of the explained class per token (or pixel) out.

Chefer, Gur, Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021: relevance is propagated
from the explained logit to every attention map (section 3.1), weighted by the map's gradient, averaged over heads where
positive, and multiplied up through the blocks with the identity added (eq. 13-14).

Deviations from the published code, which is right at batch size one only: all sums are per image; the residual rule's
totals include no other image. Where the head reads only the class token, rows that can carry no relevance are not
computed. Extensions, named as ours because the paper has no such models: average pooling starts from the pooled tokens
(the code's own rule for pooling layers, and the mean of their rollout rows); LayerScale is folded into the linear layer
before it; norms of queries and keys pass relevance on unchanged, as the paper's LayerNorm; a gated product gives each
factor half, as the code does for the two factors of a matrix product (also Achtibat et al. 2024, the uniform rule).

Shape letters: B images, N tokens, Q read tokens, P patches, D width, h heads, d head width, g v grid, H W pixels.
"""

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from xaibatch.errors import ModelError
from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput, Granularity
from xaibatch.explainers.relevance import (
    bounded_input_relevance,
    copy_relevance,
    guarded_ratio,
    linear_relevance,
    sum_relevance,
)
from xaibatch.models.backward import one_hot
from xaibatch.models.forward import BlockRecord, heads, split_heads
from xaibatch.models.trace import Part, record
from xaibatch.models.vit import plain_vit
from xaibatch.options import Options

Method = Literal[
    "transformer_attribution",
    "grad",
    "rollout",
    "full",
    "last_layer",
    "last_layer_ablation",
    "last_layer_attn",
    "second_layer",
    "second_layer_ablation",
]


class TransformerLRPOptions(Options):
    """Which of the reference's maps to return."""

    method: Method = "transformer_attribution"
    """`transformer_attribution` (alias `grad`): gradient-weighted relevance, multiplied through the blocks. `rollout`:
    the same without gradients. `full`: relevance of the pixels, signed. `last_layer`, `second_layer`: attention
    relevance of one block, `…_ablation` weighted by its gradient; `last_layer_attn`: the last block's attention."""

    start_layer: int = 0
    """First block of the product, for `transformer_attribution` and `rollout`."""

    precision: Literal["model", "float64"] = "model"
    """Arithmetic: the model's own, or float64 on a copy of it (about twice the time and memory on a CPU). The rules
    divide by sums and dot products that may be next to zero: in float32 single images can be off by any amount."""


@EXPLAINERS.register("transformer_lrp")
class TransformerLRP(Explainer):
    """Relevance of the explained class per token, (B,g,v); for `full` per pixel, (B,H,W)."""

    name = "transformer_lrp"
    title = "TransformerLRP"
    paper = "Chefer, Gur, Wolf: Transformer Interpretability Beyond Attention Visualization, CVPR 2021"
    signed = False
    granularity: Granularity = "token"
    needs = "vit"
    Options = TransformerLRPOptions
    options: TransformerLRPOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.method == "full":
            self.signed, self.granularity = True, "pixel"

    def explain(self, inputs: ExplainInput) -> Attribution:
        if self.options.precision == "model" or inputs.images_BCHW.dtype == torch.float64:
            return Attribution(maps_Bhw=inputs.trace.map(self.relevance))
        exact = copy.deepcopy(plain_vit(inputs.model)).double()
        return Attribution(maps_Bhw=record(exact, inputs.images_BCHW.double(), inputs.targets_B).map(self.relevance))

    def cost(self) -> str:
        return "1 forward + 1 backward + 1 relevance pass"

    def relevance(self, part: Part) -> Tensor:
        """The map of a trace's part, (B,g,v) or (B,H,W)."""
        method, last = self.options.method, len(part.blocks) - 1
        if method == "full":
            return pixel_relevance(part)
        if method == "last_layer_attn":
            return _token_map(part, part.read_rows(part.blocks[-1].attention_BhQN.mean(1)))
        weighted = method in ("transformer_attribution", "grad") or method.endswith("_ablation")
        if method.startswith(("last_layer", "second_layer")):
            lowest = last if method.startswith("last_layer") else 1
            _check_block(lowest, last, f"method {method!r}")
            *_, relevance = attention_relevance(part, lowest)
            return _token_map(part, part.read_rows(_head_mean(part, lowest, relevance, weighted)))
        lowest = self.options.start_layer
        _check_block(lowest, last, "start_layer")
        row = part.start_row()
        for index, relevance in zip(range(last, -1, -1), attention_relevance(part, lowest), strict=False):
            layer = _head_mean(part, index, relevance, weighted)
            row = row + row[:, :, : layer.shape[1]] @ layer
        return _token_map(part, row[:, 0])


def attention_relevance(part: Part, lowest: int = 0) -> Iterator[Tensor]:
    """Relevance at the attention weights (B,h,Q,N) of the blocks from the last down to `lowest`."""
    r = _output_relevance(part)
    for index in range(len(part.blocks) - 1, lowest - 1, -1):
        block = part.blocks[index]
        r_stream, s_mixed, r_weights = _to_attention(block, r)
        yield r_weights
        if index > lowest:
            r = _to_input(block, r_stream, s_mixed, r_weights)


def pixel_relevance(part: Part) -> Tensor:
    """Relevance of the pixels, summed over channels, (B,H,W); signed."""
    r = _output_relevance(part)
    for block in reversed(part.blocks):
        r = _to_input(block, *_to_attention(block, r))
    layers, embedded = part.layers, part.record.embedded_BPD
    num_prefix, position = layers.num_prefix, layers.position_1ND
    if position is not None and layers.position_on_prefix:
        tokens = torch.cat((layers.prefix_1RD.expand(len(r), -1, -1), embedded), dim=1)
        r = sum_relevance(tokens, position, r)[0][:, num_prefix:]
    elif position is not None:
        r = sum_relevance(embedded, position, r[:, num_prefix:])[0]
    else:
        r = r[:, num_prefix:]
    return part.from_patches(bounded_input_relevance(layers.patch, part.record.patches(), r)).sum(1)


def _output_relevance(part: Part) -> Tensor:
    """Relevance at the last block's output (B,Q,D): through the head and the pooling; norms pass it on unchanged."""
    record, layers = part.record, part.layers
    r = linear_relevance(layers.head, record.features_BD, record.logits_BK, one_hot(part.targets_B, record))
    r_final = torch.zeros_like(record.final_BQD)
    if layers.class_pooling:
        r_final[:, 0] = copy_relevance(record.final_BQD[:, 0], r)
    else:
        pooled = record.final_BQD[:, layers.pooled_from :]
        r_final[:, layers.pooled_from :] = pooled / pooled.shape[1] * guarded_ratio(r, record.pooled_BD)[:, None]
    return r_final


def _to_attention(block: BlockRecord, r_BQD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block's output to its attention weights.

    Returns relevance of the residual stream before attention (B,Q,D); half the ratio of relevance and value at the
    heads' outputs (B,h,Q,d), a half being what the code gives to either factor of a product; relevance of the weights.
    """
    layers, middle = block.layers, block.middle
    r_stream, r = sum_relevance(middle, block.f_BQD, r_BQD)
    hidden = block.hidden()
    r = linear_relevance(layers.mlp_out, hidden, block.f_BQD, r)
    if layers.gated:
        half = copy_relevance(hidden, r).mul_(0.5)
        r = layers.join(half, half)
    r = linear_relevance(layers.mlp_in, block.n2_BQD, block.pre_BQF, r)
    r = copy_relevance(middle, r.add_(r_stream))
    r_stream, r = sum_relevance(block.x_BND[:, : block.num_read], block.a_BQD, r)
    r = linear_relevance(layers.out, block.mixed_BQA, block.a_BQD, r)
    s_mixed = heads(guarded_ratio(r, block.mixed_BQA).mul_(0.5), layers.num_heads).contiguous()
    return r_stream, s_mixed, (s_mixed @ block.v_BhNd.transpose(-1, -2)).mul_(block.attention_BhQN)


def _to_input(block: BlockRecord, r_stream_BQD: Tensor, s_mixed_BhQd: Tensor, r_weights_BhQN: Tensor) -> Tensor:
    """On to the block's input (B,N,D): through values, and through queries and keys by the unscaled dot products."""
    layers, read = block.layers, slice(block.num_read)
    r_qkv = torch.zeros_like(block.qkv_BNA)
    to_q, to_k, to_v = split_heads(r_qkv, layers.num_heads)
    q, half_k = block.q_BhNd[:, :, read], block.k_BhNd * 0.5
    s = guarded_ratio(r_weights_BhQN, q @ block.k_BhNd.transpose(-1, -2))
    torch.mul(s @ half_k, q, out=to_q[:, :, read])
    torch.mul(s.transpose(-1, -2) @ q, half_k, out=to_k)
    torch.mul(block.attention_BhQN.transpose(-1, -2) @ s_mixed_BhQd, block.v_BhNd, out=to_v)
    r = linear_relevance(layers.to_qkv, block.n1_BND, block.qkv_BNA, r_qkv)
    r[:, read] += r_stream_BQD
    return copy_relevance(block.x_BND, r)


def _head_mean(part: Part, index: int, relevance_BhQN: Tensor, weighted: bool) -> Tensor:
    """Mean over heads of the positive relevance, times the attention's gradient if `weighted`, (B,Q,N)."""
    if weighted:
        return (relevance_BhQN * part.attention_gradients[index]).clamp_(min=0).mean(1)
    return relevance_BhQN.clamp(min=0).mean(1)


def _token_map(part: Part, row_BN: Tensor) -> Tensor:
    return part.on_grid(row_BN[:, part.layers.num_prefix :])


def _check_block(index: int, last: int, what: str) -> None:
    if not 0 <= index <= last:
        raise ModelError(f"transformer_lrp: {what} needs block {index}, the model has blocks 0 to {last}")
