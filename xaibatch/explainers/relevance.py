"""Relevance rules of TransformerLRP: relevance at a layer's output in, at its inputs out, each image by itself.

Source: Chefer, Gur, Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021, and its published
code, with α = 1, β = 0. Every rule follows that code at batch size one, for every image of the batch: where the code
sums over a whole tensor (the Add rule), the sum here is per image.

Every division is the reference's guarded one: R / (z + 1e-9) where z is not zero, and 0 where it is (its
`clamp(min) + clamp(max)` is z + 1e-9 for either sign of z).

Shape letters: B images, P patches, O I outputs and inputs of a layer; N images and tokens together; x, y, r without
suffix are (B,tokens,width) or, at the head, (B,width).
"""

import torch
from torch import Tensor
from torch.nn import functional

from xaibatch.models.vit import Affine

GUARD = 1e-9
"""The reference's stabiliser of a division."""


def guarded_ratio(r: Tensor, z: Tensor) -> Tensor:
    """r / (z + GUARD), 0 where z is 0; not finite where z is exactly -GUARD (the reference divides by GUARD there)."""
    is_nonzero = torch.ne(z, 0, out=torch.empty_like(z))  # as 0.0 and 1.0: several times faster than a boolean mask
    denominator = z + GUARD
    return torch.div(r, denominator, out=denominator).mul_(is_nonzero)


def linear_relevance(layer: Affine, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """α1β0 rule of a linear layer with input x, output y (bias included), relevance r at the output.

    With S = r / (x⁺W⁺ + x⁻W⁻), relevance at the input is x⁺(S W⁺) + x⁻(S W⁻). Computed as x (S' W) + |x| (S' |W|) with
    S' = r / (xW + |x||W|), which is equal (x⁺W⁺ + x⁻W⁻ = ½(xW + |x||W|)) and takes three products instead of eight.
    An output with no positive contribution passes nothing on.
    """
    x_NI, y_NO, r_NO = (t.flatten(0, -2) for t in (x, y, r))
    absolute, magnitude = layer.weight_OI.abs(), x_NI.abs()
    shift = 2 * GUARD if layer.bias_O is None else 2 * GUARD - layer.bias_O
    denominator = (y_NO + shift).addmm_(magnitude, absolute.t())
    s = torch.div(r_NO, torch.threshold_(denominator, 2 * GUARD, torch.inf), out=denominator)
    return torch.mm(s, layer.weight_OI).mul_(x_NI).addcmul_(torch.mm(s, absolute), magnitude).view_as(x)


def sum_relevance(x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Rule of a residual sum x + y, (B,tokens,width): each summand's share of r.

    Rescaled so that the two totals split the image's whole relevance in proportion to their absolute totals. (A share
    whose total is zero has a zero numerator, so these guarded divisions need no mask.)
    """
    s = guarded_ratio(r, x + y)
    a, b = x * s, s.mul_(y)
    totals_2B11 = torch.stack([t.sum((1, 2), keepdim=True) for t in (a, b)])
    sizes_2B11 = totals_2B11.abs()
    factors = sizes_2B11 / (sizes_2B11.sum(0) + GUARD) * r.sum((1, 2), keepdim=True) / (totals_2B11 + GUARD)
    return a.mul_(factors[0]), b.mul_(factors[1])


def copy_relevance(x: Tensor, r: Tensor) -> Tensor:
    """Rule of a value used twice, r the sum of what came back: x · r / (x + GUARD), which is not quite r."""
    return (r * x).div_(x + GUARD)


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
