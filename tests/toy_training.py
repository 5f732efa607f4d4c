"""Sixty noisy squares in two classes with patients and splits, and options that train on them in seconds."""

import numpy as np
from PIL import Image

from xaibatch.training.options import TrainOptions

TINY = "test_vit"
"""timm's ViT for tests: 0.4 million weights at 160 pixels."""


def rng(seed=0):
    return np.random.Generator(np.random.Philox(key=seed))


def make_toy(folder, leak=False):
    folder.mkdir()
    lines = ["path,label,split,patient"]
    draws = rng(1)
    for i in range(60):
        label = "ab"[i % 2]
        pixels = draws.normal(100, 20, (40, 44))
        pixels[6:20, 6:20] += 80 * (label == "b")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"i{i:02d}.png")
        split = ("train", "train", "train", "val", "test")[i % 5]
        patient = "p0" if leak and i in (0, 3) else f"p{i}"
        lines.append(f"i{i:02d}.png,{label},{split},{patient}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def options(toy, tmp_path, **changes):
    small = {
        "data": str(toy), "output": str(tmp_path / "run"), "model": TINY, "image_size": 32, "resize_short": 36,
        "epochs": 3, "warmup_epochs": 1.0, "batch_size": 12, "learning_rate": 2e-3, "average_decay": 0.8,
        "use_gpu": False, "precision": "float32",
    }  # fmt: skip
    return TrainOptions(**{**small, **changes})
