"""Names become explainers: registered ones, entry points, and a user's own function or class."""

import doctest
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import xaibatch
from tests.explain_inputs import make_images, make_inputs
from tests.slow_vit import images_for, make_vit
from tests.toy import Watch, toy_config, toy_images
from xaibatch.errors import ConfigError, UnknownNameError, UsageError
from xaibatch.explainers import plugin, resolve
from xaibatch.explainers.base import EXPLAINERS, Attribution, Explainer
from xaibatch.explainers.resolve import known_explainers, resolve_explainer
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate


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
