"""Attention times gradient: a trace in, positive relevance per patch token out.

Chefer, Gur, Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers",
ICCV 2021, eq. 5-6: R starts as the identity; every block adds mean over heads of (∂logit/∂A · A)⁺, times R. The map is
the class token's row. Only that row is multiplied, from the last block down; average pooling reads the mean of the
pooled tokens' rows (our extension). The head mean is per image, where the published function on a batch mixes images.

Shape letters: B images, N tokens, Q read tokens, g v grid.
"""

from torch import Tensor

from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput
from xaibatch.models.trace import Part
from xaibatch.options import Options


@EXPLAINERS.register("attention_gradient")
class AttentionGradient(Explainer):
    """Gradient-weighted attention multiplied through the blocks; non-negative, (B,g,v)."""

    name = "attention_gradient"
    title = "Attention × gradient"
    paper = "Chefer, Gur, Wolf: Generic Attention-model Explainability, ICCV 2021"
    signed = False
    granularity = "token"
    needs = "vit"
    Options = Options

    def explain(self, inputs: ExplainInput) -> Attribution:
        return Attribution(maps_Bhw=inputs.trace.map(attention_times_gradient))

    def cost(self) -> str:
        return "1 forward + 1 backward"


def attention_times_gradient(part: Part) -> Tensor:
    """The map of a trace's part, (B,g,v)."""
    row = part.start_row()
    for block, gradient_BhQN in zip(reversed(part.blocks), reversed(part.attention_gradients), strict=True):
        layer_BQN = (gradient_BhQN * block.attention_BhQN).clamp_(min=0).mean(1)
        row = row + row[:, :, : layer_BQN.shape[1]] @ layer_BQN
    return part.on_grid(row[:, 0, part.layers.num_prefix :])
