"""How far the device was from the exact simulator, call by call. Without Qiskit: trainings that have no device read it, too."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """How far the device was from the exact simulator in one call, over its tokens and qubits."""

    tokens: int
    mean: float  # of <Z> on the device less the exact <Z>
    variance: float
    standard_error: float  # root mean square of the standard errors that the device states


class Calls:
    """Whether circuits go to the device, and how far it was off in each call, for the log.

    A call that is repeated, as for checkpointing, is answered by the journal and counted once.
    """

    MOST = 100_000  # differences kept where nobody takes them

    def __init__(self) -> None:
        self.on_device = True  # False: the exact simulator runs all circuits, and nothing is submitted
        self.waiting = False  # whether a training is in a step that the device takes part in, which may last for hours
        self._differences: dict[bytes, Difference] = {}  # by the circuits' angles

    def record(self, points: np.ndarray, difference: Difference) -> None:
        """Keep how far the device was off on circuits with these gate angles."""
        if len(self._differences) >= self.MOST:
            del self._differences[next(iter(self._differences))]
        self._differences[hashlib.blake2b(points.tobytes(), digest_size=16).digest()] = difference

    def take(self) -> list[Difference]:
        """Return what was recorded since the last time."""
        taken = list(self._differences.values())
        self._differences.clear()
        return taken


CALLS = Calls()  # one for the process, like the journal and the cap; autograd's threads and the trainer's callback use it


def pool(parts: Sequence[Difference]) -> Difference:
    """Return the difference of several calls as if they had been one.

    Raises:
        ValueError: for none at all.
    """
    if not parts:
        raise ValueError("no calls to pool")
    tokens, means, variances, errors = np.array([astuple(part) for part in parts]).T
    share = tokens / tokens.sum()
    mean = share @ means
    variance = share @ (variances + (means - mean) ** 2)
    return Difference(int(tokens.sum()), float(mean), float(variance), float(np.sqrt(share @ errors**2)))
