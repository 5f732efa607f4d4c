"""Small ViTs of every supported kind, and slow rewrites in float64 of what the trace explainers compute, for the tests.

One image at a time, every token and every matrix in full, hooks on timm's own forward and autograd for every transposed
product: nothing here shares a line or a shortcut with the package.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "registers_with_position": {"reg_tokens": 1},
    "average": {"global_pool": "avg"},
    "average_without_class": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "average_with_prefix": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 1},
    "layer_scale": {"init_values": 0.1},
    "qk_norm": {"qk_norm": True},
    "rms_norm": {"norm_layer": RmsNorm, "qk_norm": True},
    "swiglu": {"mlp_layer": SwiGLU},
    "swiglu_packed": {"mlp_layer": SwiGLUPacked, "init_values": 0.1, "reg_tokens": 1, "global_pool": "avg"},
    "glu_gate_last": {"mlp_layer": partial(GluMlp, gate_last=True)},
    "pre_norm": {"pre_norm": True, "final_norm": False, "qkv_bias": False},
    "no_position": {"pos_embed": "none", "act_layer": "silu", "proj_bias": False},
    "embed_norm": {"embed_norm_layer": "layernorm", "act_layer": "relu"},
    "dynamic_grey": {"dynamic_img_size": True, "in_chans": 1, "patch_size": (8, 4), "act_layer": "gelu_tanh"},
    "one_block": {"depth": 1},
}


def make_vit(variant: str, seed: int = 0) -> VisionTransformer:
    """A ViT of 24×40 pixels with random weights, none of them trivially zero or one; float64, eval mode."""
    options = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 4}
    model = VisionTransformer(**{**options, **VARIANTS[variant]}).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm_pre.weight", "gamma"))
        parameter.data = 1 + 0.3 * noise if is_scale else noise * (0.15 if parameter.dim() == 2 else 0.4)
        if name.endswith("gamma"):
            parameter.data = 0.5 * noise
    return model


def images_for(model: VisionTransformer, count: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random images (32×40 for a model of dynamic size) and targets."""
    generator = torch.Generator().manual_seed(seed)
    height = 32 if model.dynamic_img_size else 24
    images = torch.randn(count, model.in_chans, height, 40, generator=generator, dtype=torch.float64)
    return images, torch.randint(model.num_classes, (count,), generator=generator)


@contextmanager
def watched(model: VisionTransformer) -> Iterator[tuple[VisionTransformer, dict[str, Tensor], dict[str, Tensor]]]:
    """A copy that computes its attention openly; inputs and outputs of its modules by name during a forward."""
    twin = copy.deepcopy(model)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            inputs[name], outputs[name] = args[0], output

    for name, module in twin.named_modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        module.register_forward_hook(partial(hook, name))
    yield twin, inputs, outputs


def attentions_and_gradients(model: VisionTransformer, image: Tensor, target: int) -> tuple[list[Tensor], list[Tensor]]:
    """Attention of every block (h,N,N) and the target logit's gradient there, by autograd."""
    with watched(model) as (twin, _, outputs):
        logit = twin(image)[0, target]
        maps = [outputs[f"blocks.{i}.attn.attn_drop"] for i in range(len(twin.blocks))]
        gradients = torch.autograd.grad(logit, maps)
    return [m.detach()[0] for m in maps], [g[0] for g in gradients]


def reading_row(model: VisionTransformer, num_tokens: int) -> Tensor:
    """Weights with which the head reads the tokens (N,)."""
    row = torch.zeros(num_tokens, dtype=torch.float64)
    if model.global_pool == "token":
        row[0] = 1
    else:
        row[0 if model.pool_include_prefix else model.num_prefix_tokens :] = 1
        row /= row.sum()
    return row


# --- TransformerLRP ---------------------------------------------------------------------------------------------------


def divide(a: Tensor, b: Tensor) -> Tensor:
    """The reference's guarded division, as it is written there."""
    denominator = b.clamp(min=1e-9) + b.clamp(max=1e-9)
    denominator = denominator + (denominator == 0) * 1e-9
    return a / denominator * (b != 0)


