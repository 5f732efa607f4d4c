"""A model and an image size in, the grid of its tokens out: the one place that knows how maps lie on pixels."""

from typing import Any

from torch import nn

from xaibatch.maps import TokenGrid

SQUARE = 16
"""Side in pixels of the squares that stand in for tokens where a model has none, or several sizes of them."""


def token_grid_of(model: nn.Module, image_size: tuple[int, int]) -> TokenGrid:
    """Return the token grid for images of `image_size` (H,W).

    Tokens are those of a model that keeps one size throughout (ViT, DeiT, BEiT, EVA, XCiT, Mixer, ...): a rest at the
    lower and right border that is narrower than a patch has no token, as the patch projection drops it, unless the
    model, or a convolutional stem below it, pads the image. Models whose features shrink on the way (Swin, PiT, every
    convolutional one) get squares of SQUARE pixels that cover the image, the last of a row or column cut at its border.
    """
    backbone: Any = getattr(model, "backbone", model)
    if (padded := _padded_hybrid(backbone, image_size)) is not None:
        return padded
    patch = _patch(backbone)
    if patch is None:
        rows, columns = (-(-side // SQUARE) for side in image_size)
        return TokenGrid(rows, columns, SQUARE, SQUARE)
    pads = bool(getattr(getattr(backbone, "patch_embed", None), "dynamic_img_pad", False))
    rows, columns = (
        max(1, -(-side // step) if pads else side // step) for side, step in zip(image_size, patch, strict=True)
    )
    return TokenGrid(rows, columns, *patch)


def _padded_hybrid(backbone: Any, image_size: tuple[int, int]) -> TokenGrid | None:
    """Tokens on a convolutional stem, which pads, cover the image, the last ones cut at its border."""
    embedding: Any = getattr(backbone, "patch_embed", None)
    if not hasattr(embedding, "backbone") or getattr(embedding, "img_size", None) != image_size:
        return None
    (rows, columns), (height, width) = embedding.grid_size, image_size
    return TokenGrid(rows, columns, -(-height // rows), -(-width // columns))


def _patch(backbone: Any) -> tuple[int, int] | None:
    """Height and width in pixels of the model's tokens; None where it has not one size of them."""
    embedding: Any = getattr(backbone, "patch_embed", None)
    reductions = {info["reduction"] for info in getattr(backbone, "feature_info", None) or ()}
    if len(reductions) > 1 or (embedding is None and not reductions):
        return None
    if hasattr(embedding, "feat_ratio"):  # of a hybrid's patches, which lie on feature maps, the size in pixels
        height, width = embedding.feat_ratio(as_scalar=False)
        return int(height), int(width)
    size = getattr(embedding, "patch_size", None) or (reductions.pop() if reductions else None)
    if size is None:
        return None
    return (int(size[0]), int(size[1])) if isinstance(size, tuple | list) else (int(size), int(size))
