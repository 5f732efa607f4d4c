"""The call for one's own scripts and notebooks: a model and images in, attribution maps out.

Shape letters: B images, C channels, H W pixels, g v rows and columns of the token grid, K classes.
"""

import copy
import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xaibatch.errors import ModelError, UsageError
from xaibatch.explainers.base import ExplainInput
from xaibatch.explainers.resolve import resolve_explainer
from xaibatch.maps import on_tokens
from xaibatch.models.token_grid import token_grid_of
from xaibatch.perturb.runner import PlanRunner
from xaibatch.seeding import DrawKey

Resolution = Literal["token", "native"]


def explain(
    model: nn.Module,
    images_BCHW: Tensor,
    explainer: str,
    targets: int | Sequence[int] | Tensor | None = None,
    *,
    seed: int = 0,
    image_ids: Sequence[str] | None = None,
    batch_size: int = 8,
    resolution: Resolution = "token",
    **options: Any,
) -> Tensor:
    """Return attribution maps (B,g,v) on the model's token grid, in the images' dtype, on their device.

    model: from `xaibatch.load_model`, or any timm classifier (images -> logits); left as it is, also its mode.
    images_BCHW: normalised as the model expects; float64 images compute in float64 (on a float64 copy of the model).
    explainer: a name of `xaibatch list explainers`, `captum:<Class>`, `zennit:<composite>`, `package.module:function`.
    targets: class to explain, one for all or one per image; None: the class predicted for each image.
    seed, image_ids: random explainers key their draws by them; without ids an image is identified by its content, so
        that a map depends neither on the batch nor on the order.
    resolution: `native` returns the explainer's own granularity instead, (B,H,W) for pixel and segment explainers.
    options: the explainer's own options, e.g. `num_samples=200`.

    A positive value raises the target's logit; whether negative values occur is the explainer's `signed`. Maps that are
    all zero or hold NaN are returned as they are. Raises UnknownNameError, ConfigError for wrong names and options,
    ModelError for a model that the explainer cannot read or that cannot read the images, UsageError for images, ids
    and targets that are none.
    """
    _check_images(images_BCHW)
    ids = list(image_ids) if image_ids is not None else [_content_id(image) for image in images_BCHW]
    if len(ids) != len(images_BCHW) or batch_size < 1:
        raise UsageError(
            f"expected one id for each of {len(images_BCHW)} images and a batch size of at least 1, received "
            f"{len(ids)} ids and {batch_size}"
        )
    method = resolve_explainer(explainer)(**options)
    model = _ready(model, images_BCHW)
    runner = PlanRunner(model=model, batch_size=32)
    targets_B = _targets(targets, images_BCHW, runner)
    maps = []
    for start in range(0, len(images_BCHW), batch_size):
        rows = slice(start, start + batch_size)
        inputs = ExplainInput(
            model=model,
            images_BCHW=images_BCHW[rows],
            targets_B=targets_B[rows],
            keys=tuple(DrawKey(seed=seed, image_id=image_id) for image_id in ids[rows]),
            run_plans=partial(runner.run, images_BCHW[rows]),
        )
        maps.append(method.explain(inputs).maps_Bhw.detach())
    maps_Bhw = torch.cat(maps)
    if resolution == "native" or maps_Bhw.shape[1:] != images_BCHW.shape[2:]:
        return maps_Bhw
    height, width = images_BCHW.shape[2:]
    grid = token_grid_of(model, (height, width))
    grids = [on_tokens(map_HW.cpu().numpy(), grid) for map_HW in maps_Bhw]
    return torch.stack([torch.as_tensor(grid) for grid in grids]).to(maps_Bhw)


def _check_images(images_BCHW: object) -> None:
    if not isinstance(images_BCHW, Tensor):
        raise UsageError(f"images must be a tensor (B,C,H,W), received {type(images_BCHW).__name__}")
    if images_BCHW.ndim != 4 or not images_BCHW.numel():
        raise UsageError(f"images must be (B,C,H,W) with at least one image, received shape {tuple(images_BCHW.shape)}")
    if not images_BCHW.is_floating_point():
        raise UsageError(
            f"images must be normalised floats as the model expects them, received {images_BCHW.dtype}: "
            "`model.preprocessing.apply` of a model from xaibatch.load_model makes them"
        )


def _ready(model: nn.Module, images_BCHW: Tensor) -> nn.Module:
    """The model itself where dtype, device and mode fit, else a copy that does."""
    parameter = next(model.parameters(), images_BCHW)
    if parameter.dtype == images_BCHW.dtype and parameter.device == images_BCHW.device and not model.training:
        return model
    return copy.deepcopy(model).to(dtype=images_BCHW.dtype, device=images_BCHW.device).eval()


def _targets(targets: int | Sequence[int] | Tensor | None, images_BCHW: Tensor, runner: PlanRunner) -> Tensor:
    """The classes to explain, int64 (B,); one image at least goes through the model, which shows what it can read."""
    num_images = len(images_BCHW)
    logits_BK = _logits(images_BCHW if targets is None else images_BCHW[:1], runner)
    if targets is None:
        return logits_BK.argmax(1).to(torch.int64)
    wanted = f"targets must be one class or {num_images} (one per image), each 0 to {logits_BK.shape[1] - 1}"
    try:
        given = torch.as_tensor(targets, device=images_BCHW.device)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{wanted}; received {targets!r}") from None
    if given.dtype.is_floating_point or given.dtype == torch.bool or given.shape not in ((), (num_images,)):
        raise UsageError(f"{wanted}; received {given.dtype} of shape {tuple(given.shape)}")
    if int(given.min()) < 0 or int(given.max()) >= logits_BK.shape[1]:
        raise UsageError(f"{wanted}; received {given.tolist()}")
    return given.to(torch.int64).expand(num_images)


def _logits(images_BCHW: Tensor, runner: PlanRunner) -> Tensor:
    try:
        logits_BK = runner.forward(images_BCHW)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        shape = tuple(images_BCHW.shape[1:])
        raise ModelError(f"the model cannot read images of shape (C,H,W) = {shape}: {error}") from error
    if logits_BK.ndim != 2:
        raise ModelError(f"the model must answer with logits (B,K), it gives shape {tuple(logits_BK.shape)}")
    return logits_BK


def _content_id(image_CHW: Tensor) -> str:
    """SHA-256 of the pixels in float32, so that float32 and float64 runs of one image draw the same numbers."""
    return hashlib.sha256(image_CHW.detach().cpu().to(torch.float32).numpy().tobytes()).hexdigest()
