"""Captum as explainers: golden numbers, the package's own runs, and what is refused."""

from types import SimpleNamespace

import captum.attr
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.explain_inputs import make_images, make_inputs, make_resnet, relative
from xaibatch.errors import ConfigError, ModelError, UnknownNameError, UsageError
from xaibatch.explainers.captum_adapter import REFUSED, CaptumExplainer, captum_explainer
from xaibatch.explainers.resolve import resolve_explainer
from xaibatch.perturb.plans import GaussianNoisePlan


@pytest.fixture(scope="module")
def small(golden_small):
    """The golden model in float64, its images and its predicted classes."""
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=3, qkv_bias=True
    )
    model.load_state_dict(load_file(golden_small / "small_vit.safetensors"))
    model = model.double().eval()
    images = torch.from_numpy(np.load(golden_small / "small_lrp.npz")["x"]).double()
    with torch.no_grad():
        return SimpleNamespace(model=model, images=images, pred=model(images).argmax(1))


@pytest.mark.parametrize("kind", ["pred", "class0"])
@pytest.mark.parametrize(("num_steps", "batch_size"), [(20, 7), (50, 64)])
def test_integrated_gradients_equal_golden(small, golden_small, kind, num_steps, batch_size):
    golden = np.load(golden_small / "small_others.npz")
    targets = small.pred if kind == "pred" else torch.zeros_like(small.pred)
    rows = slice(None) if num_steps == 20 else slice(4, 6)  # image 4 has a negative logit
    for channels, key in (("sum", "patch"), ("abs_sum", "patchabs")):
        if channels == "abs_sum" and num_steps == 20:
            continue
        explainer = resolve_explainer("captum:IntegratedGradients")(
            arguments={"n_steps": num_steps}, internal_batch_size=batch_size, channels=channels
        )
        maps = explainer.explain(make_inputs(small.model, small.images[rows], targets[rows])).maps_Bhw
        patches = maps.reshape(-1, 8, 8, 8, 8).sum((2, 4)).reshape(-1, 64).numpy()
        expected = golden[f"ig{num_steps}_{key}_{kind}_f64"][rows]
        assert (np.linalg.norm(patches - expected, axis=1) < 1e-8 * np.linalg.norm(expected, axis=1)).all()
        if channels == "sum" and num_steps == 50 and kind == "pred":
            assert relative(maps.numpy(), golden["ig50_pixel_pred_f64"][rows]) < 1e-8


def test_integrated_gradients_of_radiographs_equal_golden(shared):
    golden = np.load(shared / "golden/tiny_others.npz")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    model.load_state_dict(load_file(shared / "models/vit_tiny_cxr3.safetensors"))
    images = torch.from_numpy(np.load(shared / "golden/tiny_lrp.npz")["x"][:1])
    with torch.no_grad():
        target = model.float().eval()(images).argmax(1)
    explainer = resolve_explainer("captum:IntegratedGradients")(internal_batch_size=10)
    maps = explainer.explain(make_inputs(model, images, target)).maps_Bhw
    patches = maps.reshape(14, 16, 14, 16).sum((1, 3)).reshape(196).numpy()
    assert relative(patches, golden["ig50_patch_pred_f64"][0]) < 2e-5


def test_baselines_are_images_of_their_own(small):
    """The completeness axiom (Sundararajan et al. 2017): attributions add up to F(x) - F(baseline), per image."""
    explainer = resolve_explainer("captum:IntegratedGradients")(baseline="black", arguments={"n_steps": 60})
    maps = explainer.explain(make_inputs(small.model, small.images[:2], small.pred[:2])).maps_Bhw
    black = small.images[:2].amin((1, 2, 3), keepdim=True).expand(2, 3, 64, 64)
    with torch.no_grad():
        rise = (small.model(small.images[:2]) - small.model(black)).gather(1, small.pred[:2, None])[:, 0]
    torch.testing.assert_close(maps.sum((1, 2)), rise, rtol=0, atol=5e-3)
    assert rise.abs().max() > 0.1


def test_saliency_is_the_gradient(small):
    maps = resolve_explainer("captum:Saliency")(internal_batch_size=4, arguments={"abs": False})
    images = small.images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(small.model(images).gather(1, small.pred[:, None]).sum(), images)
    result = maps.explain(make_inputs(small.model, small.images, small.pred)).maps_Bhw
    torch.testing.assert_close(result, gradient.sum(1), rtol=0, atol=1e-12)
    assert maps.signed
    assert not resolve_explainer("captum:Saliency")().signed


