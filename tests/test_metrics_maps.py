"""Metrics of the map alone (complexity, localisation) against stock Quantus 0.6, captured numbers and slow rewrites."""

from typing import Any

import numpy as np
import pytest

from tests.metrics_oracle import MAP_KINDS, Bench, near, some_masks, stable_sorting, status_of
from tests.test_metrics_captured import golden_view, study_map
from xaibatch.maps import MapOptions
from xaibatch.metrics import METRICS
from xaibatch.metrics.reading import model_output
from xaibatch.types import ALL_ZERO_MAP, MISSING_MASK, NAN_MAP, NEGATIVE_MAP, ZERO_DENOMINATOR

KINDS = sorted(MAP_KINDS)

COMPLEXITY: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "sparseness": ({}, "Sparseness", {}),
    "complexity": ({}, "Complexity", {}),
    "effective_complexity": ({"eps": 0.3}, "EffectiveComplexity", {"eps": 0.3}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("name", sorted(COMPLEXITY))
def test_complexity_metrics_equal_quantus(name: str, kind: str, rows: tuple[int, ...]) -> None:
    options, theirs, theirs_options = COMPLEXITY[name]
    bench = Bench(kind=kind)
    near([bench.native(METRICS[name](**options), row) for row in rows], bench.quantus(theirs, rows, **theirs_options))


@pytest.mark.parametrize("kind", ["lrp", "attn_mean", "attn_min", "attn_max"])
def test_complexity_metrics_equal_the_captured_numbers(golden_small: Any, kind: str) -> None:
    check_captured_complexity(golden_small, "small", kind, 1)
    check_captured_complexity(golden_small, "small", kind, 6)


@pytest.mark.parametrize("kind", ["lrp", "attn_max"])
def test_complexity_metrics_equal_the_captured_numbers_on_x_rays(shared: Any, kind: str) -> None:
    check_captured_complexity(shared / "golden", "tiny", kind, 12)


def check_captured_complexity(folder: Any, name: str, kind: str, batch: int) -> None:
    """Captured over the call's own normalisation: for Effective Complexity it was off."""
    golden, x = np.load(folder / f"{name}_quantus.npz"), np.load(folder / f"{name}_lrp.npz")["x"]
    maps = study_map(folder, name, kind)
    for row in range(len(x)):
        view = golden_view(x[row], np.zeros(3), 0, maps[row])
        counted = METRICS["effective_complexity"](eps=0.1, normalise=False).score(view)
        assert counted == golden[f"EC_{kind}_bs{batch}"][row]
        near(METRICS["sparseness"]().score(view), golden[f"Sparseness_{kind}_bs{batch}"][row], 2e-6)
        near(METRICS["complexity"]().score(view), golden[f"Complexity_{kind}_bs{batch}"][row], 2e-6)


def test_the_study_form_of_effective_complexity_is_a_share_of_the_pixels(golden_small: Any) -> None:
    fork = np.load(golden_small / "small_quantus_authors_fork.npz")["fork_EC_lrp"]
    maps = study_map(golden_small, "small", "lrp")
    for row in range(6):
        view = golden_view(np.zeros((3, 64, 64)), np.zeros(3), 0, maps[row])
        assert METRICS["effective_complexity"](eps=0.1, normalise=False).score(view) == fork[row]
        assert METRICS["effective_complexity"](eps=0.1, normalise=False, unit="share").score(view) == fork[row] / 4096
    assert METRICS["effective_complexity"](unit="share").bounds == (0, 1)
    assert METRICS["effective_complexity"]().bounds == (0, float("inf"))


def test_a_model_of_one_output_has_a_probability() -> None:
    logits_S1 = np.array([[-1.0], [0.0], [2.0]])
    near(model_output(logits_S1, "probability"), 1 / (1 + np.exp(-logits_S1)))


def test_scores_do_not_change_the_map_that_they_read() -> None:
    """Quantus adds to, divides and takes the absolute value of its caller's array in place where it may."""
    bench = Bench(kind="signed", masks=some_masks(3))
    bench.maps = bench.maps.astype(np.float64)
    before = bench.maps.copy()
    for name in (*COMPLEXITY, *LOCALISATION, "relevance_outside_lungs"):
        bench.natives(METRICS[name]())
    np.testing.assert_array_equal(bench.maps, before)


def test_quantus_changes_its_callers_map_where_it_may() -> None:
    import quantus

    a = np.random.default_rng(0).random((1, 1, 32, 32))
    before = a.copy()
    quantus.Sparseness(normalise=False, abs=False, disable_warnings=True)(
        model=None, x_batch=np.zeros((1, 3, 32, 32)), y_batch=np.zeros(1, int), a_batch=a, channel_first=True
    )
    assert (a != before).all()


# -- localisation

LOCALISATION: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "pointing_game": ({}, "PointingGame", {}),
    "top_k_intersection": ({"k": 90}, "TopKIntersection", {"k": 90}),
    "relevance_mass_accuracy": ({"mass": "signed"}, "RelevanceMassAccuracy", {}),
    "relevance_rank_accuracy": ({}, "RelevanceRankAccuracy", {}),
    "attribution_localisation": ({}, "AttributionLocalisation", {}),
    "localisation_auc": ({}, "AUC", {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(1,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("name", sorted(LOCALISATION))
def test_localisation_metrics_equal_quantus(name: str, kind: str, rows: tuple[int, ...]) -> None:
    options, theirs, theirs_options = LOCALISATION[name]
    bench = Bench(num=5, kind=kind, masks=some_masks(5))
    with stable_sorting():
        expected = bench.quantus(theirs, rows, **theirs_options)
    near([bench.native(METRICS[name](**options), row) for row in rows], expected)


@pytest.mark.parametrize("name", [*COMPLEXITY, *LOCALISATION])
def test_a_constant_map_in_a_batch_scores_as_in_quantus(name: str) -> None:
    bench = Bench(kind="tokens", masks=some_masks(3))
    bench.maps[1] = 1.0
    options, theirs, theirs_options = (COMPLEXITY | LOCALISATION)[name]
    with stable_sorting():
        expected = bench.quantus(theirs, **theirs_options)
    near(bench.natives(METRICS[name](**options)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*COMPLEXITY, *LOCALISATION])
def test_maps_of_any_scale_score_as_in_quantus_one_by_one(name: str, kind: str) -> None:
    """Peaks of 0.01, 3 and 500: Quantus, called for one image, normalises it by its own peak as ours does."""
    bench = Bench(kind=kind, masks=some_masks(3))
    bench.maps *= np.float32([[[0.01]], [[3]], [[500]]])
    options, theirs, theirs_options = (COMPLEXITY | LOCALISATION)[name]
    with stable_sorting():
        expected = [bench.quantus(theirs, [row], **theirs_options)[0] for row in range(3)]
    near(bench.natives(METRICS[name](**options)), expected)


def test_quantus_normalises_by_the_peak_of_the_whole_call() -> None:
    bench = Bench(kind="tokens")
    bench.maps *= np.float32([[[1]], [[1]], [[100]]])
    alone = [bench.quantus("EffectiveComplexity", [row], eps=0.3)[0] for row in range(3)]
    together = bench.quantus("EffectiveComplexity", eps=0.3)
    assert together[:2] == [0, 0] != alone[:2]
    near(bench.natives(METRICS["effective_complexity"](eps=0.3)), alone)


@pytest.mark.parametrize(
    ("name", "options", "theirs", "theirs_options"),
    [
        ("top_k_intersection", {"k": 50, "concept_influence": True}, "TopKIntersection",
         {"k": 50, "concept_influence": True}),
        ("attribution_localisation", {"positive_attributions": True, "abs": False}, "AttributionLocalisation",
         {"positive_attributions": True, "abs": False}),
        ("relevance_mass_accuracy", {"abs": True}, "RelevanceMassAccuracy", {"abs": True}),
        ("relevance_mass_accuracy", {"abs": True, "mass": "signed"}, "RelevanceMassAccuracy", {"abs": True}),
        ("localisation_auc", {"abs": True, "normalise": False}, "AUC", {"abs": True, "normalise": False}),
    ],
)  # fmt: skip
def test_options_of_localisation_metrics_equal_quantus(
    name: str, options: dict[str, Any], theirs: str, theirs_options: dict[str, Any]
) -> None:
    bench = Bench(num=4, kind="signed", masks=some_masks(4))
    with stable_sorting():
        expected = bench.quantus(theirs, **theirs_options)
    near(bench.natives(METRICS[name](**options)), expected)


def test_weights_of_the_pointing_game_and_attribution_localisation_follow_the_papers() -> None:
    """Quantus fails on a weighted hit, and multiplies by a share of the batch where the paper divides by the mask's."""
    bench = Bench(num=3, kind="tokens", masks=some_masks(3))
    for row in range(3):
        bench.masks[row] |= bench.maps[row] == bench.maps[row].max()
    share = bench.masks.mean((1, 2))
    near(bench.natives(METRICS["pointing_game"](weighted=True)), 1 - share, 1e-12)
    with pytest.raises(TypeError, match="boolean array indexing"):
        bench.quantus("PointingGame", weighted=True)
    plain = np.array(bench.natives(METRICS["attribution_localisation"]()))
    near(bench.natives(METRICS["attribution_localisation"](weighted=True)), plain / share, 1e-12)
    theirs = [bench.quantus("AttributionLocalisation", rows, weighted=True)[0] for rows in ([0, 1, 2], [0, 1, 2, 0])]
    assert theirs[0] != theirs[1]


@pytest.mark.parametrize("name", sorted(LOCALISATION))
def test_an_image_without_its_mask_is_not_scored(name: str) -> None:
    bench = Bench(num=2, kind="tokens", masks=some_masks(2))
    bench.masks[1] = False
    assert status_of(lambda: bench.native(METRICS[name](), 1)) == MISSING_MASK
    assert status_of(lambda: bench.native(METRICS[name](mask="heart"), 0)) == MISSING_MASK


def test_quantus_calls_an_empty_mask_a_hit() -> None:
    bench = Bench(num=2, kind="tokens", masks=some_masks(2))
    bench.masks[1] = False
    assert bool(bench.quantus("PointingGame")[1]) is True


def test_localisation_auc_is_the_share_of_ordered_pairs() -> None:
    bench = Bench(num=1, kind="ties", masks=some_masks(1))
    inside, outside = bench.maps[0][bench.masks[0]], bench.maps[0][~bench.masks[0]]
    pairs = (inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean()
    near(bench.native(METRICS["localisation_auc"](), 0), pairs, 1e-12)
    bench.masks[:] = True
    assert status_of(lambda: bench.native(METRICS["localisation_auc"](), 0)) == ZERO_DENOMINATOR


def test_relevance_outside_the_lungs_counts_positive_relevance_before_normalisation() -> None:
    """Map [[3, -5], [1, 0]]: of 4 positive units 1 lies outside a lung mask that holds the upper row."""
    bench = Bench(num=1, masks=np.kron([[[True, True], [False, False]]], np.ones((16, 16), bool)))
    bench.maps = np.kron(np.array([[[3.0, -5.0], [1.0, 0.0]]]), np.ones((16, 16)))
    metric = METRICS["relevance_outside_lungs"]()
    assert bench.native(metric, 0) == 0.25
    assert metric.score(bench.view(0, map_options=MapOptions(normalise="min_max"))) == 0.25
    bench.maps = -np.abs(bench.maps)
    assert status_of(lambda: bench.native(metric, 0)) == ZERO_DENOMINATOR


def test_negative_relevance_that_leaves_a_share_undefined_is_named() -> None:
    """A mask that holds more than the whole, which Quantus calls undefined or scores as 2; a signed map whose sum is
    mere rounding."""
    bench = Bench(num=1, masks=np.kron([[[True, True], [False, False]]], np.ones((16, 16), bool)))
    bench.maps = np.kron(np.array([[[3.0, -1.0], [-1.0, 0.0]]]), np.ones((16, 16)))
    assert status_of(lambda: bench.native(METRICS["attribution_localisation"](abs=False), 0)) == NEGATIVE_MAP
    assert np.isnan(bench.quantus("AttributionLocalisation", abs=False)[0])
    near([bench.native(METRICS["relevance_mass_accuracy"](mass="signed"), 0)], [2.0], 1e-12)
    near(bench.quantus("RelevanceMassAccuracy"), [2.0])
    bench.maps = np.kron(np.array([[[0.1, 0.2], [-0.3, 0.0]]]), np.ones((16, 16)))
    assert bench.maps.sum() != 0
    assert status_of(lambda: bench.native(METRICS["relevance_mass_accuracy"](mass="signed"), 0)) == ZERO_DENOMINATOR


MAP_METRICS = (*COMPLEXITY, *LOCALISATION, "relevance_outside_lungs")


@pytest.mark.parametrize("name", MAP_METRICS)
def test_maps_that_cannot_be_read_are_null(name: str) -> None:
    bench = Bench(num=1, masks=some_masks(1), maps=np.zeros((1, 32, 32)))
    assert status_of(lambda: bench.native(METRICS[name](), 0)) == ALL_ZERO_MAP
    bench.maps[0, 3, 4] = np.inf
    assert status_of(lambda: bench.native(METRICS[name](), 0)) == NAN_MAP


def test_quantus_scores_a_map_of_nan_and_refuses_a_map_of_zeros(golden_small: Any) -> None:
    assert np.load(golden_small / "small_quantus.npz")["x_EC_nan_map"].tolist()[0] == 0
    bench = Bench(num=1, maps=np.zeros((1, 32, 32), np.float32))
    with pytest.raises(AssertionError, match="all equal to zero"):
        bench.quantus("Sparseness")
    bench.maps = np.full((1, 32, 32), np.nan, np.float32)
    bench.maps[0, 0, 0] = 1
    assert bench.quantus("EffectiveComplexity") == [0]
    among_others = Bench(num=2, kind="tokens")
    among_others.maps[1] = 0
    assert among_others.quantus("EffectiveComplexity")[1] == 0
    assert status_of(lambda: among_others.native(METRICS["effective_complexity"](), 1)) == ALL_ZERO_MAP


@pytest.mark.parametrize("name", MAP_METRICS)
def test_a_score_does_not_depend_on_the_scale_of_the_map(name: str) -> None:
    bench = Bench(num=1, kind="signed", masks=some_masks(1))
    metric = METRICS[name]()
    once = bench.native(metric, 0)
    bench.maps = bench.maps.astype(np.float64) * 8
    near(bench.native(metric, 0), once, 1e-9)
