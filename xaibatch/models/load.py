"""A timm name and a checkpoint in, a `Classifier` ready to be explained out."""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from xaibatch.data.preprocess import Preprocessing, from_metadata, from_timm
from xaibatch.data.storage import one_line
from xaibatch.errors import ModelError, UnknownNameError
from xaibatch.models.checkpoint import Checkpoint, class_names_of, read_checkpoint
from xaibatch.models.classifier import Classifier, WeightSource
from xaibatch.options import validated

HEADS = ("head", "head.fc", "fc", "classifier")
"""Where timm models keep their classification layer, for those whose configuration does not say."""

FROM_DATA, FROM_INDICES = "the data", "their indices"
"""`WeightSource.classes_from` where neither the caller nor the checkpoint names the classes."""

NUM_NAMED = 4
"""Keys that a message names before it counts the rest."""


def load_model(
    name: str,
    *,
    checkpoint: str | None = None,
    class_names: Sequence[str] | None = None,
    data_class_names: Sequence[str] | None = None,
    pretrained: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Classifier:
    """Build a timm model and load its weights; eval mode, no gradients for parameters.

    checkpoint:       `.safetensors`, or a `.pth`/`.pt`/`.bin` of tensors only, local or any fsspec URL. The numbers
                      of classes and input channels follow from it, for a plain ViT its image size too. Half-precision
                      weights are cast to `dtype`.
    class_names:      names in the logits' order; None: the checkpoint's metadata, a JSON beside it, else
                      `data_class_names`, else "0", "1", ...
    data_class_names: the labels of the data, sorted: a last resort for a checkpoint that names no classes.
    pretrained:       timm's own weights instead of a checkpoint (network, or timm's cache).
    preprocessing:    fields that replace those of the checkpoint's record or timm's configuration.
    model_options:    keyword arguments for timm, e.g. `{"img_size": 384}`.
    seed:             of the initial weights, where there is neither checkpoint nor pretraining. Global random state
                      is left alone.

    Raises UnknownNameError for a name timm does not have; ModelError for a checkpoint that cannot be read or does not
    fit, and for class names of another number.
    """
    if timm.is_model(name) is False:
        _refuse_name(name)
    if checkpoint is not None and pretrained:
        raise ModelError("give a checkpoint or pretrained weights, not both")
    options = dict(model_options or {})
    loaded = None if checkpoint is None else read_checkpoint(checkpoint)
    if loaded is None:
        known = class_names if pretrained else class_names or data_class_names
        count = {"num_classes": len(known)} if known else {}
        backbone = _created(name, {**count, **options}, pretrained, seed)
    else:
        backbone = _fitted(name, loaded, options, seed)
    names, classes_from = _class_names(backbone, loaded, class_names, data_class_names)
    kind = "checkpoint" if loaded else "timm pretrained" if pretrained else "untrained"
    source = WeightSource(kind=kind, classes_from=classes_from)
    if loaded is not None:
        source = WeightSource(
            kind=kind,
            checkpoint=loaded.path,
            sha256=loaded.sha256,
            nested_under=loaded.nested_under,
            classes_from=classes_from,
        )
    model = Classifier(
        backbone,
        name=name,
        class_names=names,
        preprocessing=_preprocessing(backbone, loaded, preprocessing),
        source=source,
    )
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _refuse_name(name: str) -> None:
    known = timm.list_models()
    near = get_close_matches(name, known, n=8, cutoff=0.4) or timm.list_models("vit_*_patch16_224")
    raise UnknownNameError(f"timm model (timm has {len(known)}; some near ones are listed)", name, near)


def _created(name: str, options: Mapping[str, Any], pretrained: bool, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:
            what = "timm's pretrained weights" if pretrained else f"timm's {name!r} with {dict(options)}"
            hint = ": give a local checkpoint where there is no network" if pretrained else ""
            raise ModelError(f"cannot load {what}{hint} ({one_line(error)[:300]})") from None


def _fitted(name: str, checkpoint: Checkpoint, options: dict[str, Any], seed: int) -> nn.Module:
    """The timm model with the checkpoint's weights in it, sized after the checkpoint."""
    state = checkpoint.state
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own = getattr(config, "classifier", None) or ()
    heads = ((own,) if isinstance(own, str) else tuple(own)) + HEADS
    head = next((f"{key}.weight" for key in heads if f"{key}.weight" in state), None)
    if head is None:
        raise ModelError(
            f"checkpoint {checkpoint.path!r} has no classification layer (such as head.weight): "
            "expected a trained classifier"
        )
    sizes = {"num_classes": state[head].shape[0]}
    first = state.get(f"{getattr(config, 'first_conv', None)}.weight")
    if first is not None and first.ndim == 4 and first.shape[1] != 3:
        sizes["in_chans"] = first.shape[1]
    backbone = _created(name, {**sizes, **options}, False, seed)
    image_size = _image_size_of(backbone, state)
    if image_size is not None and "img_size" not in options:
        backbone = _created(name, {**sizes, **options, "img_size": image_size}, False, seed)
    _check_fit(name, backbone, checkpoint)
    backbone.load_state_dict(dict(state), strict=True)
    bad = next((key for key, value in backbone.state_dict().items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise ModelError(f"checkpoint {checkpoint.path!r}: {bad!r} holds values that are not finite")
    return backbone


def _image_size_of(backbone: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Side in pixels that the checkpoint's position embedding was made for, where it differs from a plain ViT's own;
    None where it does not."""
    found = state.get("pos_embed")
    if not isinstance(backbone, VisionTransformer) or not isinstance(backbone.pos_embed, Tensor) or found is None:
        return None
    expected = backbone.pos_embed.shape
    if found.shape == expected or found.ndim != 3 or found.shape[2] != expected[2]:
        return None
    num_prefix = expected[1] - backbone.patch_embed.num_patches
    side = math.isqrt(max(found.shape[1] - num_prefix, 0))
    if side == 0 or side * side != found.shape[1] - num_prefix:
        return None
    return side * int(backbone.patch_embed.patch_size[0])


def _check_fit(name: str, backbone: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise ModelError naming what is missing, unexpected or of another shape."""
    state, expected = checkpoint.state, backbone.state_dict()
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = (
        ("missing", [key for key in expected if key not in state]),
        ("unexpected", sorted(key for key in state if key not in expected)),
        ("of another shape", shapes),
    )
    listed = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in problems if keys]
    if not listed:
        return
    size = _image_size_of(backbone, state)
    sizes = ""
    if size is not None:
        own = backbone.patch_embed.img_size[0]  # type: ignore[union-attr,index]
        sizes = (
            f" Its position embedding is for images of {size} pixels, the model is built for {own}: "
            f"set img_size to {size} or leave it out."
        )
    raise ModelError(f"checkpoint {checkpoint.path!r} does not fit {name!r}: {'; '.join(listed)}.{sizes}")


def _class_names(
    backbone: nn.Module, checkpoint: Checkpoint | None, given: Sequence[str] | None, of_data: Sequence[str] | None
) -> tuple[tuple[str, ...], str]:
    num_classes = int(backbone.num_classes)  # type: ignore[arg-type]
    recorded = None
    if checkpoint is not None:
        try:
            recorded = class_names_of(checkpoint.metadata)
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"checkpoint {checkpoint.path!r}: its class names cannot be read: {one_line(error)}"
            ) from None
    where = "the checkpoint"
    if checkpoint is not None and "json" in checkpoint.metadata:
        where = f"the checkpoint or {checkpoint.metadata['json']} beside it"
    for names, origin in ((given, "the caller"), (recorded, where), (of_data, FROM_DATA)):
        if names is None:
            continue
        if len(names) != num_classes:
            raise ModelError(
                f"the model has {num_classes} classes but {origin} names {len(names)} ({_some(list(names))}): "
                "name the model's classes in the order of its outputs"
            )
        if len(set(names)) != len(names):
            raise ModelError(f"{origin} gives a class name twice: {', '.join(names)}")
        return tuple(names), origin
    return tuple(map(str, range(num_classes))), FROM_INDICES


def _preprocessing(
    backbone: nn.Module, checkpoint: Checkpoint | None, overrides: Mapping[str, Any] | None
) -> Preprocessing:
    config: dict[str, Any] = resolve_model_data_config(backbone)  # type: ignore[no-untyped-call]
    channels, *size = config["input_size"]
    embed = getattr(backbone, "patch_embed", None)
    size = getattr(embed, "img_size", None) or size
    first_conv = getattr(backbone, "pretrained_cfg", {}).get("first_conv")
    if first_conv:
        channels = backbone.get_parameter(f"{first_conv}.weight").shape[1]
    image_size = (int(size[0]), int(size[1]))
    metadata = checkpoint.metadata if checkpoint is not None else {}
    found = from_metadata(metadata, image_size, channels, "checkpoint metadata")
    if found is None:
        found = from_timm({**config, **(metadata.get("pretrained_cfg") or {})}, image_size, channels)
    if overrides:
        changed = {**found.model_dump(), **overrides, "source": f"{found.source}, changed by the caller"}
        found = validated(Preprocessing, changed, "preprocessing")
    if found.channels != channels or (getattr(embed, "strict_img_size", False) and found.image_size != image_size):
        raise ModelError(
            f"the preprocessing makes images of {found.channels} channels and {found.image_size} pixels, "
            f"the model takes {channels} channels and {image_size} pixels"
        )
    return found


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
