"""Training options come in; the start model, patch dropping and averaged weights go out."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from xaibatch.data.storage import one_line
from xaibatch.errors import ModelError, UnknownNameError
from xaibatch.models.checkpoint import read_checkpoint
from xaibatch.training.mimetic import start_mimetic
from xaibatch.training.options import TrainOptions


def starting_model(options: TrainOptions, class_names: Sequence[str]) -> tuple[nn.Module, str]:
    """The timm model with a new head, and the words for what it starts from.

    Raises UnknownNameError for a name timm does not have, ModelError where weights cannot be read or nothing of them
    fits. Initial weights depend on the seed only; the global random state is left as it was.
    """
    if not timm.is_model(options.model):
        raise UnknownNameError("timm model", options.model, timm.list_models("vit_*_patch16_*"))
    # timm's plain ViTs take these; `fused_attn` is left to timm.
    settings: dict[str, Any] = {
        "num_classes": len(class_names),
        "img_size": options.image_size,
        "drop_path_rate": options.drop_path,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        try:
            model = timm.create_model(options.model, pretrained=options.pretrained, **settings)
        except Exception as error:
            raise ModelError(f"timm cannot build {options.model!r} with {settings}: {one_line(error)[:300]}") from None
        if options.initialisation == "mimetic" and not options.pretrained:
            start_mimetic(model, torch.Generator().manual_seed(options.seed))
    if options.pretrained:
        return model, "from timm's pretrained weights"
    if options.checkpoint is None:
        return model, "from scratch" + (", mimetic" if options.initialisation == "mimetic" else "")
    state = read_checkpoint(options.checkpoint).state
    own = model.state_dict()
    fitting = {name: value.float() for name, value in state.items() if name in own and own[name].shape == value.shape}
    anew = sorted(set(own) - set(fitting))
    if len(fitting) < len(own) / 2:
        raise ModelError(
            f"checkpoint {options.checkpoint!r} does not fit {options.model!r}: "
            f"only {len(fitting)} of {len(own)} tensors have its names and shapes"
        )
    model.load_state_dict({**own, **fitting})
    return model, f"from {options.checkpoint}" + (f" ({', '.join(anew)} anew)" if anew else "")


class Averaged:
    """An exponential moving average of the weights (Polyak and Juditsky 1992); short memory in the first steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for mean, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)


@contextlib.contextmanager
def with_kept_patches(model: nn.Module, share: float) -> Iterator[None]:
    """Within the context a plain timm ViT sees a random share of the patches of each image in training mode.

    Patch dropout (Liu et al. 2022; He et al. 2022): cheaper steps and a regulariser. share 1 changes nothing. Raises
    ModelError for a model without timm's `norm_pre` place between embedding and blocks.
    """
    if share >= 1 or not model.training:
        yield
        return
    place = getattr(model, "norm_pre", None)
    if not isinstance(place, nn.Module):
        raise ModelError("kept_share below 1 needs a plain timm Vision Transformer")
    num_prefix = int(getattr(model, "num_prefix_tokens", 1))

    def drop(_module: nn.Module, _inputs: object, tokens_BND: Tensor) -> Tensor:
        num_patches = tokens_BND.shape[1] - num_prefix
        keys = torch.rand(len(tokens_BND), num_patches, device=tokens_BND.device)
        kept = keys.argsort(1)[:, : max(1, round(share * num_patches))] + num_prefix
        patches = tokens_BND.gather(1, kept[..., None].expand(-1, -1, tokens_BND.shape[2]))
        return torch.cat([tokens_BND[:, :num_prefix], patches], 1)

    handle = place.register_forward_hook(drop)
    try:
        yield
    finally:
        handle.remove()
