"""Plan kinds that only metrics use, against their definition in NumPy; and what every metric declares of itself."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.metrics_oracle import Bench, key_of, some_images
from xaibatch.errors import ConfigError, UnknownNameError, UsageError
from xaibatch.metrics import METRICS, resolve_metric
from xaibatch.metrics.base import MapMetric, PlanMetric, VariantMetric
from xaibatch.metrics.patches import patch_grid
from xaibatch.metrics.similarity import mean_ranks, pearson, spearman
from xaibatch.metrics.ties import TIE, levels, ordered
from xaibatch.perturb.expand import expand
from xaibatch.perturb.plans import FillPlan, GaussianNoisePlan, ImputationPlan


@pytest.mark.parametrize("entries", ["pixel", "channel"])
def test_a_fill_plan_sets_its_entries_to_one_number(entries: str) -> None:
    image = some_images(1)[0]
    generator = np.random.default_rng(0)
    size = 1024 * (3 if entries == "channel" else 1)
    index_GK = generator.permutation(size)[:60].reshape(3, 20).astype(np.int32)
    plan = FillPlan(
        index_GK=index_GK,
        group_S=np.array([0, 0, 2, 1], np.int32),
        value_S=np.array([0.1, 0.9, -3, 2]),
        entries=entries,
    )
    copies = expand(plan, torch.as_tensor(image), 0, 4).numpy()
    for copy, group, value in zip(copies, plan.group_S, plan.value_S, strict=True):
        expected = image.reshape(-1 if entries == "channel" else 3, *([] if entries == "channel" else [1024])).copy()
        expected[..., index_GK[group]] = np.float32(value)
        np.testing.assert_array_equal(copy, expected.reshape(3, 32, 32))
    np.testing.assert_array_equal(expand(plan, torch.as_tensor(image), 2, 4).numpy(), copies[2:])


def test_normal_noise_is_added_in_float64_and_drawn_from_the_key() -> None:
    image = some_images(1)[0]
    plan = GaussianNoisePlan(key=key_of(0), purpose="test", num_samples=5, mean=0.5, std=0.2)
    copies = expand(plan, torch.as_tensor(image), 3, 5).numpy()
    for copy, sample in zip(copies, (3, 4), strict=True):
        np.testing.assert_array_equal(
            copy, (image.astype(float) + plan.noise_CHW(sample, (3, 32, 32))).astype(np.float32)
        )
    noise = np.stack([plan.noise_CHW(sample, (3, 32, 32)) for sample in range(5)])
    assert abs(noise.mean() - 0.5) < 0.01
    assert abs(noise.std() - 0.2) < 0.01


def test_the_noise_of_imputed_pixels_is_added_after_the_solution() -> None:
    image = torch.as_tensor(some_images(1)[0]).double()
    order = np.random.default_rng(1).permutation(1024).astype(np.int32)
    counts = np.array([7, 400], np.int32)
    still = ImputationPlan(order_N=order, counts_S=counts, noise_std=0.0, key=key_of(0))
    noisy = ImputationPlan(order_N=order, counts_S=counts, noise_std=0.5, key=key_of(0))
    added = (expand(noisy, image, 0, 2) - expand(still, image, 0, 2)).numpy().reshape(2, 3, 1024)
    for sample, count in enumerate(counts):
        np.testing.assert_allclose(added[sample][:, order[:count]], noisy.noise_CK(sample, 3), atol=1e-12)
        assert (added[sample][:, order[count:]] == 0).all()


@pytest.mark.parametrize("side", [30, 32, 33, 35])
def test_patches_cover_the_image_as_quantus_pads_it(side: int) -> None:
    from quantus.helpers.utils import get_block_indices, get_padding_size

    before, after = get_padding_size(side, 8)
    padded = np.full((1, 1, side + before + after, side + before + after), -1)
    for number, block in enumerate(get_block_indices(padded, 8)):
        padded.reshape(1, -1)[0, block[0]] = number
    inner = padded[0, 0, before : before + side, before : before + side]
    np.testing.assert_array_equal(patch_grid((side, side), 8), inner)


def test_correlations_equal_scipy_with_ties() -> None:
    from scipy.stats import pearsonr, rankdata, spearmanr

    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 9, 200).astype(float), generator.normal(size=200)
    assert pearson(a, b) == pytest.approx(pearsonr(a, b)[0], abs=1e-14)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b)[0], abs=1e-14)
    np.testing.assert_array_equal(mean_ranks(a), rankdata(a))


def test_values_equal_but_for_rounding_are_ties() -> None:
    """Six levels, each value off by up to 1e-14 of the peak: ranks are SciPy's of the levels, order is by position."""
    from scipy.stats import rankdata

    generator = np.random.default_rng(1)
    exact = generator.integers(-2, 4, 500) / 3
    noisy = exact + 1e-14 * generator.uniform(-1, 1, 500)
    assert len(np.unique(noisy)) > 400
    np.testing.assert_array_equal(levels(noisy), np.unique(exact, return_inverse=True)[1])
    np.testing.assert_array_equal(mean_ranks(noisy), rankdata(exact))
    np.testing.assert_array_equal(ordered(noisy), np.argsort(exact, kind="stable"))
    assert levels(np.array([])).tolist() == [] and levels(np.array([0.0, 0.0])).tolist() == [0, 0]


