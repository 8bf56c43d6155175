"""The fitted power law on laws that are known."""

import numpy as np
import pytest

from unified_mm.analysis.scaling import fit_power_law

COST = np.geomspace(1e9, 1e12, 8)


@pytest.mark.parametrize(("b", "c"), [(0.3, 1.2), (0.05, 0.0), (0.8, 2.0)])
def test_a_law_without_noise_is_found(b, c):
    law = fit_power_law(COST, 50 * COST**-b + c)
    assert law.exponent.value == pytest.approx(b, rel=0.02)
    assert law.floor.value == pytest.approx(c, abs=0.03)
    assert law.scale.value == pytest.approx(50 * law.unit**-b, rel=0.02)
    for interval in (law.exponent, law.floor, law.scale):
        assert interval.low <= interval.value <= interval.high
    np.testing.assert_allclose(law(COST), 50 * COST**-b + c, rtol=1e-3)


def test_its_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = 300 * COST**-0.25 + 1.0
    held = np.zeros(2)
    for _ in range(60):
        law = fit_power_law(COST, truth + 0.01 * rng.normal(size=8))
        held += (
            law.exponent.low <= 0.25 <= law.exponent.high,
            law.floor.low <= 1.0 <= law.floor.high,
        )
    assert (held / 60 > 0.85).all()


def test_the_fit_is_no_worse_than_any_other():
    rng = np.random.default_rng(1)
    loss = 300 * COST**-0.25 + 1.0 + 0.02 * rng.normal(size=8)
    law = fit_power_law(COST, loss)
    own = np.square(law(COST) - loss).sum()
    assert law.deviation == pytest.approx(np.sqrt(own / 5))
    for b in np.linspace(0.05, 1, 40):
        design = np.stack([(COST / law.unit) ** -b, np.ones(8)], axis=1)
        (a, c), *_ = np.linalg.lstsq(design, loss)
        if a > 0 and 0 <= c <= loss.min():
            assert own <= np.square(design @ [a, c] - loss).sum() + 1e-9


def test_noise_alone_leaves_the_exponent_open():
    law = fit_power_law(COST, 2 + 0.1 * np.array([1.0, -1, -1, 1, 1, -1, -1, 1]))
    assert law.exponent.high > 3 and law.exponent.low < 0.01


def test_lack_of_fit_is_seen_where_repeats_show_the_noise():
    rng = np.random.default_rng(0)
    cost = np.repeat(COST, 3)

    def chance(truth):
        return fit_power_law(cost, truth + 0.01 * rng.normal(size=cost.size)).lack_of_fit

    chances = [chance(1 + 3 * cost**-0.25) for _ in range(40)]
    assert sum(p < 0.05 for p in chances) <= 6 and sum(p < 0.5 for p in chances) >= 12
    assert chance(1 + 0.3 * np.sin(np.log(cost))) < 1e-6  # no power law
    assert fit_power_law(COST, 1 + 3 * COST**-0.25).lack_of_fit is None  # no repeats


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="3 points at 3 different costs"):
        fit_power_law(COST[:3], np.ones(3))
    with pytest.raises(ValueError, match="4 points at 2 different costs"):
        fit_power_law(np.array([1.0, 1, 2, 2]), np.ones(4))
    with pytest.raises(ValueError, match="positive and finite"):
        fit_power_law(COST, np.array([1.0] * 7 + [np.nan]))
    with pytest.raises(ValueError, match="one loss for each cost"):
        fit_power_law(COST, np.ones(3))
