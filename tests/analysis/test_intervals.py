"""Student's interval by the numbers of his table, and by scipy's tests."""

import numpy as np
import pytest
from scipy import stats

from unified_mm.analysis.intervals import mean_interval, paired_difference


def test_the_interval_of_five_values():
    found = mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    spread = 2.776 * np.sqrt(2.5 / 5)  # 4 degrees of freedom
    assert found.mean == 3.0 and found.count == 5
    assert found.low == pytest.approx(3 - spread, abs=1e-3)
    assert found.high == pytest.approx(3 + spread, abs=1e-3)
    assert str(found) == f"3.000 ({found.low:.3f} to {found.high:.3f})"


def test_one_value_has_no_interval_and_none_no_mean():
    one = mean_interval(np.array([2.0]))
    assert one.mean == 2.0 and np.isnan(one.low) and np.isnan(one.high)
    with pytest.raises(ValueError, match="no value"):
        mean_interval(np.zeros(0))


EARLY = dict(enumerate([0.50, 0.54, 0.49, 0.53, 0.52]))
LATE = dict(enumerate([0.60, 0.66, 0.59, 0.62, 0.64]))


def test_differences_are_of_pairs():
    found = paired_difference(LATE, EARLY)
    other = stats.ttest_rel([*LATE.values()], [*EARLY.values()]).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), other)
    assert found.excludes_zero
    assert not paired_difference({0: 0.4, 1: 0.6}, {0: 0.5, 1: 0.5}).excludes_zero
    one = paired_difference({0: 0.5, 7: 0.9}, {7: 0.4})  # of what both have
    assert one.count == 1 and not one.known and not one.excludes_zero
    assert paired_difference({0: 0.5}, {1: 0.5}) is None
