"""A plain ViT, images and targets in; one recorded forward and, on demand, one backward out, shared by many explainers.

The forward replays the model's layers itself, so the model is only read: no hook, no switch of fused attention, no
graph, no gradient of any parameter. Images are traced in parts, on a CPU one by one: element-wise work then stays
inside its cache, what an explainer computes on the way is small, and a map does not depend on the batch by a bit.

Shape letters: B images, C channels, H W pixels, N tokens, Q tokens whose output is read (N, or 1 in a last block under
class-token pooling), P patches, D width, h heads, K classes, g v rows and columns of the token grid.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from xaibatch.errors import ModelError
from xaibatch.models import backward as step
from xaibatch.models.classifier import Classifier
from xaibatch.models.forward import BlockRecord, ForwardRecord, forward, from_patches
from xaibatch.models.vit import VitLayers, plain_vit, vit_layers


class Part:
    """A few images of a trace: their recorded forward, and gradients of the explained logit when first asked for.

    All gradients are those of one image's target logit with respect to that image's own activations.
    """

    def __init__(self, record: ForwardRecord, targets_B: Tensor) -> None:
        self.record = record
        self.targets_B = targets_B
        self._rules = step.PlainRules()

    @property
    def layers(self) -> VitLayers:
        return self.record.layers

    @property
    def blocks(self) -> tuple[BlockRecord, ...]:
        return self.record.blocks

    @cached_property
    def attention_gradients(self) -> tuple[Tensor, ...]:
        """∂logit/∂attention of every block, (B,h,Q,N) each."""
        return self._backward[0]

    @cached_property
    def last_norm1_gradient(self) -> Tensor:
        """∂logit/∂(output of the last block's norm1)."""
        return self._backward[1]

    @cached_property
    def image_gradient(self) -> Tensor:
        """∂logit/∂image: goes on from where the attention gradients stop."""
        attention, g_n1, g_middle, g_mixed = self._backward
        first = self.blocks[0]
        if len(self.blocks) > 1:
            g_n1 = step.through_attention(first, g_mixed, attention[0], self._rules)
        g = step.to_block_input(first, g_middle, g_n1, self._rules)
        return self.from_patches(step.through_embedding(self.record, g, self._rules))

    def from_patches(self, patches_BPI: Tensor) -> Tensor:
        """Values on flattened patches as an image (B,C,H,W)."""
        return from_patches(patches_BPI, self.layers, self.record.images_BCHW)

    @cached_property
    def full_attentions(self) -> tuple[Tensor, ...]:
        """Attention of every block with a row for every token, (B,h,N,N) each."""
        return tuple(block.full_attention() for block in self.blocks)

    def read_rows(self, x: Tensor) -> Tensor:
        """What the head reads of rows per token (B,Q,...): the class token's row, or the mean of those it pools."""
        return x[:, 0] if self.layers.class_pooling else x[:, self.layers.pooled_from :].mean(1)

    def start_row(self) -> Tensor:
        """The weights with which the head reads tokens (B,1,N): one for the class token, or equal for all pooled."""
        num_tokens = self.blocks[0].x_BND.shape[1]
        row = self.record.logits_BK.new_zeros(len(self.targets_B), 1, num_tokens)
        if self.layers.class_pooling:
            row[:, :, 0] = 1
        else:
            row[:, :, self.layers.pooled_from :] = 1 / (num_tokens - self.layers.pooled_from)
        return row

    def on_grid(self, x_BP: Tensor) -> Tensor:
        """Patch values (B,P) as maps (B,g,v)."""
        return x_BP.reshape(-1, *self.layers.grid)

    @cached_property
    def _backward(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
        """Attention gradients; gradient at the last norm1; at the first block's middle and heads' outputs."""
        with torch.no_grad():
            rules, attention, g_n1_last = self._rules, [], None
            g = step.through_head(self.record, step.one_hot(self.targets_B, self.record), rules)
            for index in reversed(range(len(self.blocks))):
                block = self.blocks[index]
                g_middle = step.through_mlp(block, g, rules)
                g_mixed = step.to_mixed(block, g_middle)
                attention.append(step.to_attention(block, g_mixed))
                if index or g_n1_last is None:
                    g_n1 = step.through_attention(block, g_mixed, attention[-1], rules)
                    g_n1_last = g_n1 if g_n1_last is None else g_n1_last
                    g = step.to_block_input(block, g_middle, g_n1, rules)
            assert g_n1_last is not None
            return tuple(reversed(attention)), g_n1_last, g_middle, g_mixed


class Trace:
    """The parts of one batch, in order."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.parts = parts
        self.logits_BK = torch.cat([part.record.logits_BK for part in parts])
        """The model's outputs for the batch."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        return self.parts[0].layers.grid

    def map(self, function: Callable[[Part], Tensor]) -> Tensor:
        """Apply a function of a part, whose rows are that part's images, and join the results in the batch's order."""
        with torch.no_grad(), torch.autocast(self.parts[0].targets_B.device.type, enabled=False):
            return torch.cat([function(part) for part in self.parts])


def record(model: nn.Module, images_BCHW: Tensor, targets_B: Tensor, images_per_part: int | None = None) -> Trace:
    """Trace the model on normalised images; the explained logit of image b is targets_B[b] (int64).

    The arithmetic is that of the images' dtype, which must be the model's. Raises ModelError for a model that is not a
    plain ViT (see `plain_vit`) or wraps one and answers otherwise than it, for a size it does not take, for another
    dtype or device, and for a target that is no class. `images_per_part`: images that share a matrix product; changes
    speed, memory and rounding only (default: by device).
    """
    vit: Any = plain_vit(model)
    weight = vit.head.weight
    if images_BCHW.dtype != weight.dtype or images_BCHW.device != weight.device:
        raise ModelError(
            f"images are {images_BCHW.dtype} on {images_BCHW.device}, the model {weight.dtype} on {weight.device}; "
            "convert one of them"
        )
    if targets_B.shape != images_BCHW.shape[:1] or not len(targets_B):
        raise ModelError(
            f"{tuple(targets_B.shape)} targets for images of shape {tuple(images_BCHW.shape)}; one class per image"
        )
    if int(targets_B.min()) < 0 or int(targets_B.max()) >= len(weight):
        raise ModelError(f"targets must be classes 0 to {len(weight) - 1}, received {targets_B.tolist()}")
    height, width = images_BCHW.shape[2:]
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(images_BCHW.device.type, enabled=False):
        layers = vit_layers(vit, (height, width))
        size = images_per_part or _images_per_part(images_BCHW)
        trace = Trace(
            tuple(
                Part(forward(layers, images), targets)
                for images, targets in zip(
                    torch.split(images_BCHW.detach(), size), torch.split(targets_B, size), strict=True
                )
            )
        )
        if model is not vit and type(model).forward is not Classifier.forward:
            _check_wrapper(model, images_BCHW[:1], trace.logits_BK[:1])
        return trace


def _check_wrapper(model: nn.Module, images_1CHW: Tensor, logits_1K: Tensor) -> None:
    """Refuse somebody's wrapper that does more than call its backbone, e.g. scales images or adds a softmax."""
    answer: Any = model(images_1CHW)
    tolerance = torch.finfo(logits_1K.dtype).eps ** 0.5 * logits_1K.abs().max().item()
    if not (
        isinstance(answer, Tensor)
        and answer.shape == logits_1K.shape
        and torch.allclose(answer, logits_1K, rtol=0, atol=tolerance, equal_nan=True)
    ):
        raise ModelError(
            f"{type(model).__name__} answers otherwise than its backbone, which is all that a trace sees: "
            "explain the backbone itself, with images as it expects them"
        )


def _images_per_part(images_BCHW: Tensor) -> int:
    """One on a CPU, all on an accelerator, which needs the batch.

    One image's activations fill a core's cache anyway; two share larger matrix products, but their maps then depend on
    the batch in the last bits, which rules that divide by near-zero sums can make large in float32.
    """
    return len(images_BCHW) if images_BCHW.device.type != "cpu" else 1
