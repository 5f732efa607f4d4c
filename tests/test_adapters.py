"""Captum, zennit and users' own functions as explainers: golden numbers, the packages' own runs, and what is
refused."""

import doctest
import sys
import textwrap
from types import SimpleNamespace

import captum.attr
import numpy as np
import pytest
import timm
import torch
import torchvision
import zennit.composites
import zennit.torchvision
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import xaibatch
from tests.slow_vit import images_for, make_vit
from tests.toy import Watch, toy_config, toy_images
from xaibatch.errors import ConfigError, ModelError, UnknownNameError, UsageError
from xaibatch.explainers import plugin, resolve
from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer, ExplainInput
from xaibatch.explainers.captum_adapter import REFUSED, CaptumExplainer, captum_explainer
from xaibatch.explainers.resolve import known_explainers, resolve_explainer
from xaibatch.explainers.zennit_adapter import TimmResNetCanonizer
from xaibatch.perturb.plans import GaussianNoisePlan
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate
from xaibatch.seeding import DrawKey


def make_inputs(model, images, targets, ids=None):
    ids = ids or [f"image-{b}" for b in range(len(images))]
    return ExplainInput(
        model=model,
        images_BCHW=images,
        targets_B=torch.as_tensor(targets),
        keys=tuple(DrawKey(seed=0, image_id=name) for name in ids),
        run_plans=lambda requests: [],
    )


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


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


