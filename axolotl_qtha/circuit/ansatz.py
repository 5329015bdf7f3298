"""The circuit of QTHA, described once; every engine runs this description and is tested against its Qiskit form.

A circuit of the user's own is an ansatz, too: see `own.py`, and `recognised.py` for those that the fast engines run.

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
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from .own import PREFIX, OwnCircuit, known, z_labels

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

    A circuit of the user's own takes and gives `width` numbers, whatever its qubits; its angles have shape (rows, circuits).

    Args:
        qubits: of the circuit.
        layers: how often the moments are repeated.
        gate_order: one of `GATE_ORDERS`, moments with spaces between them ("encode ring rotate"), or `OwnCircuit.gate_order`.
    """

    qubits: int
    layers: int
    gate_order: str = "2025-06"

    def __init_subclass__(cls, **_: Any) -> None:
        raise TypeError(
            f"{cls.__name__}: the engines run the moments of an Ansatz, and would not see a circuit() of its own. "
            "What works: `qtha: {circuit: 'my_package.my_module:my_circuit'}`, or `recognised.ansatz_of` of what it returns."
        )

    def __post_init__(self) -> None:
        if not 1 <= self.qubits <= MAX_QUBITS:
            raise ValueError(f"qubits={self.qubits} is not supported; use 1 to {MAX_QUBITS}.")
        if self.layers < 1:
            raise ValueError(f"layers={self.layers} is not supported; use 1 or more.")
        if self.gate_order not in GATE_ORDERS and not self.is_own and not set(self.gate_order.split()) <= set(get_args(Kind)):
            raise ValueError(f"gate_order={self.gate_order!r} is unknown; use one of {sorted(GATE_ORDERS)}.")

    @property
    def is_own(self) -> bool:
        """Whether it is a circuit of the user's own that has other gates, or other observables, than the built-in one."""
        return self.gate_order.startswith(PREFIX)

    @property
    def width(self) -> int:
        """How many numbers one circuit takes and gives."""
        return len(known(self.gate_order).inputs) if self.is_own else self.qubits

    def columns(self, width: int) -> int:
        """Return how many columns the angles have for z of this width, that of one circuit or several times as much."""
        return width // self.width if self.is_own else width

    @property
    def angle_shape(self) -> tuple[int, int]:
        """Shape of the angles of one circuit."""
        return self.rows, self.columns(self.width)

    @property
    def rows(self) -> int:
        """Number of rows of trainable angles."""
        if self.is_own:
            return len(known(self.gate_order).trained)
        return sum(moment.row is not None for moment in self.moments())

    def moments(self) -> tuple[Moment, ...]:
        """Return the built-in circuit as a sequence of moments, first to last."""
        assert not self.is_own
        moments: list[Moment] = []
        row = 0
        order = GATE_ORDERS.get(self.gate_order) or cast("list[Kind]", self.gate_order.split())
        for _ in range(self.layers):
            for kind in order:
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
        """Return the Qiskit circuit; the built-in one has parameter vectors `z` (n) and `theta` (rows * n, row-major).

        >>> circuit = Ansatz(qubits=2, layers=1).circuit()
        >>> circuit.num_parameters, dict(circuit.count_ops()) == {"ry": 6, "crz": 4}
        (10, True)
        """
        return self.described().circuit

    def described(self) -> OwnCircuit:
        """Return the Qiskit circuit, its inputs and trained parameters in the order of z and the angles, and its observables."""
        from qiskit.circuit import ParameterVector, QuantumCircuit

        if self.is_own:
            return known(self.gate_order)
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
        return OwnCircuit(circuit, tuple(z), tuple(theta), z_labels(n))

    def bound(self, z: Any, angles: Any) -> QuantumCircuit:
        """Return the Qiskit circuit with numbers in the place of its parameters.

        Args:
            z: encoded inputs in radians, (n), an array or tensor; None: they stay parameters.
            angles: trained angles in radians, (rows, n), an array or tensor; of a circuit of the user's own (rows, 1).

        Raises:
            ValueError: if a shape does not fit, or a number is NaN or infinite.

        >>> Ansatz(qubits=2, layers=1).bound([0.1, 0.2], [[0.0] * 2] * 4).num_parameters
        0
        """
        import torch

        described, n = self.described(), self.width
        given: list[tuple[Any, ...]] = [("angles", angles, self.angle_shape, described.trained)]
        given += [] if z is None else [("z", z, (n,), described.inputs)]
        found: dict[Any, float] = {}
        for name, numbers, shape, parameters in given:
            values = torch.as_tensor(numbers, dtype=torch.float64, device="cpu").detach()
            if tuple(values.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(values.shape)}. What works: {shape} for a circuit of {self.qubits} qubits."
                )
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} holds NaN or infinite values. What works: the last good checkpoint.")
            found |= dict(zip(parameters, values.flatten().tolist(), strict=True))
        return described.circuit.assign_parameters(found)
