"""The trace equals model and autograd for every supported ViT, leaves it alone, is lazy and lean, refuses others."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, DiffAttention
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.slow_vit import VARIANTS, attentions_and_gradients, images_for, make_vit, watched
from xaibatch.errors import ModelError
from xaibatch.explainers.attention_rollout import AttentionRolloutMean
from xaibatch.explainers.attn_lrp import AttnLRP, AttnLRPHybrid
from xaibatch.explainers.transformer_lrp import TransformerLRP
from xaibatch.models.trace import Trace, record
from xaibatch.models.vit import plain_vit


class Wrapped(nn.Module):
    """A classifier around a backbone, as a loader may return it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_attentions_and_gradients_equal_autograd(variant: str) -> None:
    model = make_vit(variant)
    images, targets = images_for(model)
    trace = record(model, images, targets, images_per_part=2)
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    torch.testing.assert_close(trace.logits_BK, logits.detach(), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), leaf)
    torch.testing.assert_close(trace.map(lambda part: part.image_gradient), gradient, rtol=1e-9, atol=1e-12)
    for b in range(len(images)):
        maps, gradients = attentions_and_gradients(model, images[b : b + 1], int(targets[b]))
        part, row = trace.parts[b // 2], b % 2
        for i, block in enumerate(part.blocks):
            torch.testing.assert_close(part.full_attentions[i][row], maps[i], rtol=1e-10, atol=1e-14)
            read = block.num_read
            torch.testing.assert_close(part.attention_gradients[i][row], gradients[i][:, :read], rtol=1e-9, atol=1e-13)
            assert not gradients[i][:, read:].any()


def test_gradient_at_the_last_norm() -> None:
    for variant in ("plain", "average", "one_block"):
        model = make_vit(variant)
        images, targets = images_for(model)
        with watched(model) as (twin, _, outputs):
            logits = twin(images)
            at = outputs[f"blocks.{len(twin.blocks) - 1}.norm1"]
            (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), at)
        ours = record(model, images, targets).map(lambda part: part.last_norm1_gradient)
        torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arithmetic_is_the_models_own(dtype: torch.dtype) -> None:
    model = make_vit("plain").to(dtype)
    images, targets = images_for(model)
    trace = record(Wrapped(model), images.to(dtype), targets)
    assert trace.logits_BK.dtype == dtype
    assert trace.map(TransformerLRP().relevance).dtype == dtype
    with pytest.raises(ModelError, match=r"images are torch.float16 on cpu, the model torch"):
        record(model, images.half(), targets)


def state(model: nn.Module) -> list[Any]:
    """Everything of a model that a trace could leave changed."""
    seen: list[Any] = []
    for module in model.modules():
        hooks = [value for name, value in vars(module).items() if "hook" in name]
        seen.append((type(module), module.training, getattr(module, "fused_attn", None), [list(h) for h in hooks if h]))
        seen.append(sorted(name for name in vars(module) if name == "forward"))
    for name, parameter in model.named_parameters():
        seen.append((name, parameter.requires_grad, parameter.grad is None, parameter.detach().clone().tolist()))
    return seen


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_unchanged(training: bool) -> None:
    model = make_vit("plain").train(training)
    model.blocks[0].requires_grad_(False)
    images, targets = images_for(model)
    before = state(model)
    trace = record(model, images, targets)
    for explain in (TransformerLRP().relevance, TransformerLRP(method="full").relevance, AttnLRP().relevance):
        assert not trace.map(explain).requires_grad
    assert state(model) == before
    model.blocks[1].mlp.fc2.bias = nn.Parameter(torch.zeros(7).double())  # does not fit: fails half-way
    before = state(model)
    with pytest.raises(RuntimeError):
        record(model, images, targets)
    assert state(model) == before


