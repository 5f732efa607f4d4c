"""Grey images, their ids and an epoch come in; the images as a training step sees them go out.

Shape letters: B images, S side of the stored image, H W side of the model's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from xaibatch.seeding import keyed_generator
from xaibatch.training.options import AugmentationOptions


@dataclass(frozen=True, slots=True)
class Draw:
    """The random numbers of one image in one epoch; keyed by its id, so they do not depend on batch or worker."""

    map_23: Tensor
    contrast: float
    brightness: float
    gamma: float
    noise: float
    noise_seed: int
    erase: tuple[float, float, float, float] | None

    @classmethod
    def of(cls, options: AugmentationOptions, seed: int, image_id: str, epoch: int, side_share: float) -> "Draw":
        """side_share: side of the model's input over the stored side; a zoom of 1 is the plain centre crop."""
        rng = keyed_generator(seed, image_id, "train.augment", epoch)
        angle = np.deg2rad(rng.uniform(-1, 1) * options.rotation_degrees)
        zoom = rng.uniform(*options.zoom) * side_share
        stretch = 1 + rng.uniform(-1, 1) * options.stretch
        shift = rng.uniform(-1, 1, 2) * 2 * options.shift
        mirror = -1.0 if rng.random() < options.mirror_probability else 1.0
        c, s = zoom * np.cos(angle), zoom * np.sin(angle)
        matrix = [[mirror * c * stretch, -s, shift[0]], [mirror * s * stretch, c, shift[1]]]
        erase = None
        if rng.random() < options.erase_probability:
            height, width = rng.uniform(*options.erase_side, 2)
            erase = (rng.uniform(0, 1 - height), rng.uniform(0, 1 - width), height, width)
        return cls(
            map_23=torch.tensor(matrix, dtype=torch.float32),
            contrast=float(rng.uniform(*options.contrast)),
            brightness=float(rng.uniform(-1, 1) * options.brightness),
            gamma=float(np.exp(rng.uniform(*np.log(options.gamma)))),
            noise=float(rng.uniform(0, options.noise)),
            noise_seed=int(rng.integers(2**62)),
            erase=erase,
        )


def augmented(
    images_BSS: Tensor, image_ids: Sequence[str], options: AugmentationOptions, *, size: int, seed: int, epoch: int
) -> Tensor:
    """Return (B,1,H,W) float32 in [0, 1]; images_BSS is uint8 grey."""
    share = size / images_BSS.shape[-1]
    draws = [Draw.of(options, seed, image_id, epoch, share) for image_id in image_ids]
    points = functional.affine_grid(
        torch.stack([draw.map_23 for draw in draws]), [len(draws), 1, size, size], align_corners=False
    )
    moved = functional.grid_sample(
        images_BSS[:, None].float() / 255, points, padding_mode="border", align_corners=False
    )

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(draw, name) for draw in draws])[:, None, None, None]

    mean = moved.mean((1, 2, 3), keepdim=True)
    toned = ((moved - mean) * column("contrast") + mean + column("brightness")).clamp(0, 1) ** column("gamma")
    noise = torch.stack(
        [torch.randn(1, size, size, generator=torch.Generator().manual_seed(draw.noise_seed)) for draw in draws]
    )
    noisy = (toned + column("noise") * noise).clamp(0, 1)
    for image, draw in zip(noisy, draws, strict=True):
        if draw.erase is not None:
            top, left, height, width = (round(share * size) for share in draw.erase)
            image[:, top : top + height, left : left + width] = image.mean()
    return noisy


def centre_crop(images_BSS: Tensor, size: int) -> Tensor:
    """The evaluation's view of the stored images: (B,1,H,W) float32 in [0, 1], as `Preprocessing` crops."""
    start = (images_BSS.shape[-1] - size) // 2
    return images_BSS[:, None, start : start + size, start : start + size].float() / 255
