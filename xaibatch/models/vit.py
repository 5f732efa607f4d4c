"""A model in, its plain timm Vision Transformer out, or a ModelError that names what is not supported.

"Plain" means that the layers below are all there is and that each computes what timm's own class computes, so that a
trace may replay them one by one. Anything else is refused by name: a wrong map is worse than none.

Shape letters: B images, N tokens, R class and register tokens, D width, A attention width (heads * head width), O I
outputs and inputs of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.layers
import timm.models.vision_transformer
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from xaibatch.errors import ModelError

SUPPORTED = (
    "timm VisionTransformer (or a wrapper with one as `.backbone`): class-token or average pooling, any patch and "
    "image size, register tokens, pre-norm, final norm or fc_norm, LayerNorm or RmsNorm, qk-norm, LayerScale, MLP, GLU "
    "or SwiGLU blocks with element-wise activations, linear head, no forward hooks"
)
_LAYERS: Any = timm.layers
_MODEL: Any = timm.models.vision_transformer
_MODEL_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
_NORMS = (_LAYERS.LayerNorm, _LAYERS.RmsNorm, nn.LayerNorm, nn.Identity)
_DROPS = (nn.Dropout, _LAYERS.DropPath, _LAYERS.PatchDropout, nn.Identity)
_ACTIVATIONS = (
    nn.GELU, nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Identity, _LAYERS.GELU, _LAYERS.GELUTanh, _LAYERS.QuickGELU,
    _LAYERS.Swish, _LAYERS.Mish, _LAYERS.Sigmoid, _LAYERS.Tanh,
)  # fmt: skip
"""What timm can be asked for by name, and torch's: each acts on every hidden unit by itself."""


@dataclass(frozen=True)
class Affine:
    """A linear layer as weight (O,I) and bias (O) or None: y = x Wᵀ + b."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight_OI, self.bias_O)

    def scaled(self, gamma_O: Tensor | None) -> "Affine":
        """The same layer followed by a product with gamma (LayerScale), as one layer."""
        if gamma_O is None:
            return self
        return Affine(self.weight_OI * gamma_O[:, None], None if self.bias_O is None else self.bias_O * gamma_O)


@dataclass(frozen=True, kw_only=True)
class BlockLayers:
    """The layers of one transformer block, LayerScale folded into the linear layer before it (the same function).

    to_qkv gives queries, keys and values side by side (B,N,3A). `mlp_in` gives the hidden layer before the activation;
    for `gated` blocks gate and value side by side, the gate first if `gate_first`, and hidden = act(gate) * value.
    """

    norm1: nn.Module
    to_qkv: Affine
    q_norm: nn.Module
    k_norm: nn.Module
    num_heads: int
    scale: float
    out: Affine
    norm2: nn.Module
    mlp_in: Affine
    act: Callable[[Tensor], Tensor]
    gated: bool
    gate_first: bool
    mlp_out: Affine

    def hidden(self, pre: Tensor) -> Tensor:
        """The input of mlp_out from the output of mlp_in."""
        if not self.gated:
            return self.act(pre)
        gate, value = self.halves(pre)
        return self.act(gate) * value

    def halves(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and value in the output of a gated block's mlp_in, views."""
        first, second = pre.chunk(2, dim=-1)
        return (first, second) if self.gate_first else (second, first)

    def join(self, gate: Tensor, value: Tensor) -> Tensor:
        """The inverse of `halves`."""
        return torch.cat((gate, value) if self.gate_first else (value, gate), dim=-1)


def plain_vit(model: nn.Module) -> VisionTransformer:
    """Return the VisionTransformer in `model` (itself, or its `.backbone`).

    Raises ModelError, naming the class or feature and what is supported, for everything a trace cannot replay: other
    architectures, subclasses that compute something else (distilled DeiT), attention or max pooling, parallel or
    post-norm blocks, gated or differential attention, norms inside attention or MLP, replaced forward methods, other
    layers in the places of dropout and activation, and layers with forward hooks, which a trace would not call.
    """
    vit = model if isinstance(model, VisionTransformer) else getattr(model, "backbone", None)
    if not isinstance(vit, VisionTransformer):
        inner = f" (its backbone is a {type(vit).__name__})" if isinstance(vit, nn.Module) else ""
        raise ModelError(f"{type(model).__name__}{inner} is not a plain Vision Transformer. Supported: {SUPPORTED}")
    for method in _MODEL_METHODS:
        if method in vit.__dict__ or getattr(type(vit), method) is not getattr(VisionTransformer, method):
            _refuse(vit, f"{type(vit).__name__} has its own {method}()")
    _check_hooks(vit, model)
    _check_ends(vit)
    for index, block in enumerate(vit.blocks):
        _check_block(vit, f"blocks.{index}", block)
    return vit


