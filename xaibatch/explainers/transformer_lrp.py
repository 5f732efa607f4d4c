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

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from xaibatch.errors import ModelError
from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput
from xaibatch.explainers.relevance import (
    bounded_input_relevance,
    copy_relevance,
    guarded_ratio,
    linear_relevance,
    sum_relevance,
)
from xaibatch.models.backward import one_hot
from xaibatch.models.forward import BlockRecord, heads, side_by_side
from xaibatch.models.trace import Part
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


@EXPLAINERS.register("transformer_lrp")
class TransformerLRP(Explainer):
    """Relevance of the explained class per token, (B,g,v); for `full` per pixel, (B,H,W)."""

    name = "transformer_lrp"
    title = "TransformerLRP"
    paper = "Chefer, Gur, Wolf: Transformer Interpretability Beyond Attention Visualization, CVPR 2021"
    signed = False
    granularity = "token"
    needs = "vit"
    Options = TransformerLRPOptions
    options: TransformerLRPOptions

    def explain(self, inputs: ExplainInput) -> Attribution:
        return Attribution(maps_Bhw=inputs.trace.map(self.relevance))

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
        r_stream, r_mixed = _to_mixed(block, r)
        s = guarded_ratio(r_mixed, heads(block.mixed_BQA, block.layers.num_heads))
        r_weights = (s @ block.v_BhNd.transpose(-1, -2)).mul_(block.attention_BhQN).mul_(0.5)
        yield r_weights
        if index > lowest:
            r = _to_input(block, r_stream, s, r_weights)


def pixel_relevance(part: Part) -> Tensor:
    """Relevance of the pixels, summed over channels, (B,H,W); signed."""
    r = _output_relevance(part)
    for block in reversed(part.blocks):
        r_stream, r_mixed = _to_mixed(block, r)
        s = guarded_ratio(r_mixed, heads(block.mixed_BQA, block.layers.num_heads))
        r_weights = (s @ block.v_BhNd.transpose(-1, -2)).mul_(block.attention_BhQN).mul_(0.5)
        r = _to_input(block, r_stream, s, r_weights)
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


def _to_mixed(block: BlockRecord, r_BQD: Tensor) -> tuple[Tensor, Tensor]:
    """A block's output to the residual stream before attention (B,Q,D) and the heads' outputs (B,h,Q,d)."""
    layers, middle = block.layers, block.middle
    r_stream, r = sum_relevance(middle, block.f_BQD, r_BQD)
    r = linear_relevance(layers.mlp_out, block.hidden_BQF, block.f_BQD, r)
    if layers.gated:
        s = guarded_ratio(r, block.hidden_BQF).mul_(block.hidden_BQF).mul_(0.5)
        r = layers.join(s, s)
    r = linear_relevance(layers.mlp_in, block.n2_BQD, block.pre_BQF, r)
    r = copy_relevance(middle, r_stream + r)
    r_stream, r = sum_relevance(block.x_BND[:, : block.num_read], block.a_BQD, r)
    return r_stream, heads(linear_relevance(layers.out, block.mixed_BQA, block.a_BQD, r), layers.num_heads)


def _to_input(block: BlockRecord, r_stream_BQD: Tensor, s_BhQd: Tensor, r_weights_BhQN: Tensor) -> Tensor:
    """On to the block's input (B,N,D): values, then queries and keys through the unscaled dot products."""
    layers = block.layers
    r_v = (block.attention_BhQN.transpose(-1, -2) @ s_BhQd).mul_(block.v_BhNd).mul_(0.5)
    s = guarded_ratio(r_weights_BhQN, block.q_BhQd @ block.k_BhNd.transpose(-1, -2)).mul_(0.5)
    r_q = (s @ block.k_BhNd).mul_(block.q_BhQd)
    r_k = (s.transpose(-1, -2) @ block.q_BhQd).mul_(block.k_BhNd)
    r_kv = torch.cat((side_by_side(r_k), side_by_side(r_v)), dim=-1)
    r = linear_relevance(layers.to_kv, block.n1_BND, block.kv_raw_BNA, r_kv)
    read = slice(block.num_read)
    r[:, read] += linear_relevance(layers.to_q, block.n1_BND[:, read], block.q_raw_BQA, side_by_side(r_q))
    r[:, read] += r_stream_BQD
    return copy_relevance(block.x_BND, r)


def _head_mean(part: Part, index: int, relevance_BhQN: Tensor, weighted: bool) -> Tensor:
    """Mean over heads of the positive relevance, times the attention's gradient if `weighted`, (B,Q,N)."""
    if weighted:
        relevance_BhQN = relevance_BhQN * part.attention_gradients[index]
    return relevance_BhQN.clamp(min=0).mean(1)


def _token_map(part: Part, row_BN: Tensor) -> Tensor:
    return part.on_grid(row_BN[:, part.layers.num_prefix :])


def _check_block(index: int, last: int, what: str) -> None:
    if not 0 <= index <= last:
        raise ModelError(f"transformer_lrp: {what} needs block {index}, the model has blocks 0 to {last}")
