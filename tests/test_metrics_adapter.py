"""Stock Quantus through the adapter: the same numbers, one outcome per image, nothing left changed behind."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.adapter_bench import SMALL, outcomes_of
from tests.metrics_oracle import Bench, gradient_map, key_of, near, some_masks
from tests.toy import Watch, toy_config
from xaibatch.errors import ConfigError, UsageError
from xaibatch.metrics import resolve_metric
from xaibatch.metrics.quantus_adapter import QuantusMetric, quantus_metric, reduced
from xaibatch.metrics.quantus_facts import QUANTUS_METRICS, QuantusFacts
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate, preview
from xaibatch.types import ALL_ZERO_MAP, CHANGED_PREDICTION, ERROR, MISSING_MASK, NAN_MAP, OK, ZERO_DENOMINATOR

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import quantus

NAMES = sorted(name for name, facts in QUANTUS_METRICS.items() if not facts.refused and name != "InputInvariance")


@pytest.mark.parametrize("name", NAMES)
def test_every_quantus_metric_scores_every_image(name: str) -> None:
    """One channel, because ROAD and IROF of Quantus 0.6 fail on three."""
    bench = Bench(num=3, channels=1, masks=some_masks(3)).explained()
    metric = resolve_metric(f"quantus:{name}")(**SMALL.get(name, {}))
    assert isinstance(metric, QuantusMetric)
    done = outcomes_of(metric, bench)
    assert [outcome.status for outcome in done] == [OK] * 3, done
    assert all(np.isfinite(outcome.value) for outcome in done)
    assert done == outcomes_of(metric, bench)
    if not metric.facts.across_images:  # alone as among others: seeds hang on the image, not on its place
        backwards = Bench(num=3, channels=1)
        backwards.x, backwards.y, backwards.maps = bench.x[::-1], bench.y[::-1], bench.maps[::-1]
        backwards.masks, backwards.model = some_masks(3)[::-1], bench.model
        again = outcomes_of(metric, backwards, keys=[key_of(row) for row in (2, 1, 0)])[::-1]
        near([a.value for a in again], [b.value for b in done], 1e-6)


def test_input_invariance_shifts_the_bias_of_a_first_convolution() -> None:
    """It makes float32 inputs and looks for a convolution as the model's first layer; a ViT has none there."""
    bench = Bench(num=2)
    bench.model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(256, 3)).eval()  # type: ignore

    def explain(x: Any, y: Any, keys: Any, model: Any) -> np.ndarray:
        features = (model or bench.model)[0](torch.as_tensor(x, dtype=torch.float32)).detach().numpy()
        maps = np.kron(features.sum(1), np.ones((4, 4)))
        maps[:, :4, :4] = 0  # Quantus shifts every entry but the first, so the first patch is not invariant
        return maps

    bench.maps = explain(bench.x, bench.y, None, None)
    metric = resolve_metric("quantus:InputInvariance")()
    done = outcomes_of(metric, bench, explain=explain)
    assert [(outcome.value, outcome.status) for outcome in done] == [(1.0, OK)] * 2
    wrong = outcomes_of(metric, bench, explain=lambda x, y, keys, model: np.abs(x).sum(1))
    assert [outcome.value for outcome in wrong] == [0.0, 0.0]


OTHER_DIRECTION = {"RegionPerturbation": True, "Consistency": True, "RelevanceMassAccuracy": None}
"""Where the formula says otherwise than Quantus's `score_direction`."""


def test_the_list_of_names_is_the_list_of_quantus() -> None:
    base = quantus.metrics.base.Metric
    installed = {
        name
        for name, kind in vars(quantus).items()
        if isinstance(kind, type) and issubclass(kind, base) and kind is not base
    }
    assert installed - {"ModelParameterRandomisation"} == set(QUANTUS_METRICS)
    for name, facts in QUANTUS_METRICS.items():
        kind = getattr(quantus, name)
        found = QuantusFacts.of(kind)
        assert (found.name, found.higher_is_better) == (name, kind.score_direction.value == "higher")
        assert facts.higher_is_better == OTHER_DIRECTION.get(name, found.higher_is_better), name
        assert facts.direction({}) == facts.higher_is_better
        if kind.evaluation_category.value != "Axiomatic":
            assert found.family == facts.family, name


