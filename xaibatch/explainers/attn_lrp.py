"""AttnLRP: a trace in, signed relevance of the explained logit per patch (or pixel) out, by one changed backward pass.

Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers", ICML 2024, in its
gradient-times-input form: the logit is propagated back with changed gradients; relevance is input times what arrives.

- norms: what they divide by is constant, the mean is not (section 3.3.3);
- activations: gradient act(t) / (t + 1e-10) (the identity rule);
- gated products: half to each factor (the uniform rule, section 3.3.2);
- attention, `attn_lrp`: a quarter of the gradient into queries and keys, half into values (both products split evenly);
  `attn_lrp_cp`: none into queries and keys, all into values (CP-LRP, Ali et al., ICML 2022). The authors ship this
  hybrid for ViTs, so "AttnLRP for ViT" may mean either: compare like with like;
- patch projection, MLP and head: the gamma rule (`gamma_rule`); projections of attention: the ordinary gradient.

Deviation: LayerScale is folded into the linear layer before it, so that the gamma rule sees one layer.

Shape letters: B images, P patches, N tokens, D width, I values of a patch, g v grid, H W pixels; in the rule of
a layer O I its outputs and inputs, N images and tokens together.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput, Granularity
from xaibatch.models import backward as step
from xaibatch.models.trace import Part
from xaibatch.models.vit import Affine
from xaibatch.options import Options

OUTPUT_STABILISER = 1e-6
"""Added to the magnitude of the gamma rule's denominator."""

INPUT_STABILISER = 1e-10
"""Added to the magnitude of what relevance is divided by to become a gradient."""


class AttnLRPOptions(Options):
    """Strength of the gamma rule, and what the map shows."""

    gamma_conv: float | None = Field(default=0.25, ge=0)
    """Gamma of the patch projection; null: its ordinary gradient."""

    gamma_linear: float | None = Field(default=0.05, ge=0)
    """Gamma of MLP layers and head; null: their ordinary gradient. The authors search a grid of both per model."""

    level: Literal["patch", "token", "pixel"] = "patch"
    """`patch`: sum over each patch's pixels and channels, (B,g,v); `token`: relevance of the patch tokens before the
    position embedding, which gamma_conv does not touch, (B,g,v); `pixel`: sum over channels, (B,H,W)."""