def block_layers(block: Any) -> BlockLayers:
    """The layers of one checked block; parameters are referred to (detached), copied only where they are folded."""
    attention, mlp = block.attn, block.mlp
    if isinstance(mlp, _LAYERS.SwiGLU):
        gate, value = _affine(mlp.fc1_g), _affine(mlp.fc1_x)
        bias = None if gate.bias_O is None or value.bias_O is None else torch.cat((gate.bias_O, value.bias_O))
        mlp_in = Affine(torch.cat((gate.weight_OI, value.weight_OI)), bias)
    else:
        mlp_in = _affine(mlp.fc1)
    return BlockLayers(
        norm1=block.norm1,
        to_qkv=_affine(attention.qkv),
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        num_heads=attention.num_heads,
        scale=float(attention.scale),
        out=_affine(attention.proj).scaled(_gamma(block.ls1)),
        norm2=block.norm2,
        mlp_in=mlp_in,
        act=_out_of_place(mlp.act),
        gated=not isinstance(mlp, _LAYERS.Mlp),
        gate_first=isinstance(mlp, _LAYERS.SwiGLU) or (isinstance(mlp, _LAYERS.GluMlp) and not mlp.gate_last),
        mlp_out=_affine(mlp.fc2).scaled(_gamma(block.ls2)),
    )


@dataclass(frozen=True, kw_only=True)
class VitLayers:
    """The layers of a whole model for images of one size, ready to be replayed.

    patch acts on flattened patches (channel, row, column); prefix_1RD holds class and register tokens; position_1ND is
    None or covers the patches only (`position_on_prefix` False) or the prefix too. The head reads token 0 if
    `class_pooling`, else the mean of the tokens from `pooled_from` on.
    """

    patch: Affine
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    embed_norm: nn.Module
    prefix_1RD: Tensor
    position_1ND: Tensor | None
    position_on_prefix: bool
    norm_pre: nn.Module
    blocks: tuple[BlockLayers, ...]
    norm: nn.Module
    class_pooling: bool
    pooled_from: int
    fc_norm: nn.Module
    head: Affine

    @property
    def num_prefix(self) -> int:
        """Class and register tokens before the first patch token."""
        return self.prefix_1RD.shape[1]


