"""From z to h in one operator: what `bottleneck.py` draws."""

from __future__ import annotations

from dataclasses import dataclass

from ..circuit.ansatz import Ansatz


@dataclass(frozen=True)
class Joint:
    """What lies between the two matrices of an adapter, but for its tensors."""

    ansatz: Ansatz  # of each circuit
    bounded: bool = False  # z enters as pi * tanh(z / pi)
    product: bool = False  # h is the product of the two paths, not the sum
    gain: float = 1.0  # of both matrices
