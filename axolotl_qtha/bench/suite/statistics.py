"""Means and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and half of its 95 % interval (Student's t); no interval from a single value."""

    mean: float
    half: float | None
    count: int

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
    return Interval(mean, float(t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(variance / count), count)


def paired(ours: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """Return mean and interval of ours - others, over the seeds that both have."""
    return interval([ours[seed] - others[seed] for seed in sorted(ours.keys() & others.keys())])
