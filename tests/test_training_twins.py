"""The twin curriculum: its arithmetic against slow rewrites, and a run that resumes exactly."""

import numpy as np
import timm
import torch
from torch.nn import functional

from xaibatch.training.twin_training import TwinTrainer
from xaibatch.training.twins import (
    BagHead,
    TwinRecipe,
    contrasted,
    forward_kept,
    kept_patches,
    same_pose_augmented,
    within_pose_loss,
)


def test_contrast_multiplies_the_lesion_only():
    films = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = contrasted(films, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found[0], films[0])
    torch.testing.assert_close(found[1, 0], films[1, 2] + 3 * (films[1, 0] - films[1, 2]))
    torch.testing.assert_close(found[:, -1], films[:, -1])


def test_films_of_a_pose_get_the_same_augmentation():
    film = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 255
    found = same_pose_augmented(film.expand(1, 3, 16, 16), torch.Generator().manual_seed(1))
    torch.testing.assert_close(found[:, 0], found[:, 2])
    assert (found[:, 0] - film[:, 0]).abs().mean() > 1


def test_kept_patches_favour_lung_rows_without_repeats():
    recipe = TwinRecipe()
    kept = kept_patches(400, 49, 14, recipe, torch.Generator().manual_seed(0))
    assert all(len(set(row.tolist())) == 49 for row in kept)
    rows = kept // 14
    inside = ((rows >= 2) & (rows < 11)).float().mean()
    # 126 of 196 patches lie in lung rows; drawn five times as readily they make up much more than that share.
    assert inside > 0.8


def test_kept_forward_with_all_patches_is_timm_forward():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, img_size=64).eval()
        bag = BagHead(vit.embed_dim, 3)
        images = torch.randn(2, 3, 64, 64)
    everything = torch.arange(16).expand(2, -1)
    for kept in (None, everything):
        torch.testing.assert_close(forward_kept(vit, bag, images, kept)[0], vit(images), atol=1e-5, rtol=1e-5)


def test_within_pose_loss_by_a_loop():
    logits = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    over_twin, between = [], []
    for pose in logits:

        def evidence(z):
            return torch.log(torch.exp(z[0]) + torch.exp(z[1])) - z[2]

        over_twin += [functional.softplus(2 - (evidence(film) - evidence(pose[4]))) for film in pose[:4]]
        for first in pose[:2]:
            for second in pose[2:4]:
                between.append(functional.softplus(2 - ((first[0] - first[1]) - (second[0] - second[1]))))
    expected = torch.stack(over_twin).mean() + torch.stack(between).mean()
    torch.testing.assert_close(within_pose_loss(logits, labels, margin=2.0), expected)


def test_twin_training_learns_a_plain_lesion_and_resumes_exactly():
    draws = torch.Generator().manual_seed(0)
    twin = torch.rand(12, 1, 64, 64, generator=draws) * 60 + 80
    films = twin.repeat(1, 5, 1, 1)
    films[:, :2, 8:24, 8:24] += 60
    films[:, 2:4, 40:56, 40:56] += 60
    films = films.clamp(0, 255).to(torch.uint8)
    labels = torch.tensor([0, 0, 1, 1, 2])
    recipe = TwinRecipe(
        num_steps=24,
        poses_per_step=6,
        warmup_steps=4,
        kept_patches=((1.0, 16),),
        start_contrast=1.5,
        learning_rate=1e-3,
    )

    def trainer():
        return TwinTrainer(films, labels, recipe, mean=0.45, std=0.1, seed=3)

    whole, first = trainer(), trainer()
    terms = []
    whole.run(24, lambda progress: terms.append(progress.terms))
    assert np.mean([t["pairs"] for t in terms[-4:]]) < 0.7 * np.mean([t["pairs"] for t in terms[:4]])
    first.run(10, lambda _: None)
    second = trainer()
    second.load_state(first.state())
    second.run(24, lambda _: None)
    for name, value in whole.average.state_dict().items():
        torch.testing.assert_close(second.average.state_dict()[name], value, rtol=0, atol=0)