def test_works_under_inference_mode_autocast_and_dropout() -> None:
    model = make_vit("plain")
    images, targets = images_for(model)
    expected = record(model, images, targets).map(TransformerLRP().relevance)
    dropping = copy.deepcopy(model)
    for module in dropping.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    dropping.train()
    assert torch.equal(record(dropping, images, targets).map(TransformerLRP().relevance), expected)
    with torch.inference_mode():
        assert torch.equal(record(model, images, targets).map(TransformerLRP().relevance), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(record(model, images, targets).map(TransformerLRP().relevance), expected)
    silu = make_vit("no_position")
    with torch.inference_mode():
        assert record(silu, images, targets).map(TransformerLRP().relevance).isfinite().all()


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    model = make_vit("plain")
    trace = record(model, *images_for(model))
    part = trace.parts[0]
    trace.map(AttentionRolloutMean().rollout)
    trace.map(TransformerLRP(method="rollout").relevance)
    assert "_backward" not in vars(part)
    trace.map(TransformerLRP().relevance)
    assert "_backward" in vars(part)
    assert "image_gradient" not in vars(part)


def test_products_cost_less_than_five_forward_passes() -> None:
    """Multiply-adds of all matrix products, counted: a bound that no busy machine can blur."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    images, targets = torch.randn(1, 3, 224, 224), torch.tensor([1])

    def products(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def explain(*relevances: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: [trace.map(f) for trace in [record(model, images, targets)] for f in relevances]

    with torch.no_grad():
        forward = products(lambda: model(images))
    lrp = products(explain(TransformerLRP().relevance))
    assert lrp < 4.8 * forward
    assert products(explain(TransformerLRP().relevance, AttnLRP().relevance)) < 1.7 * lrp
    assert products(explain(TransformerLRP().relevance, AttnLRP().relevance, AttnLRPHybrid().relevance)) < 2.2 * lrp


class Gated(Attention):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, gated=True)


def peak_bytes(run: Callable[[], object]) -> int:
    """Highest number of bytes allocated on the CPU during a call, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.filterwarnings("ignore::UserWarning")  # the profiler's own, about clearing events
def test_peak_memory_is_within_half_again_of_forward_and_backward() -> None:
    """Against timm's forward and autograd's backward that keep attention maps and their gradients."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=6).eval().requires_grad_(False)
    images, targets = torch.randn(4, 3, 224, 224), torch.tensor([0, 1, 2, 0])
    maps: list[Tensor] = []
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))

    def plain() -> object:
        maps.clear()
        logits = twin(images.clone().requires_grad_())
        return maps, torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), maps)

    def traced() -> tuple[Trace, Tensor]:
        trace = record(model, images, targets)
        return trace, trace.map(TransformerLRP().relevance)

    assert peak_bytes(traced) < 1.5 * peak_bytes(plain)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: timm.create_model("resnet18"), "ResNet is not a plain Vision Transformer"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer is not"),
        (lambda: Wrapped(nn.Linear(1, 1)), "Wrapped (its backbone is a Linear) is not"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), "VisionTransformerDistilled has its own"),
        (lambda: timm.create_model("vit_small_r26_s32_224"), "patch_embed = HybridEmbed"),
        (partial(VisionTransformer, depth=1, global_pool="map"), "attention pooling (global_pool='map')"),
        (partial(VisionTransformer, depth=1, global_pool="max"), "global_pool='max'"),
        (partial(VisionTransformer, depth=1, num_classes=0), "head = Identity"),
        (partial(VisionTransformer, depth=1, block_fn=ParallelScalingBlock), "blocks.0 = ParallelScalingBlock"),
        (partial(VisionTransformer, depth=1, block_fn=ResPostBlock), "blocks.0 = ResPostBlock"),
        (partial(VisionTransformer, depth=1, attn_layer=DiffAttention), "blocks.0.attn = DiffAttention"),
        (partial(VisionTransformer, depth=1, attn_layer=Gated), "gated attention (blocks.0.attn.gate)"),
        (partial(VisionTransformer, depth=1, scale_attn_norm=True), "attention or MLP (blocks.0.attn.norm)"),
        (partial(VisionTransformer, depth=1, scale_mlp_norm=True), "attention or MLP (blocks.0.mlp.norm)"),
        (partial(VisionTransformer, depth=1, norm_layer="layernormfp32"), "norm = LayerNormFp32"),
        (partial(VisionTransformer, depth=1, dynamic_img_pad=True), "dynamic_img_pad"),
        (partial(VisionTransformer, depth=0), "a model without blocks"),
    ],
)  # fmt: skip
def test_other_models_are_refused_by_name(make: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(ModelError) as error:
        record(make(), torch.zeros(1, 3, 224, 224), torch.tensor([0]))
    assert named in str(error.value)
    assert "Supported: timm VisionTransformer" in str(error.value)


def test_replaced_layers_are_refused() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = make_vit("plain")
    model.blocks[1].attn.qkv = Adapted(48, 144)
    with pytest.raises(ModelError, match=r"blocks.1.attn.qkv = Adapted with a replaced forward\(\)"):
        plain_vit(model)
    model = make_vit("plain")
    model.blocks[0].attn.forward = lambda x, **_: x
    with pytest.raises(ModelError, match=r"blocks.0.attn = Attention with a replaced forward\(\)"):
        plain_vit(model)
    model.forward_features = lambda x: x
    with pytest.raises(ModelError, match=r"has its own forward_features\(\)"):
        plain_vit(model)


class Doubled(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OwnActivation(nn.Module):
    """Mixes the hidden units, which the rules for element-wise activations do not cover."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


@pytest.mark.parametrize("layer", [Doubled(), nn.Softmax(-1), nn.LayerNorm(48)])
@pytest.mark.parametrize(
    "place",
    [
        *("pos_drop", "patch_drop", "head_drop", "blocks.0.drop_path1", "blocks.1.drop_path2"),
        *("blocks.0.attn.attn_drop", "blocks.1.attn.proj_drop", "blocks.2.mlp.drop1", "blocks.0.mlp.drop2"),
    ],
)
def test_a_layer_in_the_place_of_dropout_is_refused(place: str, layer: nn.Module) -> None:
    model = make_vit("plain")
    model.set_submodule(place, layer)
    with pytest.raises(ModelError, match=rf"{place} = {type(layer).__name__}"):
        plain_vit(model)


def test_activations_that_are_not_element_wise_are_refused() -> None:
    model = make_vit("plain")
    model.blocks[2].mlp.act = OwnActivation()
    with pytest.raises(ModelError, match=r"blocks.2.mlp.act = OwnActivation \(known there: .*GELU.*SiLU"):
        plain_vit(model)
    model = make_vit("plain")
    model.blocks[1].attn.scale = 1.0  # which fused attention would not see
    with pytest.raises(ModelError, match=r"blocks.1.attn.scale"):
        plain_vit(model)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "mish", "hard_swish"])
