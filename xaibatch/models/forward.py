"""Layers of a plain ViT and a few images in; every activation that explainers read out, without a graph.

What the head does not read is not computed: under class-token pooling the last block makes only that token's row.

Shape letters: B images, C channels, H W pixels, P patches, N tokens, Q tokens whose output is read (N, or 1 in such a
last block), R prefix tokens, D width, A attention width, h heads, d head width, F hidden width, K classes, I values of
a patch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xaibatch.models.vit import BlockLayers, VitLayers


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRecord:
    """What one block computed.

    x_BND block input; n1_BND after norm1; qkv_BNA the three projections side by side (width 3A); q_BhNd, k_BhNd after
    qk-norm, v_BhNd; attention_BhQN after softmax; mixed_BQA attention times v, heads side by side; a_BQD
    attention branch; n2_BQD after norm2; pre_BQF before the activation; f_BQD MLP branch. The hidden layer, the largest
    and cheap to make from pre_BQF, is not kept.
    """

    layers: BlockLayers
    x_BND: Tensor
    n1_BND: Tensor
    qkv_BNA: Tensor
    q_BhNd: Tensor
    k_BhNd: Tensor
    v_BhNd: Tensor
    attention_BhQN: Tensor
    mixed_BQA: Tensor
    a_BQD: Tensor
    n2_BQD: Tensor
    pre_BQF: Tensor
    f_BQD: Tensor

    @property
    def num_read(self) -> int:
        """Q: what follows reads the first Q tokens of the block's output."""
        return self.a_BQD.shape[1]

    @property
    def middle(self) -> Tensor:
        """The residual stream between attention and MLP (computed anew: one sum)."""
        return self.x_BND[:, : self.num_read] + self.a_BQD

    def hidden(self) -> Tensor:
        """The input of mlp_out (B,Q,F), computed anew: one activation."""
        return self.layers.hidden(self.pre_BQF)

    def full_attention(self) -> Tensor:
        """Attention with a row for every token; the rows a last block left out are computed here."""
        if self.num_read == self.x_BND.shape[1]:
            return self.attention_BhQN
        return attention(self.q_BhNd, self.k_BhNd, self.layers.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardRecord:
    """What the model computed for a few images.

    projected_BPD after the patch projection; embedded_BPD after its norm; tokens_BND with prefix and position; then
    the blocks; out_BQD last block's output; final_BQD after the final norm; pooled_BD;
    features_BD the head's input; logits_BK.
    """

    layers: VitLayers
    images_BCHW: Tensor
    projected_BPD: Tensor
    embedded_BPD: Tensor
    tokens_BND: Tensor
    blocks: tuple[BlockRecord, ...]
    out_BQD: Tensor
    final_BQD: Tensor
    pooled_BD: Tensor
    features_BD: Tensor
    logits_BK: Tensor

    def patches(self) -> Tensor:
        """The images as flattened patches (B,P,I)."""
        return to_patches(self.images_BCHW, self.layers)


def forward(layers: VitLayers, images_BCHW: Tensor) -> ForwardRecord:
    """Replay the model on the images, dropout and stochastic depth off; equal to the model's own output to rounding."""
    projected = layers.patch(to_patches(images_BCHW, layers))
    embedded = layers.embed_norm(projected)
    tokens = _with_prefix_and_position(layers, embedded)
    x = layers.norm_pre(tokens)
    records = []
    for index, block in enumerate(layers.blocks):
        reads_one_token = layers.class_pooling and index == len(layers.blocks) - 1
        record = _block(block, x, 1 if reads_one_token else x.shape[1])
        records.append(record)
        x = record.middle + record.f_BQD
    final = layers.norm(x)
    pooled = final[:, 0] if layers.class_pooling else final[:, layers.pooled_from :].mean(1)
    features = layers.fc_norm(pooled)
    return ForwardRecord(
        layers=layers,
        images_BCHW=images_BCHW,
        projected_BPD=projected,
        embedded_BPD=embedded,
        tokens_BND=tokens,
        blocks=tuple(records),
        out_BQD=x,
        final_BQD=final,
        pooled_BD=pooled,
        features_BD=features,
        logits_BK=layers.head(features),
    )


def heads(x_BNA: Tensor, num_heads: int) -> Tensor:
    """(B,N,A) as (B,h,N,d), a view."""
    return x_BNA.reshape(*x_BNA.shape[:2], num_heads, -1).transpose(1, 2)


def side_by_side(x_BhNd: Tensor) -> Tensor:
    """(B,h,N,d) as (B,N,A)."""
    return x_BhNd.transpose(1, 2).flatten(2)


def split_heads(qkv_BNA: Tensor, num_heads: int) -> Tensor:
    """(B,N,3A) as queries, keys and values (3,B,h,N,d), a view."""
    return qkv_BNA.view(*qkv_BNA.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)


def attention(q_BhQd: Tensor, k_BhNd: Tensor, scale: float) -> Tensor:
    """Softmax of scaled dot products, (B,h,Q,N)."""
    return ((q_BhQd * scale) @ k_BhNd.transpose(-1, -2)).softmax(-1)


def to_patches(images_BCHW: Tensor, layers: VitLayers) -> Tensor:
    """(B,C,H,W) as (B,P,C*p*p); pixels beyond the last whole patch are dropped, as the convolution does."""
    (rows, columns), (p, q) = layers.grid, layers.patch_size
    batch, channels = images_BCHW.shape[:2]
    cut = images_BCHW[:, :, : rows * p, : columns * q].reshape(batch, channels, rows, p, columns, q)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * p * q)


