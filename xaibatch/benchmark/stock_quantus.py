"""Images, maps and a Quantus class in, its scores out: stock Quantus 0.6, called as its users call it.

Shape letters: B images, C channels, H W pixels.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from xaibatch.metrics.quantus_environment import lent_numpy_names, own_draws
from xaibatch.seeding import DrawKey

_DRAWS: Final = DrawKey(seed=0, image_id="benchmark")

ExplainFunc = Callable[..., NDArray[np.floating]]
"""(model, inputs, targets, **kwargs) -> maps (B,1,H,W)."""


def stock_score(
    name: str,
    options: Mapping[str, Any],
    *,
    model: Any,
    x_BCHW: NDArray[np.floating],
    y_B: NDArray[np.int64],
    maps_B1HW: NDArray[np.floating],
    explain_func: ExplainFunc | None,
    batch_size: int,
    device: str,
) -> Any:
    """What the Quantus metric returns for these images, with the same draws in every call; its arguments are copies,
    since it changes them."""
    import quantus

    with own_draws(_DRAWS), lent_numpy_names(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = getattr(quantus, name)(
            disable_warnings=True, display_progressbar=False, return_aggregate=False, **options
        )
        return metric(
            model=model,
            x_batch=x_BCHW.copy(),
            y_batch=y_B.copy(),
            a_batch=maps_B1HW.copy(),
            explain_func=explain_func,
            channel_first=True,
            batch_size=batch_size,
            device=device,
        )
