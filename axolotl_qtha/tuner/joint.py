"""What the operator from z to h is told beside tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..circuit.ansatz import Ansatz


@dataclass(frozen=True)
class Joint:
    """What the operator is told beside tensors."""

    ansatz: Ansatz | None  # of each circuit; None: a classical network, see `rings`
    bounded: bool = False  # z enters as pi * tanh(z / pi)
    product: bool = False  # h is the product of the two paths, not the sum
    gain: float = 1.0  # of W_C and W_Q
    ring: int = 0  # of a classical network: units of a ring
    activation: str = ""  # of a classical network: its nonlinearity

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The operator's arguments after the tensors."""
        circuit = (0, 0, "") if self.ansatz is None else (self.ansatz.qubits, self.ansatz.layers, self.ansatz.gate_order)
        return (*circuit, self.ring, self.activation, self.bounded, self.product, self.gain)


@lru_cache(maxsize=64)
def joint_of(
    qubits: int, layers: int, gate_order: Any, ring: int, activation: str, bounded: bool, product: bool, gain: float
) -> Joint:
    """Return what `arguments` was made of."""
    return Joint(Ansatz(qubits, layers, gate_order) if qubits else None, bounded, product, gain, ring, activation)