def from_patches(patches_BPI: Tensor, layers: VitLayers, like_BCHW: Tensor) -> Tensor:
    """The inverse of `to_patches`; zero where pixels were dropped."""
    (rows, columns), (p, q) = layers.grid, layers.patch_size
    batch, channels = like_BCHW.shape[:2]
    pixels = patches_BPI.reshape(batch, rows, columns, channels, p, q).permute(0, 3, 1, 4, 2, 5)
    images = torch.zeros_like(like_BCHW)
    images[:, :, : rows * p, : columns * q] = pixels.reshape(batch, channels, rows * p, columns * q)
    return images


def _with_prefix_and_position(layers: VitLayers, embedded_BPD: Tensor) -> Tensor:
    prefix = layers.prefix_1RD.expand(len(embedded_BPD), -1, -1)
    position = layers.position_1ND
    if position is None:
        return torch.cat((prefix, embedded_BPD), dim=1)
    if layers.position_on_prefix:
        return torch.cat((prefix, embedded_BPD), dim=1) + position
    return torch.cat((prefix, embedded_BPD + position), dim=1)


def _block(layers: BlockLayers, x_BND: Tensor, num_read: int) -> BlockRecord:
    n1 = layers.norm1(x_BND)
    qkv = layers.to_qkv(n1)
    q_raw, k_raw, v = split_heads(qkv, layers.num_heads)
    q, k = layers.q_norm(q_raw), layers.k_norm(k_raw)
    weights = attention(q[:, :, :num_read], k, layers.scale)
    mixed = side_by_side(weights @ v)
    a = layers.out(mixed)
    n2 = layers.norm2(x_BND[:, :num_read] + a)
    pre = layers.mlp_in(n2)
    return BlockRecord(
        layers=layers,
        x_BND=x_BND,
        n1_BND=n1,
        qkv_BNA=qkv,
        q_BhNd=q,
        k_BhNd=k,
        v_BhNd=v,
        attention_BhQN=weights,
        mixed_BQA=mixed,
        a_BQD=a,
        n2_BQD=n2,
        pre_BQF=pre,
        f_BQD=layers.mlp_out(layers.hidden(pre)),
    )
