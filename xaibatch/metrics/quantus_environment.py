"""What Quantus finds around it during one call: draws of its own, names NumPy dropped, a model and an explainer.

Shape letters: B images, C channels, H W pixels, K classes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xaibatch.seeding import DrawKey

if TYPE_CHECKING:
    from torch import nn

Predict = Callable[[NDArray[np.float32]], NDArray[np.floating]]
"""Images (B,C,H,W) to logits (B,K); a replica's answer."""

Explain = Callable[
    [NDArray[np.floating], NDArray[np.int64], Sequence[DrawKey], "nn.Module | None"], NDArray[np.floating]
]
"""Images (B,C,H,W), classes (B,), a key per image and a changed model (None: the replica's own) to pixel maps (B,H,W).
The keys name the number of the call, so that an explainer with random numbers draws new ones each time."""


@contextmanager
def own_draws(key: DrawKey) -> Iterator[None]:
    """Seed the global streams that Quantus draws from, and put them back afterwards."""
    import torch

    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        seed = int(key.generator("quantus").integers(2**32))
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


@contextmanager
def lent_numpy_names() -> Iterator[None]:
    """Lend NumPy the names that Quantus 0.6 still uses and NumPy 2 removed, for the time of the call."""
    lent: dict[str, Any] = {}
    if not hasattr(np, "trapz"):
        lent["trapz"] = np.trapezoid
    if not hasattr(np, "NaN"):
        lent["NaN"] = np.nan
    for name, value in lent.items():
        setattr(np, name, value)
    try:
        yield
    finally:
        for name in lent:
            delattr(np, name)


def keyed_explanations(
    explain: Explain | None, keys: Sequence[DrawKey], changes_weights: bool
) -> Callable[..., NDArray[np.floating]] | None:
    """Quantus's `explain_func`: maps (B,1,H,W) by `explain`, with new keys for every call.

    changes_weights: the models that Quantus hands over differ from the replica's and are passed on.
    """
    if explain is None:
        return None
    num_calls = itertools.count()

    def explain_func(model: Any, inputs: Any, targets: Any, **_: Any) -> NDArray[np.floating]:
        images, call = np.asarray(inputs), next(num_calls)
        fresh = [key.of_variant(f"quantus:{call}") for key in keys]
        maps = explain(images, np.asarray(targets), fresh, model if changes_weights else None)
        return np.array(maps).reshape(len(images), 1, *images.shape[-2:])

    return explain_func


def smoothed_explanations(quantus_object: Any, explain_func: Callable[..., Any]) -> Callable[..., NDArray[np.floating]]:
    """Smooth MPRT's inner mean over noisy inputs, with the run's explainer: Quantus 0.6 calls `quantus.explain` there
    and ignores the explainer it was given."""

    def explain_smooth(model: Any, x_batch: Any, y_batch: Any, std: Any, **_: Any) -> NDArray[np.floating]:
        noise = [np.random.randn(*x_batch.shape) * std for _ in range(quantus_object.nr_samples - 1)]  # noqa: NPY002
        maps = [explain_func(model, x_batch + copy, y_batch) for copy in [*noise, np.zeros_like(x_batch)]]
        return np.mean(maps, axis=0)

    return explain_smooth


def replica_module(predict: Predict) -> "nn.Module":
    """A module without weights whose forward pass is answered by `predict`."""
    import torch

    class Replica(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(np.array(predict(images.detach().cpu().numpy())))

    return Replica().eval()