def linear_rule(x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    up, down = x.clamp(min=0), x.clamp(max=0)
    s = divide(r, up @ positive.T + down @ negative.T)
    return up * (s @ positive) + down * (s @ negative)


def z_rule(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], r: Tensor) -> list[Tensor]:
    """Each argument times its gradient of <function, r / function>."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        z = function(*leaves)
        gradients = torch.autograd.grad(z, leaves, divide(r, z.detach()))
    return [leaf.detach() * gradient for leaf, gradient in zip(leaves, gradients, strict=True)]


def sum_rule(x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    s = divide(r, x + y)
    a, b = x * s, y * s
    a_sum, b_sum = a.sum(), b.sum()
    a_total = divide(a_sum.abs(), a_sum.abs() + b_sum.abs()) * r.sum()
    b_total = divide(b_sum.abs(), a_sum.abs() + b_sum.abs()) * r.sum()
    return a * divide(a_total, a_sum), b * divide(b_total, b_sum)


def clone_rule(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return x * (divide(first, x) + divide(second, x))


def slow_transformer_lrp(model: VisionTransformer, image: Tensor, target: int, method: str, start: int = 0) -> Tensor:
    """Map of one image (P,), or (H,W) for `full`."""
    _, gradients = attentions_and_gradients(model, image, target)
    with watched(model) as (twin, inputs, outputs), torch.no_grad():
        logits = twin(image)
    num_prefix, num_heads = model.num_prefix_tokens, twin.blocks[0].attn.num_heads
    r = linear_rule(
        inputs["head"], twin.head.weight, functional.one_hot(torch.tensor([target]), logits.shape[1]).double()
    )
    final = outputs["norm"]
    begin = 0 if model.pool_include_prefix else num_prefix
    pool = (lambda t: t[:, 0]) if model.global_pool == "token" else (lambda t: t[:, begin:].mean(1))
    (r,) = z_rule(pool, (final,), r)
    cams: dict[int, Tensor] = {}
    for i in reversed(range(len(twin.blocks))):
        block, at = twin.blocks[i], f"blocks.{i}."
        x, middle = inputs[at + "norm1"], inputs[at + "norm2"]
        through, branch = sum_rule(middle, outputs[at + "ls2"], r)
        branch = linear_rule(inputs[at + "mlp.fc2"], _scaled(block.mlp.fc2, block.ls2), branch)
        if isinstance(block.mlp, SwiGLU):
            gate, value = z_rule(torch.mul, (outputs[at + "mlp.act"], outputs[at + "mlp.fc1_x"]), branch)
            weight = torch.cat((block.mlp.fc1_g.weight, block.mlp.fc1_x.weight))
            branch = linear_rule(outputs[at + "norm2"], weight, torch.cat((gate / 2, value / 2), -1))
        elif isinstance(block.mlp, GluMlp):
            first, second = outputs[at + "mlp.fc1"].chunk(2, -1)
            active = outputs[at + "mlp.act"]
            pair = (first, active) if block.mlp.gate_last else (active, second)
            halves = [half / 2 for half in z_rule(torch.mul, pair, branch)]
            branch = linear_rule(outputs[at + "norm2"], block.mlp.fc1.weight, torch.cat(halves, -1))
        else:
            branch = linear_rule(outputs[at + "norm2"], block.mlp.fc1.weight, branch)
        r = clone_rule(middle, through, branch)
        through, branch = sum_rule(x, outputs[at + "ls1"], r)
        branch = linear_rule(inputs[at + "attn.proj"], _scaled(block.attn.proj, block.ls1), branch)
        q, k, weights = outputs[at + "attn.q_norm"], outputs[at + "attn.k_norm"], outputs[at + "attn.attn_drop"]
        v = _heads(outputs[at + "attn.qkv"].chunk(3, -1)[2], num_heads)
        cam, cam_v = z_rule(torch.matmul, (weights, v), _heads(branch, num_heads))
        cams[i], cam_v = cam / 2, cam_v / 2
        cam_q, cam_k = z_rule(lambda a, b: a @ b.transpose(-1, -2), (q, k), cams[i])
        together = torch.cat([t.transpose(1, 2).flatten(2) for t in (cam_q / 2, cam_k / 2, cam_v)], -1)
        branch = linear_rule(outputs[at + "norm1"], block.attn.qkv.weight, together)
        r = clone_rule(x, through, branch)
    if method == "full":
        return _pixels(twin, image, outputs["patch_embed"].flatten(1, -2), r)
    weighted = not (method == "rollout" or method in ("last_layer", "second_layer"))
    layers = {i: (cam[0] * gradients[i] if weighted else cam[0]).clamp(min=0).mean(0) for i, cam in cams.items()}
    row = reading_row(model, final.shape[1])
    if method.startswith(("last_layer", "second_layer")):
        return (row @ layers[len(cams) - 1 if method.startswith("last") else 1])[num_prefix:]
    product = torch.eye(len(row), dtype=torch.float64)
    for i in range(start, len(cams)):
        product = (layers[i] + torch.eye(len(row))) @ product
    return (row @ product)[num_prefix:]


def _scaled(layer: nn.Linear, scale: nn.Module) -> Tensor:
    return layer.weight * scale.gamma[:, None] if hasattr(scale, "gamma") else layer.weight


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return torch.stack(x.chunk(num_heads, -1), 1)


def _pixels(model: VisionTransformer, image: Tensor, embedded: Tensor, r: Tensor) -> Tensor:
    num_prefix = model.num_prefix_tokens
    position = model.pos_embed
    prefix = [t for t in (model.cls_token, model.reg_token) if t is not None]
    if position is None:
        r = r[:, num_prefix:]
    elif model.no_embed_class:
        r = sum_rule(embedded, position, r[:, num_prefix:])[0]
    else:
        r = sum_rule(torch.cat((*prefix, embedded), 1), _resized(model, position, image), r)[0][:, num_prefix:]
    weight, conv = model.patch_embed.proj.weight, partial(functional.conv2d, stride=model.patch_embed.patch_size)
    low, high = image.min() * torch.ones_like(image), image.max() * torch.ones_like(image)
    kernels = (weight, weight.clamp(min=0), weight.clamp(max=0))
    leaves = [t.clone().requires_grad_() for t in (image, low, high)]
    with torch.enable_grad():
        parts = [conv(leaf, kernel) for leaf, kernel in zip(leaves, kernels, strict=True)]
        z = parts[0] - parts[1] - parts[2] + 1e-9
        s = r.transpose(1, 2).reshape(z.shape) / z.detach()
        back = [torch.autograd.grad(part, leaf, s)[0] for part, leaf in zip(parts, leaves, strict=True)]
    return (image * back[0] - low * back[1] - high * back[2]).sum(1)[0]


def _resized(model: VisionTransformer, position: Tensor, image: Tensor) -> Tensor:
    """The position embedding that the model itself would add to an image of this size."""
    rows, columns = (n // p for n, p in zip(image.shape[2:], model.patch_embed.patch_size, strict=True))
    zeros = torch.zeros(1, rows, columns, model.embed_dim, dtype=torch.float64)
    if not model.dynamic_img_size:
        zeros = zeros.flatten(1, 2)
    prefix = [t for t in (model.cls_token, model.reg_token) if t is not None]
    bare = torch.cat((*prefix, zeros.reshape(1, -1, model.embed_dim)), 1)
    return model._pos_embed(zeros) - bare


# --- AttnLRP ----------------------------------------------------------------------------------------------------------


def keep_share(t: Tensor, share: float) -> Tensor:
    """t, with only `share` of its gradient."""
    return t * share + (t * (1 - share)).detach()


class ConstantScaleNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, t: Tensor) -> Tensor:
        centred = t - t.mean(-1, keepdim=True) if isinstance(self.norm, nn.LayerNorm) else t
        out = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + self.norm.eps).detach()
        out = out * self.norm.weight
        bias = getattr(self.norm, "bias", None)
        return out if bias is None else out + bias


class RatioActivation(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, t: Tensor) -> Tensor:
        return self.act(t).detach() + (t - t.detach()) * (self.act(t) / (t + 1e-10)).detach()


class GammaFunction(torch.autograd.Function):
    """The gamma rule of the README, product by product, for a linear function of input and weight."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, function: Any, gamma: float) -> Tensor:
        context.save_for_backward(x, weight, bias)
        context.function, context.gamma = function, gamma
        return function(x, weight) + bias

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        x, weight, bias = context.saved_tensors
        function, gamma, (g,) = context.function, context.gamma, gradients
        y = function(x, weight) + bias
        r = g * y
        w_up, w_down = weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)
        b_up, b_down = bias + gamma * bias.clamp(min=0), bias + gamma * bias.clamp(max=0)
        up, down = x.clamp(min=0), x.clamp(max=0)
        z_up = function(up, w_up) + b_up + function(down, w_down)
        z_down = function(up, w_down) + b_down + function(down, w_up)
        s_up = r * (y > 0) / (z_up + 1e-6 * torch.where(z_up >= 0, 1.0, -1.0))
        s_down = r * (y < 0) / (z_down + 1e-6 * torch.where(z_down >= 0, 1.0, -1.0))

        def back(w: Tensor, s: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                return torch.autograd.grad(function(leaf, w), leaf, s)[0]

        relevance = up * (back(w_up, s_up) + back(w_down, s_down)) + down * (back(w_down, s_up) + back(w_up, s_down))
        return relevance / (x + 1e-10 * torch.where(x >= 0, 1.0, -1.0)), None, None, None, None


class GammaLayer(nn.Module):
    def __init__(self, layer: Any, gamma: float) -> None:
        super().__init__()
        self.weight, self.gamma = layer.weight, gamma
        self.is_conv = isinstance(layer, nn.Conv2d)
        bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.weight), dtype=torch.float64)
        self.bias = bias[:, None, None] if self.is_conv else bias
        self.function = partial(functional.conv2d, stride=layer.stride) if self.is_conv else functional.linear

    def forward(self, x: Tensor) -> Tensor:
        return GammaFunction.apply(x, self.weight, self.bias, self.function, self.gamma)


