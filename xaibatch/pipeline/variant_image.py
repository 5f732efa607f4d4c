"""The image that a variant is explained on: the one place for replicas, plain loop and CPU workers; NumPy only.

Shape letters: B images of a shard, C channels, H W pixels.
"""

import numpy as np
from numpy.typing import NDArray

from xaibatch.metrics.base import NoisyVariant, TwinVariant, Variant, WeightsVariant
from xaibatch.pipeline.job import Question
from xaibatch.types import ImageBatch


def changed_image(batch: ImageBatch, question: Question) -> NDArray[np.floating] | None:
    """The changed copy (C,H,W) that a variant asks about, in the images' dtype; None: it asks about the image itself.

    Noise is added in float64 and only then cast. A variant with new weights may ask about a noisy copy too.
    """
    image_CHW, ask = batch.images_BCHW[question.row], _on_image(question.ask)  # type: ignore[arg-type]
    if isinstance(ask, NoisyVariant):
        channels, height, width = image_CHW.shape
        noise_CHW = ask.plan.noise_CHW(ask.sample, (channels, height, width))
        noisy_CHW: NDArray[np.floating] = (np.asarray(image_CHW, np.float64) + noise_CHW).astype(image_CHW.dtype)
        return noisy_CHW
    if isinstance(ask, TwinVariant):
        assert batch.twins_BCHW is not None
        twin_CHW: NDArray[np.floating] = batch.twins_BCHW[question.row].astype(image_CHW.dtype)
        return twin_CHW
    return None


def about(question: Question) -> object:
    """What tells a variant's image from the others of the shard: equal for questions about one and the same image."""
    ask = _on_image(question.ask)  # type: ignore[arg-type]
    if isinstance(ask, NoisyVariant):
        return question.row, ask.plan, ask.sample
    return question.row, isinstance(ask, TwinVariant)


def _on_image(ask: Variant) -> Variant:
    """The variant without the change of the model."""
    return ask.noisy if isinstance(ask, WeightsVariant) and ask.noisy is not None else ask
