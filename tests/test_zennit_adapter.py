"""zennit as explainers: the package's own runs on torchvision's twins, merged batch norms, and what is refused."""

import pytest
import timm
import torch
import torchvision
import zennit.composites
import zennit.torchvision
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from tests.explain_inputs import make_images, make_inputs, make_resnet, relative
from xaibatch.errors import ConfigError, ModelError
from xaibatch.explainers.resolve import resolve_explainer
from xaibatch.explainers.zennit_adapter import TimmResNetCanonizer


def torchvision_twin(model, block):
    kind = {BasicBlock: torchvision.models.resnet.BasicBlock, Bottleneck: torchvision.models.resnet.Bottleneck}[block]
    twin = torchvision.models.resnet.ResNet(kind, [1, 1, 1, 1], num_classes=4).double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


EQUAL_CASES = [
    *((name, BasicBlock) for name in sorted(set(zennit.composites.COMPOSITES) - {"beta_smooth"})),
    ("epsilon_plus", Bottleneck),
    ("guided_backprop", Bottleneck),
]


@pytest.mark.parametrize(("name", "block"), EQUAL_CASES)
def test_timm_resnet_equals_zennits_own_torchvision_resnet(name, block):
    """torchvision's ResNet with the same weights, under zennit's own canonizer for it (beta_smooth is wrong there:
    torchvision calls one ReLU module several times and zennit keeps its last input only)."""
    model, images, targets = make_resnet(block), make_images(3), torch.tensor([1, 0, 3])
    twin = torchvision_twin(model, block)
    explainer = resolve_explainer(f"zennit:{name}")()
    maps = explainer.explain(make_inputs(model, images, targets)).maps_Bhw
    arguments = {}
    if name == "epsilon_gamma_box":
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        arguments = {"low": low.expand_as(images), "high": high.expand_as(images)}
    composite = zennit.composites.COMPOSITES[name](**arguments, canonizers=[zennit.torchvision.ResNetCanonizer()])
    with composite.context(twin) as canonical:
        x = images.clone().requires_grad_()
        logits = canonical(x)
        start = nn.functional.one_hot(targets, 4).double()
        start = start * logits.detach() if name.startswith("epsilon") else start
        (expected,) = torch.autograd.grad(logits, x, start)
    assert relative(maps, expected.sum(1)) < 1e-12
    alone = explainer.explain(make_inputs(model, images[1:2], targets[1:2])).maps_Bhw
    assert relative(alone[0], maps[1]) < 1e-12


def test_without_the_residual_sum_the_relevance_differs():
    """The control: zennit's torchvision canonizer does nothing for timm's blocks and raises nothing."""
    model, images, targets = make_resnet(), make_images(), torch.tensor([1, 0])
    maps = resolve_explainer("zennit:epsilon_plus")().explain(make_inputs(model, images, targets)).maps_Bhw
    composite = zennit.composites.EpsilonPlus(canonizers=[zennit.torchvision.ResNetCanonizer()])
    with composite.context(model) as half_canonical:
        x = images.clone().requires_grad_()
        logits = half_canonical(x)
        start = nn.functional.one_hot(targets, 4).double() * logits.detach()
        (wrong,) = torch.autograd.grad(logits, x, start)
    assert relative(wrong.sum(1), maps) > 0.1


def test_epsilon_everywhere_is_gradient_times_input():
    """LRP-0 of a ReLU network is gradient times input (Ancona et al. 2018, prop. 1), batch norms and sums included, if
    and only if the canonizer is right."""
    model, images = make_resnet(Bottleneck), make_images()
    rules = [*zennit.composites.layer_map_base(1e-12), (zennit.types.Linear, zennit.rules.Epsilon(epsilon=1e-12))]
    composite = zennit.composites.LayerMapComposite(rules, canonizers=[TimmResNetCanonizer()])
    x = images.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), x)
    with composite.context(model) as canonical:
        y = images.clone().requires_grad_()
        out = canonical(y)
        # zennit merges a batch norm but leaves its eps (1e-5) in place
        torch.testing.assert_close(out, logits, rtol=1e-3, atol=1e-4)
        (relevance,) = torch.autograd.grad(out, y, nn.functional.one_hot(torch.tensor([2, 2]), 4) * out.detach())
    assert relative(relevance, gradient * images) < 1e-3