def make_resnet(block=BasicBlock, seed=0, layers=(1, 1, 1, 1), **options):
    """A timm ResNet in float64 whose batch norms do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet(block, list(layers), num_classes=4, **options).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    return model


def make_images(num=2, side=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, 3, side, side)))


# -- the resolver


def test_registered_names_resolve_to_their_class():
    for name in EXPLAINERS:
        assert resolve_explainer(name) is EXPLAINERS[name]
    assert {"lime", "kernel_shap", "rise", "occlusion", "occlusion_patch"} <= set(EXPLAINERS)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("limee", UnknownNameError, "Did you mean 'lime'"),
        ("captum:IntegratedGradient", UnknownNameError, "Did you mean 'IntegratedGradients'"),
        ("zennit:epsilon_pluss", UnknownNameError, "Did you mean 'epsilon_plus'"),
        ("captum:NoiseTunnel", UsageError, "noise_samples"),
        ("captum:NeuronConductance", UnknownNameError, "LayerConductance"),
        ("no.such.module:function", UsageError, "cannot import 'no.such.module'"),
        ("xaibatch.maps:pixel_mapp", UnknownNameError, "Did you mean 'pixel_map'"),
        ("xaibatch.types:OK", UsageError, "is a str; expected a function"),
        ("xaibatch.seeding:keyed_generator", None, ""),
        ("xaibatch.maps:MapOptions", UsageError, "must take"),
    ],
)
def test_unknown_names_say_what_is_known(name, error, says):
    if error is None:
        resolve_explainer(name)  # four positional arguments: callable as an explainer, checked when it returns
        return
    with pytest.raises(error, match=says.replace("(", r"\(")):
        resolve_explainer(name)


@pytest.mark.parametrize("extra", ["captum", "zennit"])
def test_a_missing_extra_says_how_to_install_it(monkeypatch, extra):
    monkeypatch.setitem(sys.modules, extra, None)  # what an absent package looks like to `import`
    with pytest.raises(UsageError, match=rf"pip install 'xaibatch\[{extra}\]'"):
        resolve_explainer(f"{extra}:anything")


def test_an_entry_point_resolves(monkeypatch):
    def own(model, images_BCHW, targets_B):
        return images_BCHW.mean(1)

    point = SimpleNamespace(name="house_style", load=lambda: own)
    monkeypatch.setattr(resolve, "entry_points", lambda group: [point] if group == "xaibatch.explainers" else [])
    assert "house_style" in known_explainers()
    images = make_images()
    maps = resolve_explainer("house_style")().explain(make_inputs(nn.Identity(), images, [0, 0])).maps_Bhw
    assert torch.equal(maps, images.mean(1))


# -- a user's own function


OWN = '''
import torch

def centre(model, images_BCHW, targets_B, *, width: float = 0.3):
    """Looks at the middle of the image, whatever the model says."""
    side = torch.linspace(-1, 1, images_BCHW.shape[-1], dtype=images_BCHW.dtype)
    bump = torch.exp(-(side / width) ** 2)
    return (bump[:, None] * bump).expand(len(images_BCHW), -1, -1)

centre.signed, centre.needs = False, "any"

def drawn(model, images_BCHW, targets_B, *, keys, **options):
    return torch.stack([torch.from_numpy(key.generator("drawn").random((4, 4))) for key in keys])

drawn.granularity = "token"

def wrong(model, images_BCHW, targets_B):
    return images_BCHW

def no_options(model):
    return None
'''


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_explainers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_explainers"
    sys.modules.pop("own_explainers", None)


def test_a_function_of_ones_own(own_module):
    explainer_class = resolve_explainer(f"{own_module}:centre")
    explainer = explainer_class(width=0.5)
    assert (explainer.name, explainer.signed, explainer.needs) == ("own_explainers:centre", False, "any")
    assert (explainer.random, explainer.granularity) == (False, "pixel")
    maps = explainer.explain(make_inputs(nn.Identity(), make_images(side=9), [0, 1])).maps_Bhw
    assert maps.shape == (2, 9, 9)
    assert maps[0].argmax() == 40
    with pytest.raises(ConfigError, match="Did you mean 'width'"):
        explainer_class(widht=1)
    with pytest.raises(ConfigError, match="width"):
        explainer_class(width="wide")


def test_a_function_with_keys_is_random_and_open_options_pass(own_module):
    explainer = resolve_explainer(f"{own_module}:drawn")(anything=3)
    assert explainer.random
    assert explainer.granularity == "token"
    images = make_images()
    first = explainer.explain(make_inputs(nn.Identity(), images, [0, 0], ids=["a", "b"])).maps_Bhw
    again = explainer.explain(make_inputs(nn.Identity(), images, [0, 0], ids=["b", "a"])).maps_Bhw
    assert torch.equal(first, again.flip(0))
    assert not torch.equal(first[0], first[1])


@pytest.fixture
def documented_module(tmp_path, monkeypatch):
    """The ten lines that xaibatch.explainers.plugin shows, as a user would save them."""
    shown = doctest.DocTestParser().get_examples(plugin.__doc__)
    function, declaration = (example.source for example in shown[:2])
    (tmp_path / "saliency_of_ones_own.py").write_text(f"import torch\n\n\n{function}\n\n{declaration}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "saliency_of_ones_own", raising=False)
    return "saliency_of_ones_own:mean_gradient"


def test_the_documented_example_explains_a_model(documented_module):
    model = make_vit("plain")
    images, targets = images_for(model, count=2)
    maps = xaibatch.explain(model, images, documented_module, targets, resolution="native", power=2)
    leaf = images.clone().requires_grad_()
    for row in range(2):
        (gradient,) = torch.autograd.grad(model(leaf)[row, targets[row]], leaf)
        torch.testing.assert_close(maps[row], gradient[row].abs().mean(0) ** 2, rtol=1e-9, atol=0)
    assert xaibatch.explain(model, images, documented_module, targets).shape == (2, 3, 5)


def test_the_documented_example_is_scored_in_a_run(documented_module, tmp_path):
    config = toy_config(
        toy_images(tmp_path / "data", 1), tmp_path / "run", explainers={documented_module: {"power": 2.0}}
    )
    outcome = evaluate(config, run_local, Watch())
    assert outcome.ok
    scores = outcome.folder.read("scores").to_pandas()
    assert (scores.groupby("metric", observed=True).size() == 3).all()
    assert set(scores.explainer) == {documented_module}
    assert (scores.status == "ok").all()
    facts = outcome.folder.read_json("run.json")["explainers"][documented_module]
    assert (facts["signed"], facts["granularity"], facts["options"]) == (False, "pixel", {"power": 2.0})


def test_a_function_of_the_wrong_shape_is_refused(own_module):
    with pytest.raises(UsageError, match=r"returned \(2, 3, 32, 32\); expected an array or tensor of 2 maps"):
        resolve_explainer(f"{own_module}:wrong")().explain(make_inputs(nn.Identity(), make_images(), [0, 0]))
    with pytest.raises(UsageError, match="must take"):
        resolve_explainer(f"{own_module}:no_options")


def test_an_explainer_class_is_taken_as_it_is(tmp_path, monkeypatch):
    code = """
    from xaibatch.explainers.base import Attribution, Explainer

    class Blank(Explainer):
        name, title, paper = "blank", "Blank", "none"
        signed, granularity, needs = False, "pixel", "any"

        def explain(self, inputs):
            return Attribution(maps_Bhw=inputs.images_BCHW[:, 0] * 0)
    """
    (tmp_path / "own_class.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    blank = resolve_explainer("own_class:Blank")
    assert issubclass(blank, Explainer)
    assert isinstance(blank().explain(make_inputs(nn.Identity(), make_images(), [0, 0])), Attribution)
    sys.modules.pop("own_class")


# -- Captum


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
    plan = GaussianNoisePlan(key=inputs.keys[0], num_samples=5, mean=0.0, std=0.3)
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


# -- zennit


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
