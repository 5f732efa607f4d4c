"""A timm Vision Transformer with drawn weights comes in; the same one with attention that starts out local goes out.

Mimetic initialisation (Trockman and Kolter, ICML 2023): transformers trained on much data have W_Q W_K^T near a
positive and W_V W_proj near a negative multiple of the identity. Starting there, with sinusoidal position embeddings,
lets a plain transformer learn from few images.

Shape letters: D width of the tokens, K width of a head, N tokens, H W rows and columns of the patch grid.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from xaibatch.errors import ModelError

QUERY_KEY = (0.7, 0.7)
"""Noise and identity in W_Q W_K^T."""
VALUE_PROJECTION = (0.4, -0.4)
"""Noise and identity in W_V W_proj."""
LONGEST_PERIOD = 10_000.0
"""Ratio of the longest to the shortest wave of the position embedding (Vaswani et al. 2017)."""


@torch.no_grad()
def start_mimetic(model: nn.Module, generator: torch.Generator) -> None:
    """Set attention weights and position embeddings in place; everything else stays as drawn.

    Raises ModelError for a model without timm's joint `qkv` layer in every block or with a token width that is not a
    multiple of four.
    """
    vit: Any = model
    position_1ND: Tensor | None = getattr(model, "pos_embed", None)
    if not hasattr(model, "blocks") or position_1ND is None or position_1ND.shape[2] % 4:
        raise ModelError("mimetic initialisation needs a plain timm Vision Transformer with position embeddings")
    for block in vit.blocks:
        if not isinstance(getattr(getattr(block, "attn", None), "qkv", None), nn.Linear):
            raise ModelError("mimetic initialisation needs the joint query-key-value layer of timm's attention")
        _set_attention(block.attn, generator)
    num_prefix = position_1ND.shape[1] - vit.patch_embed.num_patches
    position_1ND.zero_()
    rows, columns = vit.patch_embed.grid_size
    position_1ND[0, num_prefix:] = sinusoidal(rows, columns, position_1ND.shape[2])


def sinusoidal(rows: int, columns: int, width: int) -> Tensor:
    """Position embeddings (H*W, D): sines and cosines of the column in one half, of the row in the other (Dosovitskiy's
    grid order; He et al. 2022)."""
    quarter = width // 4
    frequencies = LONGEST_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row_N, column_N = (
        axis.flatten().double() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    )
    waves = [
        wave(position_N[:, None] * frequencies) for position_N in (column_N, row_N) for wave in (torch.sin, torch.cos)
    ]
    return torch.cat(waves, 1).float()


def _set_attention(attention: Any, generator: torch.Generator) -> None:
    weight, num_heads = attention.qkv.weight, attention.num_heads
    width, inner = weight.shape[1], weight.shape[0] // 3
    head = inner // num_heads
    for start in range(0, inner, head):
        query_DK, key_KD = _factors(_near_identity(width, QUERY_KEY, generator), head)
        weight[start : start + head] = query_DK.T
        weight[inner + start : inner + start + head] = key_KD
    value_DK, projection_KD = _factors(_near_identity(width, VALUE_PROJECTION, generator), inner)
    weight[2 * inner :] = value_DK.T
    attention.proj.weight.copy_(projection_KD.T)


def _near_identity(width: int, shares: tuple[float, float], generator: torch.Generator) -> Tensor:
    noise, identity = shares
    return noise / math.sqrt(width) * torch.randn(width, width, generator=generator) + identity * torch.eye(width)


def _factors(product_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors (D,K) and (K,D) of the best approximation of that rank."""
    left, values, right = torch.linalg.svd(product_DD)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
