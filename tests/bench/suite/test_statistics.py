"""Means and intervals against scipy's."""

import numpy as np
import pytest
from scipy import stats

from axolotl_qtha.bench.suite.statistics import ALPHA, Interval, holm, interval, paired

DIFFERENCES = [
    [-0.3, -0.05, -0.2],
    [0.01, -0.02, 0.015, -0.004],
    [0.11, 0.12],
    [0.5, -0.5, 0.1, 0.2, -0.4, 0.01],
    [0.03, 0.031, 0.029, 0.033],
]


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
    assert found.p_value() == pytest.approx(test.pvalue, rel=1e-9)  # the same distribution function, in another form


@pytest.mark.parametrize("values", DIFFERENCES, ids=str)
@pytest.mark.parametrize("margin", [0.005, 0.02, 0.3])
def test_equivalence_is_two_one_sided_tests_of_scipys(values, margin):
    """The larger p-value of two t-tests; below 5 % just where the 90 % interval lies within the margin."""
    found = interval(values)
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert found.p_equivalent(margin) == pytest.approx(max(above, below), rel=1e-9, abs=1e-15)
    low, high = stats.t.interval(0.9, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (found.p_equivalent(margin) < ALPHA) == (-margin < low and high < margin)


def test_values_that_are_all_the_same_leave_nothing_to_chance():
    same, apart = interval([0.0, 0.0]), interval([0.5, 0.5])
    assert (same.p_value(), apart.p_value()) == (1, 0)
    assert [same.p_equivalent(0.1), apart.p_equivalent(0.1), apart.p_equivalent(0.6)] == [0, 1, 0]
    one = interval([2.0])
    assert one.p_value() is None
    assert one.p_equivalent(0.1) is None


def test_holm_on_a_worked_example():
    """The usual example (0.01, 0.04, 0.03, 0.005 at 5 %): the first and the last are rejected, the others are not.

    The corrected values by hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which is not below the one before it.
    """
    found = holm([0.01, 0.04, 0.03, 0.005])
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [value < 0.05 for value in found] == [True, False, False, True]


def test_holm_rejects_what_its_steps_reject():
    """Against the procedure as Holm describes it, step by step, at several levels."""
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 30):
        values = random.uniform(0, 1, count) ** 4
        corrected = holm(list(values))
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for step, index in enumerate(np.argsort(values)):
                if values[index] >= level / (count - step):
                    break
                rejected.add(int(index))
            assert {i for i, value in enumerate(corrected) if value < level} == rejected
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0], "no more than 1"


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
