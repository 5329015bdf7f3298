"""Means and intervals against scipy's."""

import numpy as np
import pytest
from scipy import stats

from axolotl_qtha.bench.suite.statistics import Interval, interval, paired


def test_interval_is_scipys():
    values = [3.1, 2.9, 3.4, 3.0]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.count == 4


def test_paired_is_scipys_test_of_the_differences():
    ours, others = {1: 3.0, 2: 3.2, 3: 2.9, 4: 7.0}, {3: 3.1, 1: 3.3, 2: 3.25, 9: 0.0}
    found = paired(ours, others)
    test = stats.ttest_rel([3.0, 3.2, 2.9], [3.3, 3.25, 3.1])
    assert found.mean == pytest.approx(np.mean([-0.3, -0.05, -0.2]))
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.below_zero == (test.pvalue < 0.05)


def test_few_values():
    assert interval([]) is None
    assert paired({1: 2.0}, {2: 2.0}) is None
    one = interval([2.0])
    assert one == Interval(2.0, None, 1)
    assert not one.below_zero
    assert not one.above_zero
    assert one.text() == "2.000"


def test_what_an_interval_says():
    assert Interval(-0.2, 0.1, 3).below_zero
    assert Interval(0.2, 0.1, 3).above_zero
    assert not Interval(-0.1, 0.1, 3).below_zero
    assert Interval(-0.2, 0.1, 3).text(2, sign=True) == "-0.20 ± 0.10"
    assert Interval(0.2, 0.1, 3).text(2, sign=True) == "+0.20 ± 0.10"