@pytest.mark.parametrize(
    ("name", "options", "higher_is_better"),
    [
        ("RegionPerturbation", {}, True),
        ("RegionPerturbation", {"order": "lerf"}, False),
        ("RegionPerturbation", {"order": "random"}, None),
        ("RelevanceMassAccuracy", {"abs": True}, True),
        ("Sparseness", {}, True),
        ("Sparseness", {"abs": False}, None),
        ("AttributionLocalisation", {"abs": False}, None),
        ("AttributionLocalisation", {"abs": False, "positive_attributions": True}, True),
        ("IROF", {"softmax": True}, True),
        ("IROF", {"softmax": False}, None),
        ("MPRT", {"similarity_func": "correlation_pearson"}, False),
        ("MPRT", {"similarity_func": "distance_euclidean"}, None),
        ("RandomLogit", {"similarity_func": "cosine"}, None),
        ("AvgSensitivity", {"similarity_func": "difference"}, False),
        ("AvgSensitivity", {"similarity_func": "correlation_pearson"}, None),
        ("EfficientMPRT", {"complexity_func": "entropy"}, True),
        ("EfficientMPRT", {"complexity_func": "gini_coeffiient"}, None),
    ],
)
def test_the_direction_follows_the_options(name: str, options: dict[str, Any], higher_is_better: bool | None) -> None:
    metric = quantus_metric(name)(**options)
    assert metric.higher_is_better is higher_is_better
    assert pickle.loads(pickle.dumps(metric)).higher_is_better is higher_is_better


def test_region_perturbation_of_quantus_is_larger_for_the_map_that_is_right() -> None:
    """The drop, most relevant region first: larger for the exact relevance of a linear model than for its reverse."""
    bench = Bench(num=3)
    weights = np.kron(np.random.default_rng(1).exponential(size=(4, 4)), np.ones((8, 8))) / 100
    bench.x = np.abs(bench.x)
    bench.model.forward = lambda x: (  # type: ignore[method-assign]
        (x.double() * x.new_tensor(weights)).sum((1, 2, 3))[:, None] * x.new_tensor([1.0, -1.0, 0.0])
    )
    bench.y = np.zeros(3, int)
    exact = (weights * bench.x.sum(1)).astype(np.float32)
    for order, higher_is_better in (("morf", True), ("lerf", False)):
        metric = quantus_metric("RegionPerturbation")(patch_size=8, order=order)
        bench.maps = exact
        right = [outcome.value for outcome in outcomes_of(metric, bench)]
        bench.maps = exact.max() - exact
        wrong = [outcome.value for outcome in outcomes_of(metric, bench)]
        assert [(a > b) == higher_is_better for a, b in zip(right, wrong, strict=True)] == [True] * 3
        assert metric.higher_is_better is higher_is_better


def test_consistency_of_quantus_is_the_share_of_equal_explanations_that_are_predicted_alike() -> None:
    """Four images, the first two explained alike and the last two alike; the first two predicted alike too."""
    bench = Bench(num=4)
    bench.maps = np.where(np.arange(4)[:, None, None] < 2, 1.0, -1.0) * np.ones((4, 32, 32), np.float32)
    bench.maps[:, 0, 0] *= 0.5  # Quantus refuses a map of one value
    predicted = iter([[0, 0, 1, 2]] * 9)
    bench.model.forward = lambda x: torch.eye(3, dtype=torch.float64)[next(predicted)]  # type: ignore[method-assign]
    metric = quantus_metric("Consistency")(abs=False, discretise_func="sign")
    assert [outcome.value for outcome in outcomes_of(metric, bench)] == pytest.approx([1, 1, 0, 0])
    assert metric.higher_is_better is True


@pytest.mark.parametrize(
    ("name", "options", "call"),
    [
        ("Sparseness", {}, {}),
        ("FaithfulnessEstimate", {"features_in_step": 128}, {}),
        (
            "FaithfulnessEstimate",
            {"features_in_step": 128, "similarity_func": "correlation_spearman"},
            {"softmax": True},
        ),
        ("Infidelity", {"perturb_patch_sizes": [8], "n_perturb_samples": 1}, {}),
        ("RelevanceRankAccuracy", {"abs": True}, {}),
    ],
)
def test_outcomes_are_what_quantus_returns_for_the_image(
    name: str, options: dict[str, Any], call: dict[str, Any]
) -> None:
    bench = Bench(num=2, masks=some_masks(2))
    ours = outcomes_of(resolve_metric(f"quantus:{name}")(**options, **call), bench)
    theirs_options = dict(options)
    if "similarity_func" in options:
        theirs_options["similarity_func"] = quantus.similarity_func.correlation_spearman
    for row in range(2):
        near(ours[row].value, bench.quantus(name, [row], call, **theirs_options)[0], 1e-6)


