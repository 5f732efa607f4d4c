"""`xaibatch evaluate --estimate`: a configuration in, lines on what the run will cost and what that rests on out."""

import os
from dataclasses import replace

from xaibatch.config import RunConfig
from xaibatch.pipeline.estimate import Estimate


def estimate_lines(config: RunConfig) -> list[str]:
    """Count the forward passes of what is left of the run, measure this machine's rate on the device a run here would
    use, and say both."""
    from xaibatch.errors import EngineError
    from xaibatch.pipeline.device import device_here
    from xaibatch.pipeline.facts import configured_model, forward_rate
    from xaibatch.pipeline.run import preview

    expected = preview(config)
    if not expected.num_cells:
        return ["everything is done: nothing to run"]
    try:
        device = device_here(config.engine)
    except EngineError:  # a GPU of the cluster is meant
        device = "cpu"
    if expected.seconds is None:
        rate = forward_rate(configured_model(config).to(device))
        expected = replace(expected, seconds=expected.worth / rate)
    remote = bool(config.engine.address or os.environ.get("RAY_ADDRESS")) or device != config.engine.device != "auto"
    return described(expected, device, remote=remote)


def described(expected: Estimate, device: str, *, remote: bool) -> list[str]:
    """An estimate as a person reads it. device: where its seconds were measured; remote: the run will be elsewhere."""
    from xaibatch.pipeline.progress import duration

    lines = [
        f"{expected.num_images:,} images, {expected.num_cells:,} cells, about {expected.num_forward_passes:,} "
        "forward passes:"
    ]
    width = max(map(len, expected.by_label), default=0)
    lines += [
        f"  {label:<{width}}  {num:>13,}  {num / expected.num_forward_passes:>4.0%}"
        for label, num in expected.by_label.items()
    ]
    if expected.seconds is not None:
        place = {"cpu": "on this machine's CPU", "cuda": "on one of this machine's GPUs"}[device]
        elsewhere = "; the cluster's devices may be faster or slower, and several share the work" if remote else ""
        rate = expected.worth / expected.seconds
        lines.append(
            f"about {duration(expected.seconds)} for one model replica, at the {rate:,.0f} forward passes a second "
            f"just measured {place} in float32{elsewhere}"
        )
    lines.append("not counted: start-up, superpixels, scores and writing, which run beside the model")
    if expected.uncounted:
        lines.append(f"not counted, or in part: {', '.join(expected.uncounted)}, which call the model themselves")
    return lines
