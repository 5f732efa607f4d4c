"""Raw attention of the last block: a trace in, how much the head's token looks at each patch out."""

from torch import Tensor

from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput
from xaibatch.models.trace import Part
from xaibatch.options import Options


@EXPLAINERS.register("raw_attention")
class RawAttention(Explainer):
    """The class token's row, mean over heads, (B,g,v); with average pooling the mean of the pooled tokens' rows (ours).

    Not renormalised: the share of class and register tokens is left out, so a map sums to less than one.
    """

    name = "raw_attention"
    title = "Raw attention (last block)"
    paper = "Caron et al.: Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021 (its maps per head)"
    signed = False
    granularity = "token"
    needs = "vit"
    Options = Options

    def explain(self, inputs: ExplainInput) -> Attribution:
        return Attribution(maps_Bhw=inputs.trace.map(last_attention))


def last_attention(part: Part) -> Tensor:
    """The map of a trace's part, (B,g,v)."""
    row_BN = part.read_rows(part.blocks[-1].attention_BhQN.mean(1))
    return part.on_grid(row_BN[:, part.layers.num_prefix :])
