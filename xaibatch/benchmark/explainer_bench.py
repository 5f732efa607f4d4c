"""The images of one batch and how they are run: by our explainers together, by a stock tool one by one, or bare.

Shape letters: B images, C channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from xaibatch.benchmark.setting import Setting
from xaibatch.benchmark.timing import Work
from xaibatch.explainers.base import Explainer, ExplainInput
from xaibatch.perturb.runner import PlanRunner
from xaibatch.perturb.segmentation import segment
from xaibatch.seeding import DrawKey

COPIES_BATCH = {"cpu": 16, "cuda": 256}
"""Perturbed copies in one forward pass, as a run has them by default."""


class ExplainerBench:
    """The first images of a setting, with their predicted classes."""

    def __init__(self, setting: Setting, num_images: int) -> None:
        self.setting = setting
        self.images_BCHW = setting.images_BCHW[:num_images]
        self.targets = setting.targets_B[:num_images].tolist()
        self.keys = tuple(DrawKey(seed=setting.options.seed, image_id=f"image-{b}") for b in range(self.num_images))
        self.copies_batch = COPIES_BATCH[setting.device]

    @property
    def num_images(self) -> int:
        return len(self.images_BCHW)

    @cached_property
    def segments(self) -> list[NDArray[np.int32]]:
        """Superpixels of every image."""
        return [segment(image_CHW, self.setting.segmentation) for image_CHW in self.images_BCHW.cpu().numpy()]

    def inputs(self, given_segments: bool = False) -> ExplainInput:
        """What an explainer gets, nothing computed yet."""
        runner = PlanRunner(model=self.setting.model, batch_size=self.copies_batch)
        return ExplainInput(
            model=self.setting.model,
            images_BCHW=self.images_BCHW,
            targets_B=torch.as_tensor(self.targets, device=self.images_BCHW.device),
            keys=self.keys,
            run_plans=lambda requests: runner.run(self.images_BCHW, requests),
            segments={self.setting.segmentation: self.segments} if given_segments else {},
        )

    def ours(self, explainers: Sequence[Explainer], given_segments: bool = False) -> Work:
        """All images in one batch, by explainers that share what they can."""

        def explain() -> None:
            inputs = self.inputs(given_segments)
            for explainer in explainers:
                explainer.explain(inputs)

        return explain

    def stock(self, one: Callable[[int], object]) -> Work:
        """Row after row."""

        def explain() -> None:
            for row in range(self.num_images):
                one(row)

        return explain

    def forward(self, batch: int) -> Work:
        """One bare forward pass of `batch` images."""
        images_BCHW = self.setting.images(batch)

        def run() -> None:
            with torch.inference_mode():
                self.setting.model(images_BCHW)

        return run
