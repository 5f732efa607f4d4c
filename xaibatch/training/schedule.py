"""Progress through a training run comes in; the learning rate goes out."""

import math


def warmup_cosine(progress: float, warmup: float, final: float) -> float:
    """Factor on the learning rate: linear from 0 to 1 over `warmup`, then a cosine down to `final` at progress 1.

    progress, warmup: shares of the whole run, 0 to 1. Loshchilov and Hutter 2017 (no restarts), Goyal et al. 2017.

    >>> [round(warmup_cosine(p, warmup=0.1, final=0.0), 3) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    share = min(1.0, (progress - warmup) / (1 - warmup)) if warmup < 1 else 1.0
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share))
