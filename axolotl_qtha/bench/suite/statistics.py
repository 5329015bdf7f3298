"""Means and intervals over seeds, and what tests say of paired differences.

Sources: Student's t for paired differences; Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal
of Statistics 6 (1979) 65-70; two one-sided tests (TOST), Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987)
657-680.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
ALPHA = 1 - LEVEL


@dataclass(frozen=True)
class Interval:
    """A mean and half of its 95 % interval (Student's t); no interval from a single value."""

    mean: float
    half: float | None
    count: int
    error: float | None = None  # standard error of the mean

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.half is not None and self.mean + self.half < 0

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.half is not None and self.mean - self.half > 0

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """Return it as people write it."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"

    def p_value(self) -> float | None:
        """Return the p-value of "the mean is zero", two-sided (Student's t); None from a single value.

        Below `ALPHA` exactly where the interval excludes zero.
        """
        if self.error is None:
            return None
        return min(1.0, 2 * _tail(abs(self.mean), self.error, self.count))

    def p_equivalent(self, margin: float) -> float | None:
        """Return the p-value of "the mean is at least `margin` from zero" (two one-sided tests); None from a single value.

        Below `ALPHA` exactly where the interval of level 1 - 2 ALPHA lies within the margin.
        """
        if self.error is None:
            return None
        return max(_tail(self.mean + margin, self.error, self.count), _tail(margin - self.mean, self.error, self.count))


def _tail(distance: float, error: float, count: int) -> float:
    """Return how likely a mean of `count` values lies so far above its expectation, or farther; `error` is its standard error."""
    if error == 0:  # values that are all the same
        return 0.0 if distance > 0 else 0.5 if distance == 0 else 1.0
    from scipy.stats import t

    return float(t.sf(distance / error, count - 1))


def interval(values: Sequence[float]) -> Interval | None:
    """Return mean and interval of values, None of none."""
    count = len(values)
    if not count:
        return None
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, None, 1)
    from scipy.stats import t

    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    error = math.sqrt(variance / count)
    return Interval(mean, float(t.ppf((1 + LEVEL) / 2, count - 1)) * error, count, error)


def paired(ours: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """Return mean and interval of ours - others, over the seeds that both have."""
    return interval([ours[seed] - others[seed] for seed in sorted(ours.keys() & others.keys())])


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method, in the order given.

    With those below `ALPHA` taken for real, the chance of one wrong one among all is at most `ALPHA`, however they depend on each
    other.

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03, 0.005])]
    [0.03, 0.06, 0.06, 0.02]
    """
    result, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        result[index] = largest
    return result
