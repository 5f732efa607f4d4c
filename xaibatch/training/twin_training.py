"""Rendered poses and a recipe come in; a ViT trained by the twin curriculum goes out, with a state to resume from.

Shape letters: P poses, T films of a pose (twin last), B images, H W pixels, K classes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, distributed, nn

from xaibatch.seeding import keyed_generator
from xaibatch.training.twins import (
    BagHead,
    TwinRecipe,
    contrasted,
    forward_kept,
    kept_patches,
    same_pose_augmented,
    twin_loss,
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a log line says after a step."""

    step: int
    num_steps: int
    contrast: float
    num_kept: int
    terms: dict[str, float]


class TwinTrainer:
    """Holds weights, their running average and the optimiser; `run` takes the steps.

    films_PTHW: uint8, lesion films of each pose and its twin last; labels_T: class of each, twin = last class.
    mean, std:  of a grey image in [0, 1].

    Draws are keyed by (seed, step, rank), so `state` needs no generator and a killed run goes on as it would have.
    Where torch.distributed is initialised, each process takes its part of a step's poses and gradients are averaged.
    """

    def __init__(
        self,
        films_PTHW: Tensor,
        labels_T: Tensor,
        recipe: TwinRecipe,
        *,
        mean: float,
        std: float,
        seed: int,
        model_name: str = "vit_tiny_patch16_224",
        start: dict[str, Tensor] | None = None,
    ) -> None:
        self.films_PTHW, self.labels_T, self.recipe = films_PTHW, labels_T, recipe
        self.mean, self.std, self.seed, self.step = mean, std, seed, 0
        together = distributed.is_available() and distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit: Any = timm.create_model(model_name, num_classes=int(labels_T.max()) + 1, img_size=films_PTHW.shape[-1])
            for block in vit.blocks:
                block.attn.fused_attn = False  # on a CPU the fused backward is a quarter slower than plain products
            self.vit, self.bag = vit, BagHead(vit.embed_dim, int(labels_T.max()) + 1)
            nn.init.trunc_normal_(self.bag.linear.weight, std=0.02)
            nn.init.zeros_(self.bag.linear.bias)
        if start is not None:
            self.vit.load_state_dict({**self.vit.state_dict(), **start})
        self.average = copy.deepcopy(self.vit).eval()
        self._optimiser = _optimiser(self.vit, self.bag, recipe)

    def run(self, until_step: int, report: Callable[[Progress], None]) -> None:
        """Take steps up to `until_step` (at most the recipe's number) and report each."""
        while self.step < min(until_step, self.recipe.num_steps):
            report(self._take_step())

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step, "vit": self.vit.state_dict(), "bag": self.bag.state_dict(),
            "average": self.average.state_dict(), "optimiser": self._optimiser.state_dict(),
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.vit.load_state_dict(state["vit"])
        self.bag.load_state_dict(state["bag"])
        self.average.load_state_dict(state["average"])
        self._optimiser.load_state_dict(state["optimiser"])

    def _take_step(self) -> Progress:
        recipe, progress = self.recipe, self.step / self.recipe.num_steps
        contrast, num_kept = recipe.contrast(progress), recipe.num_kept(progress)
        poses = self._poses()[self.rank :: self.world]
        draws = keyed_generator(self.seed, f"rank-{self.rank}", "train.twins", self.step)
        generator = torch.Generator().manual_seed(int(draws.integers(2**62)))
        grid = self.vit.patch_embed.grid_size[0]
        jitter = 1 + recipe.contrast_jitter * (2 * torch.rand(len(poses), generator=generator) - 1)
        films = same_pose_augmented(self.films_PTHW[poses].float(), generator)
        films = contrasted(films, contrast * jitter).clamp(0, 255)
        kept = None
        if num_kept < grid**2:
            kept = kept_patches(len(poses), num_kept, grid, recipe, generator)
            kept = kept.repeat_interleave(films.shape[1], 0)
        images = normalised(films.flatten(0, 1), self.mean, self.std)
        for group in self._optimiser.param_groups:
            group["lr"] = group["factor"] * recipe.rate(self.step)
        self.vit.train()
        with torch.autocast("cpu", torch.bfloat16):
            class_logits, bag_logits = forward_kept(self.vit, self.bag, images, kept)
        loss, terms = twin_loss(class_logits, bag_logits.float(), self.labels_T, len(poses), recipe)
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._share_gradients()
        nn.utils.clip_grad_norm_([*self.vit.parameters(), *self.bag.parameters()], 1.0)
        self._optimiser.step()
        self.step += 1
        decay = min(recipe.average_decay, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            for weight, mean in zip(self.vit.parameters(), self.average.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)
        return Progress(step=self.step, num_steps=recipe.num_steps, contrast=contrast, num_kept=num_kept, terms=terms)

    def _poses(self) -> list[int]:
        """Poses of this step: epochs are keyed permutations, cut into steps."""
        num_poses, count = len(self.films_PTHW), min(self.recipe.poses_per_step, len(self.films_PTHW))
        epoch, part = divmod(self.step, num_poses // count)
        order = keyed_generator(self.seed, "order", "train.twins", epoch).permutation(num_poses)
        return [int(pose) for pose in order[part * count : (part + 1) * count]]

    def _share_gradients(self) -> None:
        if self.world == 1:
            return
        parameters = [*self.vit.parameters(), *self.bag.parameters()]
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        distributed.all_reduce(flat)
        parts = (flat / self.world).split([p.numel() for p in parameters])  # type: ignore[no-untyped-call]
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def normalised(films_BHW: Tensor, mean: float, std: float) -> Tensor:
    """Grey levels 0 to 255 (B,H,W) to the model's input (B,3,H,W)."""
    return ((films_BHW.float() / 255 - mean) / std)[:, None].expand(-1, 3, -1, -1)


@torch.inference_mode()
def predicted(vit: nn.Module, films_BHW: Tensor, *, mean: float, std: float, batch_size: int = 50) -> Tensor:
    """Logits (B,K) float32 of grey films in evaluation mode."""
    vit.eval()
    return torch.cat([vit(normalised(part, mean, std)).float() for part in torch.split(films_BHW, batch_size)])


def _optimiser(vit: Any, bag: nn.Module, recipe: TwinRecipe) -> torch.optim.AdamW:
    """AdamW; no decay of biases, norms and other vectors; the two heads learn faster."""
    heads = [*vit.head.parameters(), *bag.parameters()]
    in_head = {id(parameter) for parameter in heads}
    body = [parameter for parameter in vit.parameters() if id(parameter) not in in_head]
    groups = [
        {"params": [p for p in body if p.ndim > 1], "weight_decay": recipe.weight_decay, "factor": 1.0},
        {"params": [p for p in body if p.ndim < 2], "weight_decay": 0.0, "factor": 1.0},
        {"params": heads, "weight_decay": recipe.weight_decay, "factor": recipe.head_rate_factor},
    ]
    return torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.99))
