"""Paired differences of a suite with their tests: p-values, corrected for their number, and whether two are equivalent.

The family that Holm's correction is over: all paired differences of the validation loss of the suite whose interval is known,
over all tasks. The tests of equivalence are a family of their own, of the same pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .statistics import ALPHA, Interval, holm
from .table import Difference, Entry, differences


@dataclass(frozen=True)
class Comparison:
    """A paired difference of the validation loss, nats a token; ours - other."""

    difference: Difference
    test: Interval | None  # of the test loss, which decides nothing
    p: float | None  # of "no difference"; None where there is no interval
    p_holm: float | None
    margin: float | None  # of equivalence
    p_equivalent: float | None = None  # of "at least the margin apart"
    p_equivalent_holm: float | None = None

    @property
    def verdict(self) -> str:
        """Return what the difference says, and whether it says so among all others too."""
        text, value = self.difference.verdict, self.difference.value
        apart = value is not None and (value.below_zero or value.above_zero)
        return f"{text}, not after Holm's correction" if apart and not self.sure else text

    @property
    def sure(self) -> bool:
        """Whether the two differ, among all that were compared."""
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def equivalent(self) -> str:
        """Return whether the two are equivalent within the margin, in words; empty without one."""
        if self.margin is None or self.p_equivalent is None or self.p_equivalent_holm is None:
            return ""
        if self.p_equivalent >= ALPHA:
            return "not shown"
        return "yes" if self.p_equivalent_holm < ALPHA else "yes, not after Holm's correction"


def comparisons(found: list[Entry], margin: float | None = None) -> list[Comparison]:
    """Return every paired difference, with its tests.

    Args:
        found: all entries of the suite, for they are one family.
        margin: of equivalence, nats a token; None for no such test.
    """
    pairs = differences(found)
    tests = {_key(each): each.value for each in differences(found, "test loss")}
    p, p_holm = _family(pairs, Interval.p_value)
    same, same_holm = _family(pairs, lambda value: None if margin is None else value.p_equivalent(margin))
    return [Comparison(each, tests[_key(each)], p[i], p_holm[i], margin, same[i], same_holm[i]) for i, each in enumerate(pairs)]


def _key(pair: Difference) -> tuple[object, ...]:
    return pair.ours.task, pair.ours.method, pair.other.method


def _family(pairs: list[Difference], test: Callable[[Interval], float | None]) -> tuple[list[float | None], list[float | None]]:
    """Return p-values and corrected ones; those that are not known do not count."""
    values = [None if pair.value is None else test(pair.value) for pair in pairs]
    corrected = iter(holm([value for value in values if value is not None]))
    return values, [None if value is None else next(corrected) for value in values]