def test_numbers_of_float32_are_ties_only_where_they_are_equal() -> None:
    """Over four decades; and below an enormous peak, where all the rest lies within the tolerance of its neighbours."""
    generator = np.random.default_rng(2)
    values = (generator.normal(size=3000) * 10.0 ** generator.integers(-4, 1, 3000)).astype(np.float32)
    values[:50] = values[50:100]
    for peak in (1, 1e12):
        values[-1] = peak
        np.testing.assert_array_equal(levels(values), np.unique(values, return_inverse=True)[1])
        np.testing.assert_array_equal(ordered(values), np.argsort(values, kind="stable"))
    assert np.diff(np.unique(values[:-1])).max() < TIE * 1e12


def test_superpixels_of_one_value_are_removed_by_position() -> None:
    """A constant map: every superpixel's mean is 0.1 but for the rounding of its sum. Superpixels are those of the
    image's float32 values, whatever the run computes in."""
    bench = Bench(num=1, maps=np.full((1, 32, 32), 0.1))
    plan = METRICS["irof"](normalise=False).plan(bench.view(0))
    segments_HW, size_M = plan.segments_HW, np.bincount(plan.segments_HW.ravel())
    mean_M = np.bincount(segments_HW.ravel(), np.full(1024, 0.1)) / size_M
    assert len(np.unique(mean_M)) > 1
    assert (plan.keep_SM == ~np.tri(len(size_M), dtype=bool)).all()
    wider = replace(bench.view(0), image_CHW=bench.x[0].astype(np.float64) * (1 + 1e-10))
    seen: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skimage.segmentation.slic", lambda image, **_: seen.append(image) or segments_HW)
        METRICS["irof"]().plan(wider)
    np.testing.assert_array_equal(seen[0], np.moveaxis(bench.x[0], 0, -1))