RANDOM_CASES = [
    ("Saliency", {"noise_samples": 5, "internal_batch_size": 2}),
    ("IntegratedGradients", {"noise_samples": 3, "arguments": {"n_steps": 4}, "noise_type": "smoothgrad_sq"}),
    ("GradientShap", {"arguments": {"n_samples": 4}}),
    ("KernelShap", {"arguments": {"n_samples": 12}, "segmentation_options": {"patch_size": 32}}),
    ("Lime", {"arguments": {"n_samples": 12}, "segmentation_options": {"patch_size": 32}}),
    ("ShapleyValueSampling", {"arguments": {"n_samples": 3}, "segmentation_options": {"patch_size": 32}}),
]


@pytest.mark.parametrize(("name", "options"), RANDOM_CASES, ids=[name for name, _ in RANDOM_CASES])
def test_random_captum_methods_are_keyed_and_leave_the_global_streams(small, name, options):
    explainer = resolve_explainer(f"captum:{name}")(**options)
    assert explainer.random
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    images, targets = small.images[:2], small.pred[:2]
    whole = explainer.explain(make_inputs(small.model, images, targets, ids=["a", "b"])).maps_Bhw
    alone = explainer.explain(make_inputs(small.model, images[1:], targets[1:], ids=["b"])).maps_Bhw
    other = explainer.explain(make_inputs(small.model, images[1:], targets[1:], ids=["c"])).maps_Bhw
    torch.testing.assert_close(alone[0], whole[1], rtol=1e-9, atol=1e-9)
    assert not torch.equal(other, alone)
    assert torch.equal(torch_before, torch.random.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_smoothgrad_is_the_mean_gradient_of_noisy_copies(small):
    """The noise is that of a plan keyed by the image: the same however many copies run at once."""
    options = {"noise_samples": 5, "noise_stdev": 0.3, "arguments": {"abs": False}}
    inputs = make_inputs(small.model, small.images[:1], small.pred[:1])
    maps = resolve_explainer("captum:Saliency")(internal_batch_size=2, **options).explain(inputs).maps_Bhw
    plan = GaussianNoisePlan(key=inputs.keys[0], purpose="noise_tunnel", num_samples=5, mean=0.0, std=0.3)
    copies = torch.stack([small.images[0] + torch.from_numpy(plan.noise_CHW(s, (3, 64, 64))) for s in range(5)])
    copies.requires_grad_()
    (gradients,) = torch.autograd.grad(small.model(copies)[:, small.pred[0]].sum(), copies)
    torch.testing.assert_close(maps[0], gradients.mean(0).sum(0), rtol=0, atol=1e-12)
    whole = resolve_explainer("captum:Saliency")(internal_batch_size=64, **options).explain(inputs).maps_Bhw
    torch.testing.assert_close(maps, whole, rtol=0, atol=1e-12)
    squares = resolve_explainer("captum:Saliency")(noise_type="smoothgrad_sq", **options).explain(inputs).maps_Bhw
    torch.testing.assert_close(squares[0], (gradients**2).mean(0).sum(0), rtol=0, atol=1e-12)


class Watched(nn.Module):
    """Notes batch sizes and runs out of memory above `capacity` images."""

    def __init__(self, model, capacity=None):
        super().__init__()
        self.backbone, self.capacity, self.batches = model, capacity, []

    def forward(self, images):
        self.batches.append(len(images))
        if self.capacity is not None and len(images) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.backbone(images)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("IntegratedGradients", {"arguments": {"n_steps": 10}}),
        ("Saliency", {}),
        ("Saliency", {"noise_samples": 9}),
        ("Occlusion", {"arguments": {"sliding_window_shapes": [3, 16, 16], "strides": [3, 16, 16]}}),
        ("FeatureAblation", {"segmentation_options": {"patch_size": 16}}),
        ("KernelShap", {"arguments": {"n_samples": 10}, "segmentation_options": {"patch_size": 32}}),
    ],
)
def test_no_batch_is_larger_than_asked_and_lost_memory_halves_it(small, name, options):
    watched = Watched(small.model)
    inputs = make_inputs(watched, small.images[:5], small.pred[:5])
    maps = resolve_explainer(f"captum:{name}")(internal_batch_size=4, **options).explain(inputs).maps_Bhw
    assert max(watched.batches) <= 4
    poor = Watched(small.model, capacity=2)
    inputs = make_inputs(poor, small.images[:5], small.pred[:5])
    again = resolve_explainer(f"captum:{name}")(internal_batch_size=8, **options).explain(inputs).maps_Bhw
    assert max(poor.batches) > 2, "it did run out of memory"
    torch.testing.assert_close(again, maps, rtol=1e-6, atol=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        resolve_explainer(f"captum:{name}")(**options).explain(
            make_inputs(Watched(small.model, capacity=0), small.images[:1], small.pred[:1])
        )


def test_the_model_is_left_as_it_was_even_after_an_error():
    model = make_resnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explainer = resolve_explainer("captum:GuidedBackprop")()
    explainer.explain(make_inputs(model, make_images(), [0, 1]))
    with pytest.raises(RuntimeError):
        explainer.explain(make_inputs(model, make_images()[:, :2], [0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["GuidedBackprop", "Deconvolution", "DeepLift"])
def test_relu_methods_work_on_a_resnet_and_are_refused_on_a_vit(small, name):
    model, images = make_resnet(), make_images()
    maps = resolve_explainer(f"captum:{name}")().explain(make_inputs(model, images, [0, 1])).maps_Bhw
    assert maps.shape == (2, 32, 32)
    assert maps.isfinite().all()
    with pytest.raises(ModelError, match="VisionTransformer"):
        resolve_explainer(f"captum:{name}")().explain(make_inputs(small.model, small.images, small.pred))


def test_deep_lift_on_a_resnet_is_complete():
    """Summation to delta (Shrikumar et al. 2017): a missed residual sum or a shared activation would break it."""
    model, images = make_resnet(), make_images()
    maps = resolve_explainer("captum:DeepLift")().explain(make_inputs(model, images, [0, 1])).maps_Bhw
    with torch.no_grad():
        rise = (model(images) - model(torch.zeros_like(images)))[[0, 1], [0, 1]]
    torch.testing.assert_close(maps.sum((1, 2)), rise, rtol=1e-6, atol=1e-6)


def test_layer_attributions_come_on_the_layers_own_grid(small):
    tokens = resolve_explainer("captum:LayerGradientXActivation")(layer="blocks.2")
    assert tokens.granularity == "token"
    assert tokens.explain(make_inputs(Watched(small.model), small.images, small.pred)).maps_Bhw.shape == (6, 8, 8)
    cam = resolve_explainer("captum:LayerGradCam")(layer="layer3")
    assert cam.explain(make_inputs(make_resnet(), make_images(), [0, 1])).maps_Bhw.shape == (2, 2, 2)
    with pytest.raises(UnknownNameError, match="Did you mean 'layer3'"):
        resolve_explainer("captum:LayerGradCam")(layer="leyer3").explain(
            make_inputs(make_resnet(), make_images(), [0, 1])
        )
    with pytest.raises(ModelError, match="expected"):
        resolve_explainer("captum:LayerGradCam")(layer="blocks.2").explain(
            make_inputs(small.model, small.images, small.pred)
        )
    with pytest.raises(ConfigError, match="layer"):
        resolve_explainer("captum:LayerGradCam")()
    with pytest.raises(ConfigError, match="layer"):
        resolve_explainer("captum:Saliency")(layer="layer3")


def test_arguments_are_checked():
    with pytest.raises(ConfigError, match="Did you mean 'n_steps'"):
        resolve_explainer("captum:IntegratedGradients")(arguments={"num_steps": 3})
    with pytest.raises(ConfigError, match="baselines"):
        resolve_explainer("captum:IntegratedGradients")(arguments={"baselines": 0})


def test_every_captum_class_is_either_offered_or_refused():
    offered = set()
    for name in captum.attr.__all__:
        try:
            explainer_class = captum_explainer(name)
        except UsageError:
            continue
        assert issubclass(explainer_class, CaptumExplainer)
        offered.add(name)
    assert {"IntegratedGradients", "Saliency", "GradientShap", "DeepLift", "Lime", "KernelShap", "Occlusion"} <= offered
    assert not offered & set(REFUSED)
    assert set(REFUSED) <= set(captum.attr.__all__)


def test_estimates_of_forward_passes():
    assert resolve_explainer("captum:IntegratedGradients")().num_forward_passes() == 50
    smooth = resolve_explainer("captum:IntegratedGradients")(arguments={"n_steps": 8}, noise_samples=5)
    assert smooth.num_forward_passes() == 40
    assert smooth.cost() == "40 forward + backward"
    assert resolve_explainer("captum:KernelShap")(arguments={"n_samples": 30}).num_forward_passes() == 30