def test_timms_activations_by_name(name: str) -> None:
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3, act_layer=name
    )
    model = model.double().eval()
    images, targets = torch.randn(2, 3, 16, 16).double(), torch.tensor([0, 2])
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), leaf)
    trace = record(model, images, targets)
    torch.testing.assert_close(trace.logits_BK, logits.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trace.map(lambda part: part.image_gradient), gradient, rtol=1e-9, atol=1e-12)


def test_an_activation_in_place_leaves_the_record_as_it_was() -> None:
    model = make_vit("no_position")
    images, targets = images_for(model)
    expected = record(model, images, targets).map(TransformerLRP().relevance)
    for block in model.blocks:
        block.mlp.act = nn.SiLU(inplace=True)
    assert torch.equal(record(model, images, targets).map(TransformerLRP().relevance), expected)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("place", ["", "backbone", "backbone.blocks.1", "backbone.blocks.0.mlp.fc2", "backbone.head"])
def test_forward_hooks_are_refused_until_they_are_removed(register: str, place: str) -> None:
    model = Wrapped(make_vit("plain"))
    handle = getattr(model.get_submodule(place), register)(lambda module, args, *output: None)
    with pytest.raises(ModelError, match=rf"a forward hook \({f'its layer {place}' if place else 'it'}, a "):
        plain_vit(model)
    handle.remove()
    plain_vit(model)


class Answering(Wrapped):
    """A wrapper that does something to the images or to the logits."""

    def __init__(self, backbone: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Any]) -> None:
        super().__init__(backbone)
        self.before, self.after = before, after

    def forward(self, images: Tensor) -> Any:
        return self.after(self.backbone(self.before(images)))


def test_a_wrapper_must_answer_as_its_backbone_does() -> None:
    model = make_vit("plain")
    images, targets = images_for(model)

    def same(x: Tensor) -> Tensor:
        return x

    for before, after in (
        (lambda x: x / 2 + 0.1, same),
        (same, lambda logits: logits.softmax(-1)),
        (same, lambda logits: (logits, None)),
        (same, lambda logits: logits[:, :2]),
    ):
        with pytest.raises(ModelError, match="Answering answers otherwise than its backbone"):
            record(Answering(model, before, after), images, targets)
    for dtype in (torch.float64, torch.float32):
        assert record(Answering(model, same, same).to(dtype), images.to(dtype), targets).logits_BK.dtype == dtype


def test_wrong_inputs_are_refused() -> None:
    model = make_vit("plain")
    images, targets = images_for(model)
    with pytest.raises(ModelError, match=r"images of 24x40 pixels, received \(24, 24\)"):
        record(model, images[..., :24], targets)
    with pytest.raises(ModelError, match=r"classes 0 to 3, received \[0, 4, 1\]"):
        record(model, images, torch.tensor([0, 4, 1]))
    with pytest.raises(ModelError, match="one class per image"):
        record(model, images, targets[:2])
    dynamic = make_vit("dynamic_grey")
    with pytest.raises(ModelError, match="cannot be divided into patches of 8x4"):
        record(dynamic, torch.zeros(1, 1, 30, 40).double(), torch.tensor([0]))
