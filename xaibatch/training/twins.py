"""Films of one pose and their lesion-free twin come in; batches, kept patches and losses that teach the lesion go out.

A small ViT does not find faint opacities by itself: trained plainly on class labels it stays near chance. What works is
to make the lesion all that differs inside a batch. All films of a pose share augmentation and kept patches; the lesion
starts several times as dense as it is (twin + a * (film - twin), a shrinking to 1); the logits are compared within the
pose. Only image labels and twins are used, never a mask.

Shape letters: P poses, F lesion films of a pose, T = F + 1 films with the twin last, H W pixels, N patches, D width,
K classes.
"""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from xaibatch.options import Options


class TwinRecipe(Options):
    """The curriculum. Progress runs from 0 (first step) to 1 (last)."""

    num_steps: int = 2400
    poses_per_step: int = 10
    learning_rate: float = 6e-4
    head_rate_factor: float = 4.0
    weight_decay: float = 0.05
    warmup_steps: int = 100
    final_rate: float = Field(default=0.01, description="share of the learning rate at the last step (cosine)")
    average_decay: float = Field(
        default=0.998, description="decay per step of the averaged weights, which are the result"
    )
    start_contrast: float = 3.5
    end_contrast: float = 1.0
    contrast_until: float = Field(default=0.7, description="progress at which the contrast has come down to its end")
    contrast_jitter: float = Field(default=0.2, description="half width of a uniform factor per pose")
    kept_patches: tuple[tuple[float, int], ...] = ((0.40, 49), (0.75, 98), (1.0, 196))
    """Pairs (until this progress, keep so many patches of each film)."""
    lung_rows: tuple[int, int] = (2, 11)
    """Rows of the patch grid, of 14, that are kept `lung_row_weight` times as readily."""
    lung_row_weight: float = 5.0
    bag_weight: float = 1.0
    pair_weight: float = 0.5
    pair_margin: float = 2.0
    label_smoothing: float = 0.03

    def contrast(self, progress: float) -> float:
        """Lesion contrast: linear from start to end, then constant.

        >>> TwinRecipe(start_contrast=3, end_contrast=1, contrast_until=0.5).contrast(0.25)
        2.0
        """
        left = max(0.0, 1 - progress / self.contrast_until)
        return self.end_contrast + (self.start_contrast - self.end_contrast) * left

    def num_kept(self, progress: float) -> int:
        return next((kept for until, kept in self.kept_patches if progress < until), self.kept_patches[-1][1])

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up times a cosine over the whole run."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.num_steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * max(self.final_rate, cosine)


def contrasted(films_PTHW: Tensor, contrast_P: Tensor) -> Tensor:
    """Return the films (P,T,H,W), float, with the lesion's share multiplied: twin + contrast * (film - twin)."""
    twin = films_PTHW[:, -1:]
    return torch.cat([twin + contrast_P[:, None, None, None] * (films_PTHW[:, :-1] - twin), twin], 1)


def same_pose_augmented(films_PTHW: Tensor, generator: torch.Generator) -> Tensor:
    """Zoom, turn, shift (3% each, standard deviation) and change brightness of each pose; its films get the same draw.

    films_PTHW: float in [0, 255]; so is the result. Turning and moving commute with the contrast of `contrasted`.
    """
    num_poses, _, height, width = films_PTHW.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    zoom, turn = 1 + 0.03 * normal(num_poses), 0.03 * normal(num_poses)
    maps = torch.zeros(num_poses, 2, 3)
    maps[:, 0, 0] = maps[:, 1, 1] = zoom * torch.cos(turn)
    maps[:, 1, 0], maps[:, 0, 1] = zoom * torch.sin(turn), -zoom * torch.sin(turn)
    maps[:, :, 2] = 0.03 * normal(num_poses, 2)
    points = functional.affine_grid(maps, [num_poses, 1, height, width], align_corners=False)
    moved = functional.grid_sample(films_PTHW, points, padding_mode="border", align_corners=False)
    return moved * (1 + 0.03 * normal(num_poses, 1, 1, 1)) + 4 * normal(num_poses, 1, 1, 1)