def vit_layers(vit: Any, image_size: tuple[int, int]) -> VitLayers:
    """The layers of a checked model for images of `image_size` (H,W); raises ModelError for a size it does not take."""
    embed = vit.patch_embed
    rows, columns = embed.patch_size
    grid = (image_size[0] // rows, image_size[1] // columns)
    if embed.strict_img_size and embed.img_size is not None and tuple(embed.img_size) != image_size:
        raise ModelError(
            f"the model takes images of {embed.img_size[0]}x{embed.img_size[1]} pixels, received {image_size}"
        )
    if not embed.strict_img_size and (image_size[0] % rows or image_size[1] % columns):
        raise ModelError(f"images of {image_size} pixels cannot be divided into patches of {rows}x{columns}")
    position = None if vit.pos_embed is None else vit.pos_embed.detach()
    if position is not None and vit.dynamic_img_size:
        num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        position = _LAYERS.resample_abs_pos_embed(position, grid, embed.grid_size, num_prefix_tokens=num_prefix)
    conv = _affine(embed.proj)
    prefix = [token.detach() for token in (vit.cls_token, vit.reg_token) if token is not None]
    return VitLayers(
        patch=Affine(conv.weight_OI.flatten(1), conv.bias_O),
        patch_size=(rows, columns),
        grid=grid,
        embed_norm=embed.norm,
        prefix_1RD=torch.cat(prefix, dim=1) if prefix else conv.weight_OI.new_zeros(1, 0, vit.embed_dim),
        position_1ND=position,
        position_on_prefix=not vit.no_embed_class,
        norm_pre=vit.norm_pre,
        blocks=tuple(map(block_layers, vit.blocks)),
        norm=vit.norm,
        class_pooling=vit.global_pool == "token",
        pooled_from=0 if vit.pool_include_prefix else vit.num_prefix_tokens,
        fc_norm=vit.fc_norm,
        head=_affine(vit.head),
    )


def _affine(layer: Any) -> Affine:
    weight, bias = layer.weight, layer.bias
    return Affine(weight.detach(), None if bias is None else bias.detach())


def _gamma(layer: Any) -> Tensor | None:
    return layer.gamma.detach() if isinstance(layer, _MODEL.LayerScale) else None


def _out_of_place(act: Any) -> Callable[[Tensor], Tensor]:
    """The activation; one that works in place would overwrite the input that the record keeps."""
    return (lambda t: act(t.clone())) if getattr(act, "inplace", False) else act


def _check_hooks(vit: VisionTransformer, model: nn.Module) -> None:
    """Refuse forward hooks, which may change what a layer gives: on the model's layers, and on the wrapper itself."""
    named = dict(vit.named_modules(prefix="" if model is vit else "backbone"))
    for name, module in ({"": model} | named).items():
        if module._forward_hooks or module._forward_pre_hooks:
            where = f"its layer {name}" if name else "it"
            _refuse(vit, f"a forward hook ({where}, a {type(module).__name__}, has one: remove it before the call)")


def _check_ends(vit: Any) -> None:
    """Patch embedding, pooling, norms and head."""
    if getattr(vit, "attn_pool", None) is not None:
        _refuse(vit, f"attention pooling (global_pool={vit.global_pool!r})")
    if vit.global_pool not in ("token", "avg"):
        _refuse(vit, f"global_pool={vit.global_pool!r}")
    if not len(vit.blocks):
        _refuse(vit, "a model without blocks")
    _require(vit, "head", vit.head, nn.Linear)
    _require(vit, "patch_embed", vit.patch_embed, _LAYERS.PatchEmbed)
    _require(vit, "patch_embed.proj", vit.patch_embed.proj, nn.Conv2d)
    conv = vit.patch_embed.proj
    if conv.kernel_size != conv.stride or conv.groups != 1 or any(conv.padding) or any(d != 1 for d in conv.dilation):
        _refuse(vit, f"a patch embedding whose patches overlap or are padded ({conv})")
    if vit.patch_embed.dynamic_img_pad:
        _refuse(vit, "dynamic_img_pad")
    for name, norm in (
        ("patch_embed.norm", vit.patch_embed.norm),
        ("norm_pre", vit.norm_pre),
        ("norm", vit.norm),
        ("fc_norm", vit.fc_norm),
    ):
        _require(vit, name, norm, *_NORMS)
    _require(vit, "blocks", vit.blocks, nn.Sequential)
    for name in ("pos_drop", "patch_drop", "head_drop"):
        _require(vit, name, vit.get_submodule(name), *_DROPS)


def _check_block(vit: Any, name: str, block: Any) -> None:
    _require(vit, name, block, Block)
    attention, mlp = block.attn, block.mlp
    _require(vit, f"{name}.attn", attention, _MODEL.Attention)
    _require(vit, f"{name}.mlp", mlp, _LAYERS.Mlp, _LAYERS.GluMlp, _LAYERS.SwiGLU)
    if getattr(attention, "gate", None) is not None:
        _refuse(vit, f"gated attention ({name}.attn.gate)")
    if attention.scale != attention.head_dim**-0.5:
        _refuse(vit, f"another scale of the dot products than 1/sqrt(head width) ({name}.attn.scale)")
    for part, layer in (("attn.norm", getattr(attention, "norm", None)), ("mlp.norm", mlp.norm)):
        if layer is not None and type(layer) is not nn.Identity:
            _refuse(vit, f"a norm inside attention or MLP ({name}.{part})")
    _require(vit, f"{name}.mlp.act", mlp.act, *_ACTIVATIONS)
    for part in ("drop_path1", "drop_path2", "attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"):
        _require(vit, f"{name}.{part}", block.get_submodule(part), *_DROPS)
    for part in ("norm1", "norm2", "attn.q_norm", "attn.k_norm"):
        _require(vit, f"{name}.{part}", block.get_submodule(part), *_NORMS)
    for part in ("ls1", "ls2"):
        _require(vit, f"{name}.{part}", block.get_submodule(part), _MODEL.LayerScale, nn.Identity)
    linears = [
        "attn.qkv",
        "attn.proj",
        "mlp.fc2",
        *(("mlp.fc1_g", "mlp.fc1_x") if isinstance(mlp, _LAYERS.SwiGLU) else ("mlp.fc1",)),
    ]
    for part in linears:
        _require(vit, f"{name}.{part}", block.get_submodule(part), nn.Linear)


def _require(vit: VisionTransformer, name: str, layer: object, *allowed: type[nn.Module]) -> None:
    """Refuse a layer that is none of `allowed`, or whose forward is not that class's own (subclassed or replaced)."""
    for cls in allowed:
        if isinstance(layer, cls) and type(layer).forward is cls.forward and "forward" not in layer.__dict__:
            return
    names = ", ".join(sorted({cls.__name__ for cls in allowed}))
    changed = isinstance(layer, allowed)
    what = f"{name} = {type(layer).__name__}" + (" with a replaced forward()" if changed else "")
    _refuse(vit, f"{what} (known there: {names})")


def _refuse(vit: VisionTransformer, feature: str) -> None:
    raise ModelError(f"{type(vit).__name__}: {feature} is not supported. Supported: {SUPPORTED}")
