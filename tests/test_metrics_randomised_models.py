"""Randomisation metrics as a run computes them, re-initialised models included, against stock Quantus 0.6.

Quantus is given the same images, model, explainer and new weights; its own loop over the layers runs, with its one seed
for all layers replaced by ours (a seed for each layer's name). Everything in float64.
"""

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from tests.metrics_oracle import near
from tests.toy import Watch, toy_config, toy_images
from xaibatch.data.sampling import shards
from xaibatch.errors import ConfigError
from xaibatch.metrics import METRICS
from xaibatch.metrics.base import ImageView, NoisyVariant, WeightsVariant
from xaibatch.models.randomise import layer_names, randomised, randomised_in_turn
from xaibatch.pipeline.facts import configured_model
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.record import job_of
from xaibatch.pipeline.run import choose_images, evaluate
from xaibatch.results.frames import open_run
from xaibatch.results.statistics_repeats import NoiseShare
from xaibatch.results.study import make_study
from xaibatch.seeding import DrawKey, keyed_generator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import quantus
    from quantus.helpers.model.pytorch_model import PyTorchModel

SEED = 42
BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
LAYERS = [
    f"backbone.{name}"
    for name in ("patch_embed.proj", *(f"blocks.{b}.{part}" for b in (0, 1) for part in BLOCK), "norm", "head")
]
"""The toy model's layers from the input to the head."""

UNSEEN: dict[str, Any] = {
    "key": DrawKey(seed=0, image_id="a.png"), "shape_CHW": (3, 8, 8), "label": 0, "predicted": 0,
    "logits_K": np.zeros(3), "image_CHW": np.random.default_rng(0).random((3, 8, 8)),
}  # fmt: skip
"""The fields of an ImageView of no particular image."""

EXPLAINER = "tests.test_metrics_randomised_models:gradient_times_input"
EVERY_LAYER = {"stages": list(range(1, 16))}
METRIC_OPTIONS: dict[str, dict[str, Any]] = {
    "random_logit": {},
    "mprt": {"seed": SEED},
    "layers_down": {"use": "mprt", "seed": SEED, **EVERY_LAYER},
    "layers_up": {"use": "mprt", "seed": SEED, "order": "bottom_up", **EVERY_LAYER},
    "layers_alone": {"use": "mprt", "seed": SEED, "order": "independent", **EVERY_LAYER},
    "efficient_mprt": {"seed": SEED},
    "smooth_mprt": {"seed": SEED, "num_samples": 3, "stages": [3, -1]},
}


def gradient_times_input(model: nn.Module, images_BCHW: torch.Tensor, targets_B: torch.Tensor) -> torch.Tensor:
    """Gradient times input summed over channels (B,H,W)."""
    with torch.enable_grad():
        images = images_BCHW.detach().requires_grad_()
        model(images).gather(1, targets_B[:, None]).sum().backward()
    assert images.grad is not None
    return (images * images.grad).sum(1).detach()


def new_weights(module: nn.Module, name: str) -> None:
    """Re-initialise one layer in float32 with its own seed."""
    torch.manual_seed(int(keyed_generator(SEED, "", "randomise", 0, name).integers(2**63 - 1)))
    module.to(torch.float32).reset_parameters()  # type: ignore[operator]
    module.to(torch.float64)


def layer_after_layer(self: Any, order: str = "top_down", seed: int = SEED) -> Iterator[tuple[str, nn.Module]]:
    """PyTorchModel.get_random_layer_generator of Quantus 0.6, with `new_weights` for its seeding and reset."""
    original = copy.deepcopy(self.state_dict())
    changed = copy.deepcopy(self.model)
    modules = [(name, module) for name, module in changed.named_modules() if hasattr(module, "reset_parameters")]
    for name, module in modules[::-1] if order == "top_down" else modules:
        if order == "independent":
            changed.load_state_dict(original)
        new_weights(module, name)
        yield name, changed


