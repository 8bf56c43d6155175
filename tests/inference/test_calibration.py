"""Thresholds with a stated risk, against exact distributions and on fresh data."""

import numpy as np
import pytest
from scipy import optimize, stats

from unified_mm.inference.calibration import calibrate, p_value


@pytest.mark.parametrize("examples", [1, 30, 400])
@pytest.mark.parametrize("tolerance", [0.02, 0.2])
@pytest.mark.parametrize("share", [0.0, 0.31, 0.9, 1.0, 2.0])
def test_the_p_value_is_the_smaller_one_of_two_bounds_written_out(examples, tolerance, share):
    risk = share * tolerance
    expected = 1.0
    if share < 1:
        # Hoeffding's is the best Chernoff bound of Bernoulli variables, here found by search.
        def chernoff(rate):
            moment = 1 - tolerance + tolerance * np.exp(-rate)
            return examples * (rate * risk + np.log(moment))

        least = optimize.minimize_scalar(chernoff, bounds=(0, 60), method="bounded").fun
        lost = np.ceil(round(examples * risk, 6))
        bentkus = np.e * stats.binom.cdf(lost, examples, tolerance)
        expected = min(np.exp(least), bentkus, 1.0)
    assert p_value(risk, examples, tolerance) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("examples", [20, 150])
@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_a_risk_at_the_tolerance_passes_no_more_often_than_the_error(examples, tolerance):
    # Losses of 0 and 1 are the widest; how often each sum comes is known exactly.
    wrong = np.arange(examples + 1)
    p = np.array([p_value(each / examples, examples, tolerance) for each in wrong])
    often = stats.binom.pmf(wrong, examples, tolerance)
    for error in (0.01, 0.05, 0.2, 0.5):
        assert often[p <= error].sum() <= error


def test_the_first_threshold_that_fails_ends_it_though_bolder_ones_would_pass():
    means = {1.0: 0.0, 0.8: 0.01, 0.6: 0.09, 0.4: 0.0}
    asked = []

    def losses_at(threshold):
        asked.append(threshold)
        return np.full(500, means[threshold])

    found = calibrate(losses_at, list(means), tolerance=0.1, error=0.05)
    assert found is not None and found.threshold == 0.8 and asked == [1.0, 0.8, 0.6]
    assert (found.risk, found.examples) == (pytest.approx(0.01), 500)


def test_there_may_be_no_threshold():
    assert calibrate(lambda _: np.zeros(10), (1.0, 0.5), tolerance=0.05, error=0.05) is None


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_an_error_that_says_nothing_is_refused(error):
    with pytest.raises(ValueError, match=f"error={error}: must be above 0 and below 1"):
        calibrate(lambda _: np.ones(10), (1.0,), tolerance=0.5, error=error)


@pytest.mark.parametrize("losses", [[], [0.5, 1.5], [np.nan]])
def test_what_is_no_loss_is_refused(losses):
    with pytest.raises(ValueError, match=r"losses in \[0, 1\] of one example at least"):
        calibrate(lambda _: np.array(losses), (1.0,), tolerance=0.5, error=0.5)


@pytest.mark.parametrize("kind", ["right or wrong", "shares of tokens"])
def test_the_risk_is_kept_on_fresh_data_in_91_of_100_resamplings(kind):
    # An example of difficulty u is lost below u ** 3: the risk at t is 1 - t ** (1/3).
    tolerance, kept, risks = 0.05, 0, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        hard, tokens = rng.random(1000) ** 3, rng.random((1000, 8)) ** 3

        def losses_at(threshold, hard=hard, tokens=tokens):
            lost = (hard if kind == "right or wrong" else tokens) > threshold
            return lost.astype(float) if lost.ndim == 1 else lost.mean(1)

        found = calibrate(losses_at, np.linspace(1, 0.7, 61).tolist(), tolerance, error=0.05)
        assert found is not None
        risks.append(1 - found.threshold ** (1 / 3))
        kept += risks[-1] <= tolerance
    assert kept >= 91
    assert np.mean(risks) > 0.6 * tolerance  # and it is not kept by leaving nothing early
