"""Attention rollout: a trace in, one weight per patch token out.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020: attention is fused over heads, mixed
with the identity for the residual path, A' = (A + I)/2, its rows normalised, and multiplied from the first block to the
last; the map is the class token's row of the product. Fusing by minimum or maximum and discarding the lowest weights
are later practice.

Only the row that is read is multiplied, from the last block down. Average pooling reads the mean of the pooled tokens'
rows (our extension: the method is described for a class token).

Shape letters: B images, N tokens, h heads, g v grid.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput
from xaibatch.models.trace import Part
from xaibatch.options import Options

Fusion = Literal["mean", "min", "max"]


class RolloutOptions(Options):
    """How much is discarded and how rows are normalised."""

    discard_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the entries of each block's fused attention that is set to zero, the lowest first; the entry from class
    token to class token is kept. The study: 0 for mean and min, 0.99 for max."""

    normalisation: Literal["rows", "study"] = "rows"
    """`rows`: every row of A' is divided by its own sum. `study`: column j is divided by the sum of row j, which is
    what the study's code does (it divides by `a.sum(-1)` without `keepdim`); equal only where rows sum to one."""


class AttentionRollout(Explainer):
    """Rollout with one way of fusing heads; non-negative, (B,g,v)."""

    paper = "Abnar, Zuidema: Quantifying Attention Flow in Transformers, ACL 2020"
    signed = False
    granularity = "token"
    needs = "vit"
    Options = RolloutOptions
    options: RolloutOptions
    fusion: ClassVar[Fusion]

    def explain(self, inputs: ExplainInput) -> Attribution:
        return Attribution(maps_Bhw=inputs.trace.map(self.rollout))

    def rollout(self, part: Part) -> Tensor:
        """The map of a trace's part, (B,g,v)."""
        row = part.start_row()
        for attention in reversed(part.full_attentions):
            fused = discard_lowest(fuse_heads(attention, self.fusion), self.options.discard_ratio)
            mixed = (fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)) / 2
            sums = mixed.sum(-1)[:, None]
            row = (row / sums) @ mixed if self.options.normalisation == "rows" else (row @ mixed) / sums
        return part.on_grid(row[:, 0, part.layers.num_prefix :])


@EXPLAINERS.register("attention_rollout")
@EXPLAINERS.register("attention_rollout_mean")
class AttentionRolloutMean(AttentionRollout):
    """Heads fused by their mean, as published."""

    name = "attention_rollout_mean"
    title = "Attention rollout (mean)"
    fusion = "mean"


@EXPLAINERS.register("attention_rollout_min")
class AttentionRolloutMin(AttentionRollout):
    """Heads fused by their minimum."""

    name = "attention_rollout_min"
    title = "Attention rollout (min)"
    fusion = "min"


@EXPLAINERS.register("attention_rollout_max")
class AttentionRolloutMax(AttentionRollout):
    """Heads fused by their maximum."""

    name = "attention_rollout_max"
    title = "Attention rollout (max)"
    fusion = "max"


def fuse_heads(attention_BhNN: Tensor, fusion: Fusion) -> Tensor:
    """Mean, minimum or maximum over heads, (B,N,N)."""
    if fusion == "mean":
        return attention_BhNN.mean(1)
    return attention_BhNN.amin(1) if fusion == "min" else attention_BhNN.amax(1)


def discard_lowest(fused_BNN: Tensor, ratio: float) -> Tensor:
    """Set the int(N·N·ratio) lowest entries of each image to zero, the first entry (class to class token) excepted."""
    flat = fused_BNN.flatten(1)
    num_discarded = int(flat.shape[1] * ratio)
    if not num_discarded:
        return fused_BNN
    num_kept = flat.shape[1] - num_discarded
    if num_kept < num_discarded:  # the smaller selection is the faster one; equal but for ties
        keep = flat.topk(num_kept, dim=1, sorted=False).indices
        thinned = torch.zeros_like(flat).scatter_(1, keep, flat.gather(1, keep))
    else:
        thinned = flat.scatter(1, flat.topk(num_discarded, dim=1, largest=False, sorted=False).indices, 0.0)
    thinned[:, 0] = flat[:, 0]
    return thinned.view_as(fused_BNN)