def kept_patches(num_poses: int, num_kept: int, grid: int, recipe: TwinRecipe, generator: torch.Generator) -> Tensor:
    """Indices (P,num_kept) of patches to keep, without replacement, rows of the lungs favoured (Gumbel-type keys)."""
    weights = torch.ones(grid, grid)
    first, last = (round(row * grid / 14) for row in recipe.lung_rows)
    weights[first:last] = recipe.lung_row_weight
    keys = torch.rand(num_poses, grid * grid, generator=generator).log() / weights.flatten()
    return keys.argsort(1, descending=True)[:, :num_kept]


class BagHead(nn.Module):
    """Auxiliary head on the patch tokens: a film has a lesion where any patch has one; dropped after training.

    Multiple-instance pooling: log-mean-exp over patches of the lesion logits, mean of the normal logit (last class).
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_classes)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        logits_BNK = self.linear(tokens_BND).float()
        lesions = logits_BNK[..., :-1].logsumexp(1) - math.log(logits_BNK.shape[1])
        return torch.cat([lesions, logits_BNK[..., -1:].mean(1)], 1)


def forward_kept(vit: Any, bag: BagHead, images_BCHW: Tensor, kept_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Class-token logits (B,K) and bag logits (B,K) of a plain timm ViT that sees only the patches `kept_BN`."""
    patches = vit.patch_embed(images_BCHW) + vit.pos_embed[:, 1:]
    if kept_BN is not None:
        patches = patches.gather(1, kept_BN[..., None].expand(-1, -1, patches.shape[-1]))
    class_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(patches), -1, -1)
    tokens = vit.norm(vit.blocks(vit.norm_pre(torch.cat([class_token.to(patches.dtype), patches], 1))))
    return vit.head(tokens[:, 0]).float(), bag(tokens[:, 1:])


def within_pose_loss(logits_PTK: Tensor, labels_F: Tensor, margin: float) -> Tensor:
    """Softplus of (margin - difference), for two differences within each pose (mean over poses and pairs).

    Lesion evidence of each lesion film over its twin, and evidence for class 0 over class 1 of each film of class 0
    over each film of class 1. logits_PTK: last class is normal, last film the twin; labels_F: 0 or 1.
    """
    lesion = logits_PTK[..., :-1].logsumexp(-1) - logits_PTK[..., -1]
    first_over_second = logits_PTK[..., 0] - logits_PTK[..., 1]
    over_twin = lesion[:, :-1] - lesion[:, -1:]
    firsts, seconds = first_over_second[:, :-1][:, labels_F == 0], first_over_second[:, :-1][:, labels_F == 1]
    between = firsts[:, :, None] - seconds[:, None, :]
    return functional.softplus(margin - over_twin).mean() + functional.softplus(margin - between).mean()


def twin_loss(
    class_logits_BK: Tensor, bag_logits_BK: Tensor, labels_T: Tensor, num_poses: int, recipe: TwinRecipe
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of both heads plus the contrast within poses; B = P * T, films of a pose together, twin last.

    The twin counts as much as each pair of lesion films, so that the three classes weigh the same.
    """
    labels_B, num_films = labels_T.repeat(num_poses), len(labels_T)
    counts = torch.bincount(labels_T, minlength=class_logits_BK.shape[1]).clamp(min=1)
    weights_K = counts.max() / counts
    of_class = functional.cross_entropy(
        class_logits_BK, labels_B, weight=weights_K, label_smoothing=recipe.label_smoothing
    )
    of_bag = functional.cross_entropy(bag_logits_BK, labels_B, weight=weights_K)
    of_pairs = torch.stack(
        [
            within_pose_loss(logits.view(num_poses, num_films, -1), labels_T[:-1], recipe.pair_margin)
            for logits in (class_logits_BK, bag_logits_BK)
        ]
    ).sum()
    total = of_class + recipe.bag_weight * of_bag + recipe.pair_weight * of_pairs
    accuracy = (class_logits_BK.argmax(1) == labels_B).float().mean().item()
    terms = {"class": of_class.item(), "bag": of_bag.item(), "pairs": of_pairs.item(), "accuracy": accuracy}
    return total, terms
