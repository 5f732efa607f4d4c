"""Relevance rules of TransformerLRP: relevance at a layer's output in, at its inputs out, each image by itself.

Source: Chefer, Gur, Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021, and its published
code, with α = 1, β = 0. Every rule follows that code at batch size one, for every image of the batch: where the code
sums over a whole tensor (the Add rule), the sum here is per image.

Every division is the reference's guarded one: R / (z + 1e-9) where z is not zero, and 0 where it is (its
`clamp(min) + clamp(max)` is z + 1e-9 for either sign of z).

Shape letters: O I outputs and inputs of a layer; other dimensions are the images' (first) and tokens'.
"""

import torch
from torch import Tensor
from torch.nn import functional

from xaibatch.models.vit import Affine

GUARD = 1e-9
"""The reference's stabiliser of a division."""


def guarded_ratio(r: Tensor, z: Tensor) -> Tensor:
    """r / (z + GUARD), 0 where z is 0."""
    denominator = z + GUARD
    denominator.masked_fill_(denominator == 0, GUARD)
    denominator.masked_fill_(z == 0, torch.inf)
    return r / denominator


def linear_relevance(layer: Affine, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """α1β0 rule of a linear layer with input x, output y (bias included), relevance r at the output.

    With S = r / (x⁺W⁺ + x⁻W⁻), relevance at the input is x⁺(S W⁺) + x⁻(S W⁻). Computed as x (S' W) + |x| (S' |W|) with
    S' = r / (xW + |x||W|), which is equal (x⁺W⁺ + x⁻W⁻ = ½(xW + |x||W|)) and takes three products instead of eight.
    An output with no positive contribution passes nothing on.
    """
    absolute, magnitude = layer.weight_OI.abs(), x.abs()
    shift = torch.full_like(layer.weight_OI[:, 0], 2 * GUARD) if layer.bias_O is None else 2 * GUARD - layer.bias_O
    denominator = functional.linear(magnitude, absolute, shift).add_(y)
    s = r / torch.threshold_(denominator, 2 * GUARD, torch.inf)
    return (s @ layer.weight_OI).mul_(x).addcmul_(s @ absolute, magnitude)


def sum_relevance(x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Rule of a residual sum x + y: each summand's share of r.

    Rescaled so that the two totals split the image's whole relevance in proportion to their absolute totals.
    """
    s = guarded_ratio(r, x + y)
    a, b = x * s, y * s
    dims = tuple(range(1, r.dim()))
    total_a, total_b, total = (t.sum(dims, keepdim=True) for t in (a, b, r))
    weight = total_a.abs() + total_b.abs()
    for part, own in ((a, total_a), (b, total_b)):
        part.mul_(guarded_ratio(guarded_ratio(own.abs(), weight) * total, own))
    return a, b


def copy_relevance(x: Tensor, r: Tensor) -> Tensor:
    """Rule of a value used twice, r the sum of what came back: x · r/x with the guarded division (not quite r)."""
    return x * guarded_ratio(r, x)


def bounded_input_relevance(layer: Affine, patches_BPI: Tensor, r_BPO: Tensor) -> Tensor:
    """z^B rule of the patch projection (Montavon et al. 2017), bounds: the image's own lowest and highest value.

    With L, H the bounds: z = xW − L W⁺ − H W⁻ (+ 1e-9), relevance x (S W) − L (S W⁺) − H (S W⁻), S = r/z.
    Deviation: the reference does so for three channels only, and falls back to α1β0 for others; here always.
    """
    weight = layer.weight_OI
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    low = patches_BPI.amin((1, 2), keepdim=True)
    high = patches_BPI.amax((1, 2), keepdim=True)
    z = functional.linear(patches_BPI, weight) - low * positive.sum(1) - high * negative.sum(1) + GUARD
    s = r_BPO / z
    return patches_BPI * (s @ weight) - low * (s @ positive) - high * (s @ negative)
