"""The share of sampling noise in repeated scores, against hand-worked cases, the F statistic and known variances."""

import numpy as np
from scipy import stats

from xaibatch.results.statistics_repeats import noise_share


def test_noise_share_by_hand():
    # three images, two draws each: within squares (0.5 + 0.5 + 2) / 3 = 1; means 0.5, 4.5, 8 around 13/3, so between is
    # 2 * (14.6944 + 0.0278 + 13.4444) / 2 = 28.1667; variance of images (28.1667 - 1) / 2 = 13.5833; share 1 / 14.5833
    values = np.array([[0.0, 1.0], [4.0, 5.0], [7.0, 9.0]])
    found = noise_share(values, np.arange(3), seed=0)
    np.testing.assert_allclose(found.share, 1 / (1 + (28 + 1 / 6 - 1) / 2), rtol=1e-12)
    assert (found.low, found.high) == (None, None)  # three images are too few for an interval


def test_noise_share_agrees_with_the_f_statistic():
    draws = np.random.default_rng(0)
    values = draws.normal(size=(30, 1)) + 0.7 * draws.normal(size=(30, 4))
    f = stats.f_oneway(*values).statistic
    found = noise_share(values, np.arange(30), seed=0)
    np.testing.assert_allclose(found.share, 1 / (1 + (f - 1) / 4), rtol=1e-12)
    np.testing.assert_allclose(found.share_of_mean, 1 / f, rtol=1e-12)


def test_noise_share_of_known_variances_and_of_none():
    draws = np.random.default_rng(1)
    values = draws.normal(size=(800, 1)) + 0.5 * draws.normal(size=(800, 3))
    values[::7, 2] = np.nan
    found = noise_share(values, np.arange(800), seed=0)
    assert found.low < 0.2 < found.high  # 0.25 / 1.25
    assert found.high - found.low < 0.06
    assert noise_share(np.repeat(draws.normal(size=(30, 1)), 3, 1), np.arange(30), seed=0).share == 0
    assert noise_share(draws.normal(size=(30, 1)), np.arange(30), seed=0) is None
