"""Random Logit and the parameter randomisation tests against stock Quantus 0.6 on the same maps."""

import warnings
from typing import Any

import numpy as np
import pytest

from tests.metrics_oracle import MAP_KINDS, Bench, gradient_map, near, some_maps, status_of
from xaibatch.metrics import METRICS
from xaibatch.metrics.base import NoisyVariant, TargetVariant, VariantView, WeightsVariant
from xaibatch.metrics.similarity import structural_similarity
from xaibatch.types import ALL_ZERO_MAP, ZERO_DENOMINATOR

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import quantus
    from skimage.metrics import structural_similarity as skimage_ssim


def answer_of(map_hw: np.ndarray) -> VariantView:
    return VariantView(map_hw=map_hw, pixels_HW=np.asarray(map_hw, float), logits_K=np.zeros(3), target=0)


# -- Random Logit


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("how", ["ssim_flat", "pearson", "spearman"])
def test_random_logit_equals_quantus_given_the_same_class(rows: tuple[int, ...], how: str) -> None:
    """Quantus lists the classes without the explained one and draws a place in that list."""
    bench = Bench().explained()
    metric = METRICS["random_logit"](similarity=how, normalise=False)
    chosen = [metric.variants(bench.image_view(row))[0] for row in rows]
    assert all(isinstance(ask, TargetVariant) for ask in chosen)
    places = [ask.target - (ask.target > bench.y[row]) for ask, row in zip(chosen, rows, strict=True)]
    theirs_func = getattr(quantus.similarity_func, "ssim" if how == "ssim_flat" else f"correlation_{how}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "randint", lambda *_: np.array(places))
        theirs = bench.quantus("RandomLogit", rows, num_classes=3, normalise=False, similarity_func=theirs_func)
    near([bench.native(metric, row) for row in rows], theirs)


def test_random_logit_never_explains_the_explained_class_and_differs_between_images() -> None:
    bench = Bench(num=12)
    metric = METRICS["random_logit"]()
    drawn = [metric.variants(bench.image_view(row))[0].target for row in range(12)]
    assert all(target != explained for target, explained in zip(drawn, bench.y, strict=True))
    assert len({(target - explained) % 3 for target, explained in zip(drawn, bench.y, strict=True)}) == 2


def test_a_map_that_ignores_the_class_has_similarity_one() -> None:
    bench = Bench(num=1, kind="tokens")
    for how in ("quantus-0.6", "sixt-2020"):
        near(METRICS["random_logit"](semantics=how).score(bench.view(0), (answer_of(bench.maps[0]),)), 1.0, 1e-12)


@pytest.mark.parametrize("shape", [(400,), (24, 31)])
def test_structural_similarity_equals_scikit_image(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=shape), generator.normal(size=shape)
    data_range = max(a.max(), b.max()) - min(a.min(), b.min())
    near(structural_similarity(a, b), skimage_ssim(a, b, data_range=data_range), 1e-12)


def test_the_two_dimensional_similarity_is_scikit_images_on_the_map() -> None:
    bench = Bench(num=2, kind="tokens")
    a, b = bench.maps.astype(float)
    data_range = max(a.max(), b.max()) - min(a.min(), b.min())
    ours = METRICS["random_logit"](semantics="sixt-2020").score(bench.view(0), (answer_of(b),))
    near(ours, skimage_ssim(a, b, data_range=data_range), 1e-9)


# -- parameter randomisation


class Heard:
    """An explainer for Quantus that remembers its maps in order."""

    def __init__(self) -> None:
        self.maps: list[np.ndarray] = []

    def __call__(self, model: Any, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        self.maps.append(gradient_map(model, inputs, targets)[:, None])
        return self.maps[-1].copy()


def quantus_mprt(bench: Bench, name: str, heard: Heard, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(quantus, name)(disable_warnings=True, **options)(
            model=bench.model, x_batch=bench.x, y_batch=bench.y, a_batch=bench.maps[:, None].copy(),
            explain_func=heard, channel_first=True, batch_size=len(bench.x),
        )  # fmt: skip


@pytest.mark.parametrize("order", ["top_down", "bottom_up", "independent"])
@pytest.mark.parametrize("num", [1, 3])
def test_mprt_equals_quantus_layer_by_layer(order: str, num: int) -> None:
    bench, heard = Bench(num=num).explained(), Heard()
    theirs = quantus_mprt(bench, "MPRT", heard, layer_order=order, normalise=False)
    assert list(theirs) == [
        "original",
        *(["head", "hidden", "patches"] if order == "top_down" else ["patches", "hidden", "head"]),
    ]
    metric = METRICS["mprt"](stages=(1, 2, 3), order=order, normalise=False)
    for row in range(num):
        answers = tuple(answer_of(maps[row, 0]) for maps in heard.maps[1:])
        layers = [theirs[layer][row] for layer in list(theirs)[1:]]
        near(metric.similarities(bench.view(row), answers), layers)
        near(metric.score(bench.view(row), answers), np.mean(layers))


def test_the_average_of_quantus_counts_the_map_against_itself() -> None:
    bench, heard = Bench(num=2).explained(), Heard()
    layers = quantus_mprt(bench, "MPRT", heard)
    average = quantus_mprt(bench, "MPRT", Heard(), return_average_correlation=True)
    near(average, np.mean([layers[layer] for layer in layers], 0))
    near(layers["original"], [1.0, 1.0])
    answers = tuple(answer_of(maps[0, 0]) for maps in heard.maps[1:])
    near(METRICS["mprt"]().score(bench.view(0), answers), np.mean([layers[k][0] for k in list(layers)[1:]]))


def test_efficient_mprt_equals_quantus() -> None:
    bench, heard = Bench(num=3).explained(), Heard()
    theirs = quantus_mprt(bench, "EfficientMPRT", heard, layer_order="bottom_up")
    metric = METRICS["efficient_mprt"]()
    for row in range(3):
        near(metric.score(bench.view(row), (answer_of(heard.maps[-1][row, 0]),)), theirs[row])


def test_variants_of_the_randomisation_tests() -> None:
    view = Bench(num=1).image_view(0)
    assert [ask.num_layers for ask in METRICS["mprt"](stages=(2, -1)).variants(view)] == [2, -1]
    assert [ask.share for ask in METRICS["mprt"]().variants(view)] == [n / 75 for n in (2, 8, 14, 26, 50, 75)]
    (all_new,) = METRICS["efficient_mprt"](seed=42).variants(view)
    assert isinstance(all_new, WeightsVariant)
    assert (all_new.num_layers, all_new.seed) == (-1, 42)
    for name in METRICS:
        if METRICS[name].family == "randomisation":
            assert len(METRICS[name]().variants(view)) == METRICS[name]().num_variants()


def test_smooth_mprt_equals_a_slow_rewrite_with_the_same_noise() -> None:
    """Quantus 0.6 cannot be fed the explainer here (see the next test), so the paper's formula is written out."""
    from scipy.stats import spearmanr

    bench = Bench(num=1).explained()
    metric = METRICS["smooth_mprt"](num_samples=4, noise_magnitude=0.2, stages=(1, -1))
    asks = metric.variants(bench.image_view(0))
    noise = [ask.plan.noise_CHW(ask.sample, (3, 32, 32)) for ask in asks[:3] if isinstance(ask, NoisyVariant)]
    assert abs(np.std(noise) / (0.2 * np.ptp(bench.x[0])) - 1) < 0.02
    new = [Bench(num=1), Bench(num=1)]
    for number, other in enumerate(new):
        other.model = type(other.model)(3, seed=number + 5)

    def maps(model: Any) -> list[np.ndarray]:
        copies = [(bench.x[0] + n).astype(np.float32) for n in [*noise, np.zeros((3, 32, 32))]]
        return [gradient_map(model, copy[None], bench.y)[0] for copy in copies]

    original, changed = maps(bench.model), [maps(other.model) for other in new]
    answers = [*original[:3], *changed[0], *changed[1]]
    assert [getattr(ask, "num_layers", 0) for ask in asks] == [0] * 3 + [1] * 4 + [-1] * 4
    assert [getattr(ask, "noisy", None) for ask in asks[3:7]] == [*asks[:3], None]
    smooth = [np.abs(np.mean(m, 0)).ravel() for m in (original, *changed)]
    expected = np.mean([spearmanr(smooth[0], other)[0] for other in smooth[1:]])
    near(metric.score(bench.view(0), tuple(answer_of(m) for m in answers)), expected)


def test_smooth_mprt_of_quantus_ignores_its_explainer() -> None:
    bench, heard = Bench(num=1).explained(), Heard()
    layers = quantus_mprt(bench, "SmoothMPRT", heard, nr_samples=2)
    assert heard.maps == []
    assert layers["original"][0] < 0.9  # the given maps against another explainer's


# -- undefined scores


def test_undefined_scores_of_randomisation_metrics() -> None:
    bench = Bench(num=1, kind="tokens")
    zeros = answer_of(np.zeros((32, 32)))
    for name in ("random_logit", "mprt", "efficient_mprt"):
        assert status_of(lambda name=name: METRICS[name]().score(bench.view(0), (zeros,))) == ALL_ZERO_MAP
    constant = answer_of(np.ones((32, 32)))
    assert status_of(lambda: METRICS["mprt"]().score(bench.view(0), (constant,))) == ZERO_DENOMINATOR
    flat = Bench(num=1, maps=np.ones((1, 32, 32)))
    assert status_of(lambda: METRICS["efficient_mprt"]().score(flat.view(0), (constant,))) == ZERO_DENOMINATOR
    assert status_of(lambda: METRICS["random_logit"]().score(flat.view(0), (constant,))) == ZERO_DENOMINATOR


@pytest.mark.parametrize("kind", sorted(MAP_KINDS))
def test_histogram_entropy_equals_scipy(kind: str) -> None:
    from scipy.stats import entropy

    from xaibatch.metrics.randomisation import histogram_entropy

    values = some_maps(kind, 1)[0].astype(float)
    near(histogram_entropy(values, 100), entropy(np.histogram(values, 100)[0]), 1e-12)