def test_importing_metrics_is_light() -> None:
    """Score tasks start on workers without torch; neither naming a Quantus metric nor its options needs Quantus."""
    code = (
        "import sys, xaibatch.metrics as m; m.resolve_metric('quantus:Sparseness')(abs=True); "
        "m.resolve_metric('faithfulness_correlation')(num_runs=3); "
        "heavy = {'torch', 'quantus', 'ray', 'pandas', 'scipy', 'skimage', 'sklearn', 'matplotlib', 'timm', 'lime'}; "
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


EXPECTED = (
    "faithfulness_correlation faithfulness_estimate monotonicity monotonicity_arya pixel_flipping region_perturbation "
    "selectivity sensitivity_n irof road infidelity insertion_auc deletion_auc avg_sensitivity max_sensitivity "
    "local_lipschitz_estimate relative_input_stability relative_output_stability sparseness complexity "
    "effective_complexity pointing_game top_k_intersection relevance_mass_accuracy relevance_rank_accuracy "
    "attribution_localisation localisation_auc relevance_outside_lungs random_logit mprt efficient_mprt smooth_mprt "
    "counterfactual_mass counterfactual_response"
)


def test_every_metric_is_registered_and_says_what_it_is() -> None:
    assert sorted(METRICS) == sorted(EXPECTED.split())
    for name in METRICS:
        kind = METRICS[name]
        metric = kind()
        assert kind.name == name
        assert kind.title
        assert len(kind.paper) > 10
        assert kind.__doc__
        assert kind.higher_is_better in (True, False)
        assert kind.bounds[0] < kind.bounds[1]
        assert kind.family in ("faithfulness", "robustness", "complexity", "localisation", "randomisation", "causal")
        assert isinstance(metric, MapMetric | PlanMetric | VariantMetric)
        assert metric.cost()
        assert kind.needs <= {"image", "mask", "label", "twin"}


@pytest.mark.parametrize("name", [name for name in METRICS if issubclass(METRICS[name], PlanMetric)])
def test_the_announced_copies_are_the_copies_of_the_plan(name: str) -> None:
    bench = Bench(num=1, kind="tokens")
    metric = METRICS[name]()
    assert isinstance(metric, PlanMetric)
    plan = metric.plan(bench.view(0) if metric.plan_uses_map else bench.image_view(0))
    announced = metric.num_forward_passes(1, bench.x.shape[1:], bench.view(0).tokens)
    if name == "irof":  # SLIC makes about as many superpixels as it is asked for
        assert 0.8 * announced < plan.num_samples < 1.2 * announced
    else:
        assert plan.num_samples == announced
    shared = not metric.plan_uses_map
    assert metric.num_forward_passes(4, bench.x.shape[1:], bench.view(0).tokens) == announced * (1 if shared else 4)
    assert ("shared" in metric.cost()) == shared


def test_needs_follow_the_options() -> None:
    assert METRICS["infidelity"]().needs == {"image", "label"}
    assert METRICS["infidelity"](scored_class="predicted").needs == {"image"}
    assert METRICS["deletion_auc"]().needs == frozenset()
    assert METRICS["counterfactual_response"]().needs == {"image", "twin"}


def test_costs_are_said_in_words() -> None:
    assert METRICS["faithfulness_correlation"]().cost() == "100 forward passes, shared by all explainers"
    assert METRICS["pixel_flipping"]().cost() == "196 forward passes per explainer"
    assert METRICS["avg_sensitivity"](num_samples=3).cost() == "3 explanations per explainer"
    assert METRICS["sparseness"]().cost() == "none"


def test_names_resolve() -> None:
    assert resolve_metric("irof") is METRICS["irof"]
    with pytest.raises(UsageError, match=r"all images of the data set.*quantus:Sufficiency"):
        resolve_metric("sufficiency")
    assert resolve_metric("quantus:Sufficiency").name == "quantus:Sufficiency"
    assert resolve_metric("xaibatch.metrics.complexity:Sparseness") is METRICS["sparseness"]
    with pytest.raises(UnknownNameError, match="Did you mean 'pixel_flipping'"):
        resolve_metric("pixel_fliping")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'Sparseness'.*TopKIntersection"):
        resolve_metric("quantus:Sparsenes")
    with pytest.raises(ConfigError, match="cannot be imported"):
        resolve_metric("xaibatch.metrics.complexity:Nothing")
    with pytest.raises(ConfigError, match="expected a subclass"):
        resolve_metric("xaibatch.metrics.complexity:np")
    with pytest.raises(ConfigError, match="less than 100"):
        resolve_metric("road")(percentages=[50, 100])
    with pytest.raises(ConfigError, match=r"unknown option 'num_run'. Did you mean 'num_runs'"):
        resolve_metric("faithfulness_correlation")(num_run=3)


def test_an_installed_package_offers_metrics_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from xaibatch.metrics import resolve

    point = EntryPoint(name="theirs", value="xaibatch.metrics.complexity:Complexity", group=resolve.ENTRY_POINTS)
    monkeypatch.setattr(resolve, "entry_points", lambda group: [point] if group == point.group else [])
    assert resolve_metric("theirs") is METRICS["complexity"]
    with pytest.raises(UnknownNameError, match="theirs"):
        resolve_metric("thiers")
