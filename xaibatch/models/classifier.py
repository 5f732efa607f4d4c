"""A timm model with everything needed to feed it and to read it: class names, preprocessing and where its weights
came from.

Shape letters: B images, C channels, H W pixels, K classes.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from xaibatch.data.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """Where a model's weights came from, for the run record.

    kind:         `checkpoint`, `timm pretrained` or `untrained`.
    checkpoint:   path or URL as given; None for the other kinds.
    sha256:       of the checkpoint file's bytes (hex).
    nested_under: key of the file under which the weights lay, empty at the top level.
    classes_from: what the class names were read from.
    """

    kind: str
    checkpoint: str | None = None
    sha256: str | None = None
    nested_under: str = ""
    classes_from: str = ""


class Classifier(nn.Module):
    """A classifier in eval mode whose parameters take no gradient.

    backbone:      the timm model, with its head.
    name:          its timm name.
    class_names:   one per logit, in the logits' order.
    preprocessing: from a decoded image to the model's input.
    source:        where the weights came from.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        class_names: tuple[str, ...],
        preprocessing: Preprocessing,
        source: WeightSource,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.name = name
        self.class_names = class_names
        self.preprocessing = preprocessing
        self.source = source

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits (B,K) of normalised images, in the dtype of images and weights."""
        logits_BK: Tensor = self.backbone(images_BCHW)
        return logits_BK
