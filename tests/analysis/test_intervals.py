"""Student's interval by the numbers of his table."""

import numpy as np
import pytest

from unified_mm.analysis.intervals import mean_interval


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
