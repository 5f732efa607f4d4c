"""The two metrics of image and lesion-free twin, worked by hand.

The image is 32 x 32 with a lesion in the upper left quarter (16 x 16); the twin lacks it and is the same elsewhere.
"""

from dataclasses import replace

import numpy as np
import pytest

from tests.metrics_oracle import Bench, status_of
from xaibatch.maps import MapOptions
from xaibatch.metrics import METRICS
from xaibatch.metrics.base import TwinVariant, VariantView
from xaibatch.types import ALL_ZERO_MAP, MISSING_TWIN, NAN_MAP, ZERO_DENOMINATOR

MASS, RESPONSE = METRICS["counterfactual_mass"], METRICS["counterfactual_response"]


def quarters(upper_left: float, upper_right: float, lower_left: float, lower_right: float) -> np.ndarray:
    """A map with one value in each quarter."""
    return np.kron(np.array([[upper_left, upper_right], [lower_left, lower_right]]), np.ones((16, 16)))


@pytest.fixture
def bench() -> Bench:
    bench = Bench(num=1)
    bench.twins = bench.x.copy()
    bench.twins[0, :, :16, :16] -= 1.0
    return bench


def respond(bench: Bench, map_hw: np.ndarray, twin_map: np.ndarray, **options: str) -> float:
    bench.maps = map_hw[None]
    answer = VariantView(map_hw=twin_map, pixels_HW=twin_map, logits_K=bench.logits[0], target=int(bench.y[0]))
    return RESPONSE(**options).score(bench.view(0), (answer,))


@pytest.mark.parametrize(
    ("map_hw", "mass"),
    [
        (quarters(1, 0, 0, 0), 1.0),
        (quarters(0, 1, 1, 0), 0.0),
        (quarters(1, 1, 1, 1), 0.25),
        (quarters(3, 1, 0, 0), 0.75),
        (quarters(3, 1, -8, -2), 0.75),
        (quarters(-3, 1, 0, 0), 0.0),
    ],
    ids=["all inside", "all outside", "no preference", "three quarters", "evidence against", "against inside"],
)
def test_counterfactual_mass_by_hand(bench: Bench, map_hw: np.ndarray, mass: float) -> None:
    bench.maps = map_hw[None]
    assert bench.native(MASS(), 0) == pytest.approx(mass, abs=1e-12)
    assert MASS().score(bench.view(0, map_options=MapOptions(normalise="min_max"))) == pytest.approx(mass, abs=1e-12)


def test_the_changed_region_is_where_the_difference_is_large_enough(bench: Bench) -> None:
    bench.twins[0, :, 20, 20] += 0.02  # what rounding leaves elsewhere: 2% of the lesion's difference
    bench.maps = np.zeros((1, 32, 32))
    bench.maps[0, 20, 20] = 1
    assert bench.native(MASS(), 0) == 0
    assert bench.native(MASS(threshold=0.01), 0) == 1
    region = MASS(threshold=0.01).options.region(bench.view(0))
    assert region.sum() == 257
    assert region[:16, :16].all()


def test_a_token_map_is_upsampled_first(bench: Bench) -> None:
    """A 2 x 2 grid with all its mass upper left, bilinear: columns weigh 1 for 8 pixels, then fall by 1/16 a pixel from
    31/32; the share inside the first 16 of a row is (8 + 6) / (8 + 8) = 0.875, its square for both axes."""
    bench.maps = np.array([[[1.0, 0.0], [0.0, 0.0]]])
    assert bench.native(MASS(), 0) == pytest.approx(0.875**2, abs=1e-12)


@pytest.mark.parametrize(
    ("with_lesion", "without", "response"),
    [
        (quarters(1, 0, 0, 0), quarters(0, 0, 0, 1), 1.0),
        (quarters(1, 1, 0, 0), quarters(1, 1, 0, 0), 0.0),
        (quarters(1, 1, 0, 0), quarters(5, 5, 0, 0), 0.0),
        (quarters(4, 4, 0, 0), quarters(1, 3, 0, 0), 0.5),
        (quarters(1, 3, 0, 0), quarters(4, 4, 0, 0), -0.5),
        (quarters(0, 1, 0, 0), quarters(1, 0, 0, 0), -1.0),
        (quarters(1, 1, 0, 0), quarters(-1, -2, 0, -1), 1.0),
        (quarters(1, 1, 0, 0), quarters(0, 0, 0, 0), 1.0),
        (quarters(2, 2, -9, 0), quarters(1, 3, 0, -7), 0.5),
    ],
    ids=[
        "leaves", "stays", "only scaled", "halves", "doubles", "comes", "turns against", "nothing left", "signed",
    ],
)  # fmt: skip
def test_counterfactual_response_by_hand(
    bench: Bench, with_lesion: np.ndarray, without: np.ndarray, response: float
) -> None:
    assert respond(bench, with_lesion, without) == pytest.approx(response, abs=1e-12)


def test_raw_mass_sees_a_map_that_only_fades(bench: Bench) -> None:
    assert respond(bench, quarters(4, 4, 0, 0), quarters(1, 1, 0, 0)) == pytest.approx(0)
    assert respond(bench, quarters(4, 4, 0, 0), quarters(1, 1, 0, 0), mass="raw") == pytest.approx(0.75)


def test_a_random_map_scores_the_region_share_and_no_response(bench: Bench) -> None:
    generator = np.random.default_rng(0)
    masses, responses = [], []
    for _ in range(200):
        bench.maps = generator.random((1, 32, 32))
        masses.append(bench.native(MASS(), 0))
        responses.append(respond(bench, bench.maps[0], generator.random((32, 32))))
    assert np.mean(masses) == pytest.approx(0.25, abs=0.005)
    assert np.mean(responses) == pytest.approx(0, abs=0.01)


def test_the_twin_is_explained_for_the_same_class(bench: Bench) -> None:
    bench.explained()
    (ask,) = RESPONSE().variants(bench.image_view(0))
    assert ask == TwinVariant()
    assert -1 <= bench.native(RESPONSE(), 0) <= 1
    assert RESPONSE().num_variants() == 1
    assert RESPONSE(mass="raw").cell_key() == RESPONSE().cell_key()


def test_undefined_causal_scores(bench: Bench) -> None:
    bench.maps = quarters(-1, -1, 0, 0)[None]
    assert status_of(lambda: bench.native(MASS(), 0)) == ZERO_DENOMINATOR
    assert status_of(lambda: respond(bench, quarters(0, 1, 0, 0), quarters(0, 1, 1, 0))) == ZERO_DENOMINATOR
    assert status_of(lambda: respond(bench, quarters(1, 0, 0, 0), quarters(np.nan, 0, 0, 0))) == NAN_MAP
    bench.maps = np.zeros((1, 32, 32))
    assert status_of(lambda: bench.native(MASS(), 0)) == ALL_ZERO_MAP
    bench.maps = quarters(1, 0, 0, 0)[None]
    same = replace(bench.view(0), twin_CHW=bench.x[0])
    assert status_of(lambda: MASS().score(same)) == ZERO_DENOMINATOR
    assert status_of(lambda: RESPONSE().variants(same)) == ZERO_DENOMINATOR
    for missing in (None, np.full_like(bench.x[0], np.nan)):
        view = replace(bench.view(0), twin_CHW=missing)
        assert status_of(lambda view=view: MASS().score(view)) == MISSING_TWIN
        assert status_of(lambda view=view: RESPONSE().variants(view)) == MISSING_TWIN