def test_beta_smooth_is_the_gradient_with_a_sigmoid():
    class SmoothReLU(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.sigmoid(10.0 * ctx.saved_tensors[0])

    class Smooth(nn.Module):
        def forward(self, x):
            return SmoothReLU.apply(x)

    model, images = make_resnet(), make_images()
    maps = (
        resolve_explainer("zennit:beta_smooth")(beta_smooth=10.0).explain(make_inputs(model, images, [1, 0])).maps_Bhw
    )
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, Smooth())
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[[0, 1], [1, 0]].sum(), x)
    assert relative(maps, gradient.sum(1)) < 1e-3  # the merged batch norms keep their eps


@pytest.mark.parametrize(
    "options",
    [
        {"stem_type": "deep", "stem_width": 8, "avg_down": True},
        {"block": Bottleneck, "cardinality": 4, "base_width": 8},
    ],
    ids=["resnet_d", "resnext"],
)
def test_every_batch_norm_of_resnet_variants_is_merged(options):
    model, images = make_resnet(**options), make_images()
    applied = TimmResNetCanonizer().apply(model)
    merged = [canonizer for canonizer in applied if hasattr(canonizer, "batch_norm")]
    assert len(merged) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for canonizer in reversed(applied):
        canonizer.remove()
    maps = resolve_explainer("zennit:epsilon_plus_flat")().explain(make_inputs(model, images, [0, 1])).maps_Bhw
    assert maps.isfinite().all()


def test_zennit_restores_the_model_even_after_an_error():
    model = make_resnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explainer = resolve_explainer("zennit:epsilon_plus")()
    first = explainer.explain(make_inputs(model, make_images(), [0, 1])).maps_Bhw
    with pytest.raises(RuntimeError):
        explainer.explain(make_inputs(model, make_images()[:, :2], [0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(before) == set(model.state_dict())
    assert not any("canonizer" in name or "forward" in vars(m) for name, m in model.named_modules())
    assert torch.equal(first, explainer.explain(make_inputs(model, make_images(), [0, 1])).maps_Bhw)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=4), "VisionTransformer is not supported"),
        (lambda: timm.create_model("efficientnet_b0", num_classes=4), "EfficientNet is not supported"),
        (lambda: timm.create_model("seresnet18", num_classes=4), "SEModule, which is not supported"),
        (lambda: timm.create_model("resnetblur18", num_classes=4), "BlurPool2d, which is not supported"),
        (lambda: make_resnet(act_layer=nn.SiLU), "SiLU, which is not supported"),
        (lambda: make_resnet(global_pool="fast"), "FastAdaptiveAvgPool, which is not supported"),
    ],
)
def test_models_without_right_rules_are_refused_by_name(make, says):
    with pytest.raises(ModelError, match=says):
        resolve_explainer("zennit:epsilon_plus")().explain(make_inputs(make(), make_images(side=64), [0, 1]))


def test_zennit_options_are_the_composites_numbers():
    explainer = resolve_explainer("zennit:epsilon_gamma_box")(gamma=0.1, low_value=-2.0)
    assert explainer.options.gamma == 0.1
    with pytest.raises(ConfigError, match="Did you mean 'gamma'"):
        resolve_explainer("zennit:epsilon_gamma_box")(gama=0.1)
    model, images = make_resnet(), make_images()
    wide = explainer.explain(make_inputs(model, images, [0, 1])).maps_Bhw
    own = resolve_explainer("zennit:epsilon_gamma_box")(gamma=0.1).explain(make_inputs(model, images, [0, 1])).maps_Bhw
    assert not torch.allclose(wide, own)