def test_curves_are_reduced_to_their_mean_height() -> None:
    bench = Bench(num=2)
    ours = outcomes_of(resolve_metric("quantus:PixelFlipping")(features_in_step=128), bench)
    for row in range(2):
        (curve,) = bench.quantus("PixelFlipping", [row], features_in_step=128)
        near(ours[row].value, np.trapezoid(curve) / (len(curve) - 1), 1e-6)
    whole = outcomes_of(
        resolve_metric("quantus:PixelFlipping")(features_in_step=128, return_auc_per_sample=True), bench
    )
    near([o.value for o in whole], [o.value * 23 for o in ours], 1e-6)


def test_reductions_by_hand() -> None:
    assert reduced([True, False], 2) == [1.0, 0.0]
    assert reduced([[1.0, 0.0, 1.0], [2.0, 2.0, 2.0]], 2) == [0.5, 2.0]
    assert reduced({"original": [1.0, 1.0], "a": [0.5, 0.1], "b": [0.1, 0.3]}, 2) == pytest.approx([0.3, 0.2])
    assert reduced({10: 0.5, 20: 1.0}, 1) == [0.75]
    assert reduced(np.array([1.0, 2.0, 3.0]), 2) == [2.0, 2.0]
    with pytest.raises(ValueError, match="neither"):
        reduced(np.zeros((3, 3)), 2)


@pytest.mark.parametrize("name", ["FaithfulnessCorrelation", "PointingGame", "AvgSensitivity", "Sufficiency"])
def test_a_bad_image_never_spoils_another(name: str) -> None:
    bench = Bench(num=5, masks=some_masks(5)).explained()
    metric = resolve_metric(f"quantus:{name}")(**SMALL.get(name, {}))
    good = outcomes_of(metric, bench)
    keep = [0, 3]
    expected = [good[row] for row in keep]
    if metric.facts.across_images:
        rows = Bench(num=5).explained()
        rows.x, rows.y, rows.maps = bench.x[keep], bench.y[keep], bench.maps[keep]
        expected = outcomes_of(metric, rows, keys=[key_of(row) for row in keep])
    bench.maps[1], bench.maps[2, 3, 3], bench.masks[4] = 0, np.nan, False
    if name != "PointingGame":
        bench.maps[4] = 0
    done = outcomes_of(metric, bench)
    assert [done[row].status for row in (1, 2)] == [ALL_ZERO_MAP, NAN_MAP]
    assert done[4].status == (MISSING_MASK if name == "PointingGame" else ALL_ZERO_MAP)
    assert all(outcome.reason for row, outcome in enumerate(done) if row not in keep)
    assert [done[row] for row in keep] == expected


def test_errors_of_quantus_become_a_status() -> None:
    bench = Bench(num=2)
    failed = outcomes_of(resolve_metric("quantus:ROAD")(percentages=[50]), bench)
    assert [outcome.status for outcome in failed] == [ERROR, ERROR]
    assert "IndexError" in failed[0].reason
    bench.maps[:] = np.linspace(0.1, 0.2, 32)
    bench.model.forward = lambda x: x.double().new_zeros(len(x), 3)  # type: ignore[method-assign]
    flat = outcomes_of(resolve_metric("quantus:FaithfulnessEstimate")(features_in_step=128), bench)
    assert [outcome.status for outcome in flat] == [ZERO_DENOMINATOR] * 2


def test_a_changed_prediction_is_told_apart() -> None:
    bench = Bench(num=4).explained()
    metric = resolve_metric("quantus:AvgSensitivity")(
        nr_samples=3, lower_bound=3.0, return_nan_when_prediction_changes=True
    )
    assert CHANGED_PREDICTION in [outcome.status for outcome in outcomes_of(metric, bench)]


@pytest.mark.parametrize("name", ["RelativeInputStability", "RelativeOutputStability"])
def test_an_undefined_value_is_no_changed_prediction(name: str) -> None:
    """Where the option is on by default. The same noise changes no prediction here, but one map of a copy is NaN."""
    bench = Bench(num=3).explained()
    metric = resolve_metric(f"quantus:{name}")(nr_samples=2)
    small = {"perturb_func_kwargs": {"lower_bound": 1e-5, "upper_bound": 2e-5}}
    calm = resolve_metric(f"quantus:{name}")(nr_samples=2, **small)
    assert [outcome.status for outcome in outcomes_of(calm, bench)] == [OK] * 3

    def broken(x: Any, y: Any, keys: Any, model: Any) -> np.ndarray:
        maps = gradient_map(bench.model, x, y)
        return maps * np.nan if keys[0].image_id == "image-1" else maps

    assert [o.status for o in outcomes_of(calm, bench, explain=broken)] == [OK, ZERO_DENOMINATOR, OK]
    wild = resolve_metric(f"quantus:{name}")(nr_samples=3, perturb_func_kwargs={"lower_bound": -9, "upper_bound": 9})
    assert CHANGED_PREDICTION in [outcome.status for outcome in outcomes_of(wild, bench)]
    assert {o.status for o in outcomes_of(metric, bench)} <= {OK, CHANGED_PREDICTION}