class AttnLRPRules(step.PlainRules):
    """The changed gradients; attention factors as in full AttnLRP."""

    qk_factor = 0.25
    v_factor = 0.5
    gate_factor = 0.5

    def __init__(self, gamma_conv: float | None, gamma_linear: float | None) -> None:
        self.gamma_conv = gamma_conv
        self.gamma_linear = gamma_linear

    def linear(self, layer: Affine, x: step.Values, y: Tensor, g: Tensor) -> Tensor:
        return (
            super().linear(layer, x, y, g)
            if self.gamma_linear is None
            else gamma_rule(layer, x(), y, g, self.gamma_linear)
        )

    def patch(self, layer: Affine, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        return super().patch(layer, x, y, g) if self.gamma_conv is None else gamma_rule(layer, x, y, g, self.gamma_conv)

    def norm(self, norm: nn.Module, x: Tensor, g: Tensor) -> Tensor:
        if isinstance(norm, nn.Identity):
            return g
        g = step.weighted(norm, g) * step.inverse_scale(norm, x)
        return g.sub_(g.mean(-1, keepdim=True)) if isinstance(norm, nn.LayerNorm) else g

    def activation(self, act: Callable[[Tensor], Tensor], t: Tensor, y: step.Values, g: Tensor) -> Tensor:
        return (g * y()).div_(t + INPUT_STABILISER)


class HybridRules(AttnLRPRules):
    """CP-LRP inside attention: the attention weights are constants."""

    qk_factor = 0.0
    v_factor = 1.0


def gamma_rule(layer: Affine, x: Tensor, y: Tensor, g: Tensor, gamma: float) -> Tensor:
    """Input gradient of the gamma rule (Montavon et al. 2019) generalised to either sign (Andéol et al. 2021).

    With W± = W + γW^±, b± alike, R = g·y: outputs above zero share R by x⁺W₊ + x⁻W₋ (+ b₊), those below by x⁺W₋ + x⁻W₊
    (+ b₋); the bias keeps its share. Since W^± = ½(W ± |W|) and x^± = ½(x ± |x|), either denominator is
    y(1 + γ/2) ± γ/2 (|x||W| + |b|), with y's sign, and the relevance is x (1 + γ/2) (s W) + γ/2 |x| (s sign(y) |W|) for
    s = R over it: three products. Denominator and input are stabilised by OUTPUT_STABILISER and INPUT_STABILISER.
    """
    x_NI, y_NO, g_NO = (t.flatten(0, -2) for t in (x, y, g))
    size, magnitude = y_NO.abs(), x_NI.abs()
    bias = OUTPUT_STABILISER if layer.bias_O is None else layer.bias_O.abs() * (gamma / 2) + OUTPUT_STABILISER
    denominator = (size * (1 + gamma / 2)).add_(bias)
    if not gamma:
        relevance = torch.mm(size.mul_(g_NO).div_(denominator), layer.weight_OI).mul_(magnitude)
        return relevance.div_(magnitude.add_(INPUT_STABILISER)).view_as(x)
    absolute = layer.weight_OI.abs()
    denominator.addmm_(magnitude, absolute.t(), alpha=gamma / 2)
    share = torch.div(g_NO, denominator, out=denominator)
    relevance = torch.mm(size.mul_(share).mul_(1 + gamma / 2), layer.weight_OI).mul_(magnitude)
    relevance.addcmul_(torch.mm(share.mul_(y_NO), absolute), x_NI, value=gamma / 2)
    return relevance.div_(magnitude.add_(INPUT_STABILISER)).view_as(x)


@EXPLAINERS.register("attn_lrp")
class AttnLRP(Explainer):
    """Full AttnLRP; positive raises the explained logit. (B,g,v), or (B,H,W) at pixel level."""

    name = "attn_lrp"
    title = "AttnLRP"
    paper = "Achtibat et al.: AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers, ICML 2024"
    signed = True
    granularity: Granularity = "token"
    needs = "vit"
    Options = AttnLRPOptions
    options: AttnLRPOptions
    rules: ClassVar[type[AttnLRPRules]] = AttnLRPRules

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.granularity = "pixel" if self.options.level == "pixel" else "token"

    def explain(self, inputs: ExplainInput) -> Attribution:
        return Attribution(maps_Bhw=inputs.trace.map(self.relevance))

    def cost(self) -> str:
        return "1 forward + 1 relevance pass"

    def relevance(self, part: Part) -> Tensor:
        """The map of a trace's part, (B,g,v) or (B,H,W)."""
        record = part.record
        rules = self.rules(self.options.gamma_conv, self.options.gamma_linear)
        g_BND = step.to_first_block(record, step.one_hot(part.targets_B, record), rules)
        if self.options.level == "token":
            g_BPD = step.through_position(record, g_BND, rules)[:, part.layers.num_prefix :]
            return part.on_grid((g_BPD * record.embedded_BPD).sum(-1))
        relevance_BPI = step.through_embedding(record, g_BND, rules).mul_(record.patches())
        return (
            part.on_grid(relevance_BPI.sum(-1))
            if self.options.level == "patch"
            else part.from_patches(relevance_BPI).sum(1)
        )


@EXPLAINERS.register("attn_lrp_cp")
class AttnLRPHybrid(AttnLRP):
    """AttnLRP with CP-LRP inside attention, as its authors ship it for ViTs."""

    name = "attn_lrp_cp"
    title = "AttnLRP, CP-LRP in attention"
    rules = HybridRules