def slow_attn_lrp(
    model: VisionTransformer,
    image: Tensor,
    target: int,
    hybrid: bool,
    gamma_conv: float | None,
    gamma_linear: float | None,
) -> Tensor:
    """Pixel relevance of one image (H,W): autograd through a copy whose layers have been exchanged."""
    twin: Any = copy.deepcopy(model)
    for block in twin.blocks:
        for scale, layer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            gamma = getattr(getattr(block, scale), "gamma", None)
            if gamma is not None:
                layer.weight.data *= gamma[:, None]
                layer.bias.data *= gamma
                setattr(block, scale, nn.Identity())
        block.attn.forward = partial(_attention, block.attn, hybrid)
        block.mlp.act = RatioActivation(block.mlp.act)
        if isinstance(block.mlp, (SwiGLU, GluMlp)):
            block.mlp.forward = partial(_gated, block.mlp)
        if gamma_linear is not None:
            for name in ("fc1", "fc1_g", "fc1_x", "fc2"):
                if hasattr(block.mlp, name):
                    setattr(block.mlp, name, GammaLayer(getattr(block.mlp, name), gamma_linear))
    if gamma_linear is not None:
        twin.head = GammaLayer(twin.head, gamma_linear)
    if gamma_conv is not None:
        twin.patch_embed.proj = GammaLayer(twin.patch_embed.proj, gamma_conv)
    for name, module in list(twin.named_modules()):
        if isinstance(module, (nn.LayerNorm, RmsNorm)):
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, ConstantScaleNorm(module))
    leaf = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(twin(leaf)[0, target], leaf)
    return (image * gradient).sum(1)[0]


def _attention(self: Any, hybrid: bool, x: Tensor, **_: Any) -> Tensor:
    q, k, v = (_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
    q, k = keep_share(self.q_norm(q), 0.25), keep_share(self.k_norm(k), 0.25)
    weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
    mixed = weights.detach() @ v if hybrid else weights @ keep_share(v, 0.5)
    return self.proj(mixed.transpose(1, 2).flatten(2))


def _gated(self: Any, x: Tensor) -> Tensor:
    if isinstance(self, SwiGLU):
        gate, value = self.fc1_g(x), self.fc1_x(x)
    else:
        first, second = self.fc1(x).chunk(2, -1)
        gate, value = (second, first) if self.gate_last else (first, second)
    return self.fc2(keep_share(self.act(gate) * value, 0.5))