def test_nothing_global_is_left_changed_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(num=1)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    expected = np.random.RandomState(5).random(3)
    torch_state, numpy_names = torch.random.get_rng_state(), set(vars(np))
    maps, x = bench.maps.copy(), bench.x.copy()
    outcomes_of(resolve_metric("quantus:FaithfulnessCorrelation")(nr_runs=3), bench)
    outcomes_of(resolve_metric("quantus:Sparseness")(normalise=False, abs=False), bench)
    outcomes_of(resolve_metric("quantus:ModelParameterRandomisation")(), bench)
    np.testing.assert_array_equal(np.random.random(3), expected)  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert set(vars(np)) == numpy_names
    np.testing.assert_array_equal(bench.maps, maps)
    np.testing.assert_array_equal(bench.x, x)
    assert capsys.readouterr().out == ""


def test_an_explainer_with_random_numbers_gets_a_new_key_for_every_call() -> None:
    bench, seen = Bench(num=1).explained(), []

    def explain(x: Any, y: Any, keys: Any, model: Any) -> np.ndarray:
        seen.extend(keys)
        return gradient_map(bench.model, x, y)

    outcomes_of(resolve_metric("quantus:MaxSensitivity")(nr_samples=3), bench, explain=explain)
    assert [key.variant for key in seen] == ["quantus:0", "quantus:1", "quantus:2"]
    assert {key.image_id for key in seen} == {"image-0"}


def test_what_is_missing_or_unknown_is_said() -> None:
    bench = Bench(num=1)
    with pytest.raises(UsageError, match="explain"):
        outcomes_of(resolve_metric("quantus:MaxSensitivity")(), bench, explain=None)
    with pytest.raises(UsageError, match="load_model"):
        outcomes_of(resolve_metric("quantus:MPRT")(), bench, load_model=None)
    for name, why in (("Focus", "mosaics"), ("BatchSufficiency", "Sufficiency computes the same")):
        with pytest.raises(UsageError, match=why):
            resolve_metric(f"quantus:{name}")
    with pytest.raises(ConfigError, match="Did you mean 'nr_runs'"):
        outcomes_of(resolve_metric("quantus:FaithfulnessCorrelation")(nr_run=3), bench)
    with pytest.raises(ConfigError, match="Did you mean 'correlation_spearman'"):
        outcomes_of(resolve_metric("quantus:FaithfulnessCorrelation")(similarity_func="correlation_speerman"), bench)
    with pytest.raises(ConfigError, match="layer_order"):
        resolve_metric("quantus:MPRT")(layer_order="sideways").build()


@pytest.mark.parametrize(
    ("option", "message"), [({"nr_run": 3}, "Did you mean 'nr_runs'"), ({"nr_runs": 3, "subset_size": None}, None)]
)
def test_a_wrong_argument_is_refused_before_any_work(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: dict[str, Any], message: str | None
) -> None:
    """Quantus's object is built once when a new run (or its preview) is prepared, before the model is loaded."""
    config = toy_config(images, tmp_path / "run", metrics={"quantus:FaithfulnessCorrelation": option})

    class ReachedError(Exception):
        pass

    def settled(*_: Any) -> None:
        raise ReachedError

    monkeypatch.setattr("xaibatch.pipeline.facts.settle_model", settled)
    for prepare in (preview, lambda config: evaluate(config, run_local, Watch())):
        with pytest.raises(ConfigError if message else ReachedError, match=message):
            prepare(config)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_metric_that_depends_on_the_shard_says_so(caplog: pytest.LogCaptureFixture) -> None:
    resolve_metric("quantus:Sparseness")().check()
    assert caplog.messages == []
    resolve_metric("quantus:Sufficiency")().check()
    assert "depend on engine.shard_size" in caplog.text


def test_an_adapter_metric_travels_to_another_process() -> None:
    metric = quantus_metric("PixelFlipping")(features_in_step=128, softmax=False)
    copied = pickle.loads(pickle.dumps(metric))
    assert copied.options == metric.options
    assert (copied.name, copied.family, copied.higher_is_better) == ("quantus:PixelFlipping", "faithfulness", False)
    assert type(copied) is type(metric)
