"""Which draw of shots a circuit is answered by: its key in the journal, and the seed of a simulated device's job."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


class Draws:
    """The keys of circuits that are measured in one way.

    Equal circuits of a call are different draws, the first, the second, and so on: they are measured as often as they are asked
    for. The same call again, as under gradient checkpointing, has the same keys, and so costs nothing.
    """

    def __init__(self, measured: dict[str, Any]) -> None:
        """Take what makes a result besides the angles, as values of JSON."""
        self._key = hashlib.blake2b(json.dumps(measured, sort_keys=True).encode(), digest_size=32).digest()

    def keys(self, points: np.ndarray, seen: Counter[bytes] | None = None) -> list[bytes]:
        """Return the key of each circuit.

        Args:
            points: gate angles (circuits, gates) in radians, float64.
            seen: how often each was asked for before, which is counted on; None: not at all. An evaluation hands one counter to
                all of its calls, so that no two of its circuits share a draw.
        """
        counts = Counter[bytes]() if seen is None else seen
        return [self._drawn(row, counts) for row in np.ascontiguousarray(points, dtype=np.float64)]

    def _drawn(self, row: np.ndarray, counts: Counter[bytes]) -> bytes:
        first = self._digest(row.tobytes())
        draw, counts[first] = counts[first], counts[first] + 1
        return first if draw == 0 else self._digest(first + draw.to_bytes(8, "big"))

    def _digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=16, key=self._key).digest()


def job_seed(seed: int, keys: Sequence[bytes]) -> int:
    """Return the seed of a simulated job of these circuits: positive, of 31 bits, the same for the same seed and circuits."""
    digest = hashlib.blake2b(b"".join(keys), digest_size=4, key=seed.to_bytes(8, "big")).digest()
    return max(1, int.from_bytes(digest, "big") >> 1)
