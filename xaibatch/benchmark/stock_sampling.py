"""A classifier, one image and a class in, one map out: sampling methods by the packages and scripts people use.

Shape letters: C channels, H W pixels, K classes, S copies, N copies of one call.
"""

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LIME_BATCH = 10
"""Copies in one call of the model: the `lime` package's default, which the study kept."""

RISE_BATCH = 100
"""Masks in one forward pass, as in the script of RISE's authors."""


def lime_package(
    model: Any, image_CHW: Tensor, target: int, *, num_samples: int, top_k: int | None = None, seed: int = 0
) -> NDArray[np.float64]:
    """`LimeImageExplainer.explain_instance` with hide colour 0 and its own superpixels.

    Returns the weights painted on their superpixels (H,W), or the mask of the `top_k` most positive ones.
    """
    from lime.lime_image import LimeImageExplainer

    image_HWC = image_CHW.permute(1, 2, 0).cpu().numpy()
    explainer = LimeImageExplainer(random_state=seed)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
        explanation = explainer.explain_instance(
            image_HWC,
            _probabilities(model, image_CHW.device),
            top_labels=3,
            hide_color=0,
            num_samples=num_samples,
            batch_size=LIME_BATCH,
        )
    if top_k is not None:
        _, mask_HW = explanation.get_image_and_mask(target, positive_only=True, num_features=top_k, hide_rest=False)
        return np.asarray(mask_HW, np.float64)
    weights_M = np.zeros(int(explanation.segments.max()) + 1)
    for segment, weight in explanation.local_exp[target]:
        weights_M[segment] = weight
    painted_HW: NDArray[np.float64] = weights_M[explanation.segments]
    return painted_HW


def captum_on_superpixels(
    kind: str,
    model: Any,
    image_CHW: Tensor,
    target: int,
    segments_HW: NDArray[np.int32],
    *,
    num_samples: int,
    batch: int,
) -> Tensor:
    """captum.attr.Lime or KernelShap on given superpixels, hidden ones zero, `batch` copies in a forward pass."""
    import captum.attr

    mask_HW = torch.as_tensor(segments_HW, dtype=torch.int64, device=image_CHW.device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        attribution: Tensor = getattr(captum.attr, kind)(model).attribute(
            image_CHW[None],
            target=target,
            feature_mask=mask_HW.expand(1, *image_CHW.shape),
            n_samples=num_samples,
            perturbations_per_eval=batch,
        )
    return attribution[0].sum(0)


def captum_occlusion(model: Any, image_CHW: Tensor, target: int, *, window: int, stride: int, batch: int) -> Tensor:
    """captum.attr.Occlusion with a square window, `batch` positions in a forward pass."""
    import captum.attr

    channels = image_CHW.shape[0]
    with torch.no_grad():
        attribution: Tensor = captum.attr.Occlusion(model).attribute(
            image_CHW[None],
            target=target,
            sliding_window_shapes=(channels, window, window),
            strides=(channels, stride, stride),
            baselines=0,
            perturbations_per_eval=batch,
        )
    return attribution[0].sum(0)


def rise_script(
    model: Any, image_CHW: Tensor, target: int, *, num_masks: int, cells: int = 7, keep: float = 0.5, seed: int = 0
) -> Tensor:
    """RISE as its authors' script has it: masks resized one by one with scikit-image, all held at pixel resolution."""
    from skimage import transform

    resize: Any = transform.resize  # untyped there

    generator = np.random.default_rng(seed)
    height, width = image_CHW.shape[1:]
    cell = (-(-height // cells), -(-width // cells))
    size = ((cells + 1) * cell[0], (cells + 1) * cell[1])
    masks = np.empty((num_masks, height, width))
    for mask_HW in masks:
        grid = (generator.random((cells, cells)) < keep).astype("float32")
        top, left = generator.integers(0, cell[0]), generator.integers(0, cell[1])
        large = resize(grid, size, order=1, mode="reflect", anti_aliasing=False)
        mask_HW[:] = large[top : top + height, left : left + width]
    masks_SHW = torch.as_tensor(masks.astype("float32"), device=image_CHW.device)
    outputs = []
    with torch.no_grad():
        for chunk_NHW in torch.split(masks_SHW, RISE_BATCH):
            outputs.append(model(image_CHW * chunk_NHW[:, None]).softmax(1)[:, target])
    return torch.tensordot(torch.cat(outputs), masks_SHW, 1) / num_masks / keep


def _probabilities(model: Any, device: torch.device) -> Callable[[NDArray[np.floating]], NDArray[np.floating]]:
    """The function that `lime` asks: images (N,H,W,C) to probabilities (N,K)."""

    def predict(images_NHWC: NDArray[np.floating]) -> NDArray[np.floating]:
        images_NCHW = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images_NHWC]).to(device)
        with torch.no_grad():
            probabilities: NDArray[np.floating] = model(images_NCHW).softmax(1).cpu().numpy()
        return probabilities

    return predict