class Run:
    """A finished run in float64 and what Quantus needs to repeat it."""

    def __init__(self, folder: Path) -> None:
        images = toy_images(folder / "toy", num_per_class=1)
        self.config = toy_config(
            images, folder / "run", explainers={EXPLAINER: {}}, metrics=METRIC_OPTIONS, precision__default="float64"
        )
        outcome = evaluate(self.config, run_local, Watch())
        assert outcome.ok
        table = outcome.folder.read("scores").to_pandas()
        assert set(table.status) == {"ok"}
        self.scores = table.set_index(["metric", "image_id"])["score"]
        job = job_of(outcome.record, self.config, outcome.folder)
        (shard,) = shards(choose_images(self.config).records, 4)
        self.batch = job.read(shard)[0]
        self.model = configured_model(self.config, job.class_names).double().eval()
        self.model.register_forward_pre_hook(lambda _, arguments: (arguments[0].double(),))  # Quantus may hand float32
        self.x = np.asarray(self.batch.images_BCHW, np.float64)
        with torch.no_grad():
            self.logits = self.model(torch.as_tensor(self.x)).numpy()
        self.y = self.logits.argmax(1)

    def explain(self, model: nn.Module, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        x = torch.as_tensor(np.asarray(inputs, np.float64))
        return gradient_times_input(model, x, torch.as_tensor(np.asarray(targets, np.int64))).numpy()[:, None]

    def quantus(self, name: str, **options: Any) -> Any:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")
            patch.setattr(PyTorchModel, "get_random_layer_generator", layer_after_layer)
            metric = getattr(quantus, name)(disable_warnings=True, return_aggregate=False, **options)
            return metric(
                model=self.model, x_batch=self.x, y_batch=self.y, a_batch=self.explain(self.model, self.x, self.y),
                explain_func=self.explain, channel_first=True, batch_size=3,
            )  # fmt: skip

    def ours(self, label: str) -> list[float]:
        return [self.scores[label, image_id] for image_id in self.batch.ids]

    def view(self, row: int) -> ImageView:
        return ImageView(
            key=DrawKey(seed=self.config.seed, image_id=self.batch.ids[row]), shape_CHW=(3, 32, 32), label=-1,
            predicted=int(self.y[row]), logits_K=self.logits[row], image_CHW=self.x[row], target=int(self.y[row]),
        )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    return Run(tmp_path_factory.mktemp("randomised"))


EXACT = 1e-9
"""Both sides are float64 throughout; only the order of sums differs."""


@pytest.mark.parametrize("order", ["top_down", "bottom_up", "independent"])
def test_a_runs_mprt_over_every_layer_equals_quantus(run: Run, order: str) -> None:
    layers = run.quantus("MPRT", layer_order=order)
    assert list(layers) == ["original", *(LAYERS[::-1] if order == "top_down" else LAYERS)]
    near(layers["original"], np.ones(3), EXACT)
    label = {"top_down": "layers_down", "bottom_up": "layers_up", "independent": "layers_alone"}[order]
    near(run.ours(label), np.mean([layers[name] for name in LAYERS], 0), EXACT)


def test_a_runs_default_mprt_equals_quantus_at_six_different_models(run: Run) -> None:
    """Of 15 layers the stages re-initialise 1, 2, 3, 5, 10 and 15, so none is counted twice."""
    layers = run.quantus("MPRT", layer_order="top_down")
    near(run.ours("mprt"), np.mean([layers[LAYERS[::-1][num - 1]] for num in (1, 2, 3, 5, 10, 15)], 0), EXACT)


def test_a_runs_efficient_mprt_equals_quantus(run: Run) -> None:
    theirs = run.quantus("EfficientMPRT", layer_order="bottom_up", complexity_func_kwargs={"n_bins": 100})
    near(run.ours("efficient_mprt"), theirs, EXACT)


def test_a_runs_random_logit_equals_quantus_given_the_same_class(run: Run) -> None:
    chosen = [METRICS["random_logit"]().variants(run.view(row))[0].target for row in range(3)]
    places = [target - (target > explained) for target, explained in zip(chosen, run.y, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "randint", lambda *_: np.array(places))
        theirs = run.quantus("RandomLogit", num_classes=3, normalise=False)
    maps = run.explain(run.model, run.x, run.y)[:, 0]
    others = run.explain(run.model, run.x, np.array(chosen))[:, 0]
    for row, (map_HW, other_HW) in enumerate(zip(maps, others, strict=True)):
        score = METRICS["random_logit"](normalise=False)
        view, answer = _views(run, row, map_HW, other_HW)
        near(score.score(view, (answer,)), theirs[row], EXACT)
        near(METRICS["random_logit"]().score(view, (answer,)), run.ours("random_logit")[row], EXACT)


def _views(run: Run, row: int, map_HW: np.ndarray, other_HW: np.ndarray) -> Any:
    from xaibatch.maps import MapOptions
    from xaibatch.metrics.base import MapView, VariantView

    known = {name: getattr(run.view(row), name) for name in ImageView.__dataclass_fields__}
    view = MapView(**known, explainer=EXPLAINER, map_hw=map_HW, map_options=MapOptions())
    return view, VariantView(map_hw=other_HW, pixels_HW=other_HW, logits_K=run.logits[row], target=0)


def test_a_runs_smooth_mprt_equals_a_slow_rewrite(run: Run) -> None:
    """Quantus cannot be given the explainer here, so the formula is written out: Spearman's rho of the mean maps of two
    noisy copies and the image, of the model itself and with its first three layers (or all) re-initialised."""
    metric = METRICS["smooth_mprt"](**METRIC_OPTIONS["smooth_mprt"])
    for row in range(3):
        noise = [
            ask.plan.noise_CHW(ask.sample, (3, 32, 32))
            for ask in metric.variants(run.view(row))
            if isinstance(ask, NoisyVariant)
        ]
        copies = [run.x[row] + drawn for drawn in (*noise, 0.0)]
        smooth = []
        for names in ([], LAYERS[:3], LAYERS):
            model = copy.deepcopy(run.model)
            with torch.random.fork_rng(devices=[]):
                for name in names:
                    new_weights(dict(model.named_modules())[name], name)
            maps = [run.explain(model, image[None], run.y[row : row + 1])[0, 0] for image in copies]
            smooth.append(np.abs(np.mean(maps, 0)).ravel())
        expected = np.mean([spearmanr(smooth[0], changed)[0] for changed in smooth[1:]])
        near(run.ours("smooth_mprt")[row], expected, EXACT)


# -- the models themselves


@pytest.mark.parametrize(
    ("order", "num_layers", "names"),
    [
        ("top_down", 1, ["backbone.head"]),
        ("top_down", 4, [f"backbone.{n}" for n in ("head", "norm", "blocks.1.mlp.fc2", "blocks.1.mlp.fc1")]),
        ("bottom_up", 2, ["backbone.patch_embed.proj", "backbone.blocks.0.norm1"]),
        ("independent", 3, ["backbone.blocks.1.mlp.fc2"]),
        ("independent", -1, LAYERS),
        ("top_down", -1, LAYERS),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_named_layers_get_their_own_new_weights(
    run: Run, order: Any, num_layers: int, names: list[str], dtype: torch.dtype
) -> None:
    """And nothing else changes: not the other layers, not the model, not the global random state. New weights are the
    same numbers in both precisions, drawn with the layer's own initialisation."""
    model = copy.deepcopy(run.model).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    changed = randomised(model, WeightsVariant(order=order, num_layers=num_layers, seed=SEED))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected = copy.deepcopy(run.model)
    with torch.random.fork_rng(devices=[]):
        for name in names:
            new_weights(dict(expected.named_modules())[name], name)
    layers = dict(expected.named_modules())
    for key, value in changed.state_dict().items():
        layer = key.rpartition(".")[0]
        wanted = layers[layer].state_dict()[key.rpartition(".")[2]] if layer in names else before[key]
        assert value.dtype == dtype
        np.testing.assert_array_equal(value.numpy(), wanted.numpy().astype(value.numpy().dtype), err_msg=key)


def test_a_stage_that_the_model_does_not_have_is_refused(run: Run) -> None:
    assert layer_names(run.model) == tuple(LAYERS)
    for order in ("top_down", "independent"):
        for num_layers in (0, 16, -2):
            with pytest.raises(ConfigError, match=f"stage {num_layers} .* 1 to 15 layers"):
                randomised(run.model, WeightsVariant(order=order, num_layers=num_layers, seed=0))


def test_default_stages_keep_their_proportions_in_deeper_models_and_with_layer_scale() -> None:
    """Twelve blocks of six layers: head and norm, then 1, 2, 4, 8 blocks, then all 75; LayerScale adds two a block."""
    for num_layers, expected in ((75, [2, 8, 14, 26, 50, 75]), (99, [3, 11, 18, 34, 66, 99])):
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(num_layers)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
        asks = METRICS["mprt"](seed=0).variants(ImageView(**UNSEEN))
        new = [sum(int(layer.weight != 7.0) for layer in randomised(model, ask)) for ask in asks]  # type: ignore
        assert new == expected


@pytest.mark.parametrize("order", ["top_down", "bottom_up", "independent"])
def test_models_made_in_turn_equal_models_made_alone(order: Any) -> None:
    """Whatever the sequence: growing and shrinking stages, another seed in between."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5))).double()
    before = copy.deepcopy(model.state_dict())
    asked = [(1, 0), (3, 0), (3, 1), (5, 1), (2, 1), (2, 0), (-1, 0)]
    asks = [WeightsVariant(order=order, num_layers=num, seed=seed) for num, seed in asked]
    for ask, changed in zip(asks, randomised_in_turn(model, asks), strict=True):
        alone = randomised(model, ask).state_dict()
        assert all(torch.equal(value, alone[name]) for name, value in changed.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- which image faces which new weights


def weights_of(metric: str, run_seed: int = 0, image_id: str = "a.png", repeat: int = 0, **options: Any) -> set[int]:
    view = ImageView(**{**UNSEEN, "key": DrawKey(seed=run_seed, image_id=image_id, repeat=repeat)})
    asks = METRICS[metric](**options).variants(view)
    return {ask.seed for ask in asks if isinstance(ask, WeightsVariant)}


@pytest.mark.parametrize("metric", ["mprt", "efficient_mprt", "smooth_mprt"])
@pytest.mark.parametrize("options", [{}, {"num_draws": 3}])
def test_new_weights_are_new_for_every_repeat_and_run_and_one_for_all_stages(
    metric: str, options: dict[str, Any]
) -> None:
    (itself,) = weights_of(metric, **options)
    others = [weights_of(metric, **options, **about) for about in ({"repeat": 1}, {"repeat": 2}, {"run_seed": 7})]
    assert len({itself, *itertools.chain.from_iterable(others)}) == 4
    assert weights_of("mprt", **options) == {itself}, "metrics face the same weights"


def test_images_have_weights_of_their_own_or_share_a_few_sets() -> None:
    ids = [f"{number}.png" for number in range(60)]

    def sets(**options: Any) -> list[int]:
        return [weights_of("mprt", image_id=image_id, **options).pop() for image_id in ids]

    assert len(set(sets())) == 60
    counts = Counter(sets(num_draws=3)).values()
    assert len(counts) == 3
    assert min(counts) > 10
    assert sets(seed=42) == [42] * 60
    with pytest.raises(ConfigError, match="num_draws=3 has no meaning"):
        METRICS["mprt"](seed=42, num_draws=3)


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NoiseShare]:
    """Noise shares of two repeats of a run whose explainer has no randomness of its own, by metric."""
    folder = tmp_path_factory.mktemp("repeated")
    metrics = {
        "own": {"use": "efficient_mprt"},
        "sets": {"use": "efficient_mprt", "num_draws": 2},
        "fixed": {"use": "efficient_mprt", "seed": SEED},
    }
    config = toy_config(
        toy_images(folder / "toy", num_per_class=2), folder / "run", explainers={EXPLAINER: {}}, metrics=metrics,
        repeats=2,
    )  # fmt: skip
    outcome = evaluate(config, run_local, Watch())
    assert outcome.ok
    study = make_study(open_run(outcome.folder.url))
    return {metric: study.noise[EXPLAINER, metric] for metric in metrics if (EXPLAINER, metric) in study.noise}


def test_repeats_show_how_far_the_new_weights_move_a_score(repeated: dict[str, NoiseShare]) -> None:
    assert min(repeated["own"].share, repeated["sets"].share) > 0.05
    assert "fixed" not in repeated or repeated["fixed"].share == 0
