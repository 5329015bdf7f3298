"""The circuit of QTHA, described once; every engine runs this description and is tested against its Qiskit form.

One layer of the authors' order of June 2025, on qubit i (the same inputs z are re-uploaded in each layer):

```
encode   ring                rotate   counter             rotate
RY(z_i)  CRZ(t0_i) i -> i+1  RY(t1_i) CRZ(t2_i) i -> i-1  RY(t3_i)      read out <Z_i>
```

Source: arXiv 2503.12790 (numbers of its equations are not known here) and the authors' public code of June 2025; Sim et al.
(arXiv 1905.10876), circuit 13 family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

Kind = Literal["encode", "rotate", "ring", "counter"]

GATE_ORDERS: dict[str, tuple[Kind, ...]] = {
    "2025-06": ("encode", "ring", "rotate", "counter", "rotate"),
    # The earlier order ends in a CRZ ring, which commutes with the Z read-out: those n angles never get a gradient.
    "2025-05": ("encode", "rotate", "ring", "rotate", "counter"),
}
MAX_QUBITS = 12


@dataclass(frozen=True)
class Moment:
    """Gates that act side by side on all qubits: `row` indexes the (rows, n) table of trainable angles."""

    kind: Kind
    row: int | None


@dataclass(frozen=True)
class Ansatz:
    """The circuit on `qubits` qubits with `layers` repetitions.

    Angles have shape (rows, qubits), in radians: `rows` is 4 * layers, or 2 * layers for one qubit, which has no
    neighbour to entangle with. In a ring, the angle of column i belongs to the gate controlled by qubit i.

    The engines run several such circuits side by side where angles and inputs have several times `qubits` columns: circuit b has
    columns b * qubits to (b + 1) * qubits - 1.
    """

    qubits: int
    layers: int
    gate_order: str = "2025-06"

    def __post_init__(self) -> None:
        if not 1 <= self.qubits <= MAX_QUBITS:
            raise ValueError(f"qubits={self.qubits} is not supported; use 1 to {MAX_QUBITS}.")
        if self.layers < 1:
            raise ValueError(f"layers={self.layers} is not supported; use 1 or more.")
        if self.gate_order not in GATE_ORDERS:
            raise ValueError(f"gate_order={self.gate_order!r} is unknown; use one of {sorted(GATE_ORDERS)}.")

    @property
    def rows(self) -> int:
        """Number of rows of trainable angles."""
        return sum(moment.row is not None for moment in self.moments())

    def moments(self) -> tuple[Moment, ...]:
        """Return the circuit as a sequence of moments, first to last."""
        moments: list[Moment] = []
        row = 0
        for _ in range(self.layers):
            for kind in GATE_ORDERS[self.gate_order]:
                if kind == "encode":
                    moments.append(Moment(kind, None))
                elif kind == "rotate" or self.qubits > 1:
                    moments.append(Moment(kind, row))
                    row += 1
        return tuple(moments)

    def pairs(self, kind: Kind) -> list[tuple[int, int]]:
        """Return (control, target) of each CRZ of a `ring` or `counter` moment, indexed by its control."""
        step = {"ring": 1, "counter": -1}[kind]
        return [(i, (i + step) % self.qubits) for i in range(self.qubits)]

    def circuit(self) -> QuantumCircuit:
        """Return the Qiskit circuit with parameter vectors `z` (n) and `theta` (rows * n, row-major).

        >>> circuit = Ansatz(qubits=2, layers=1).circuit()
        >>> circuit.num_parameters, dict(circuit.count_ops()) == {"ry": 6, "crz": 4}
        (10, True)
        """
        from qiskit.circuit import ParameterVector, QuantumCircuit

        n = self.qubits
        z, theta = ParameterVector("z", n), ParameterVector("theta", self.rows * n)
        circuit = QuantumCircuit(n)
        for moment in self.moments():
            if moment.row is None:
                for i in range(n):
                    circuit.ry(z[i], i)
                continue
            row = theta[moment.row * n : (moment.row + 1) * n]
            if moment.kind == "rotate":
                for i in range(n):
                    circuit.ry(row[i], i)
            else:
                for control, target in self.pairs(moment.kind):
                    circuit.crz(row[control], control, target)
        return circuit
