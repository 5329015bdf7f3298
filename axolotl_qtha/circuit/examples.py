"""Two circuits that are not built in, as a user would write them: `circuit: axolotl_qtha.circuit.examples:cz_ladder`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qiskit import QuantumCircuit


def cz_ladder(qubits: int, layers: int) -> QuantumCircuit:
    """Return RX encoding and RY rotations with a ladder of CZ between them; 2 * qubits * layers angles, Z on each qubit.

    Args:
        qubits: of the circuit, one for each number.
        layers: repetitions; the inputs z are uploaded in each.
    """
    from qiskit.circuit import ParameterVector, QuantumCircuit

    z, theta = ParameterVector("z", qubits), ParameterVector("theta", 2 * qubits * layers)
    circuit, angles = QuantumCircuit(qubits), iter(theta)
    for _ in range(layers):
        for i in range(qubits):
            circuit.rx(z[i], i)
            circuit.ry(next(angles), i)
        for i in range(qubits - 1):
            circuit.cz(i, i + 1)
        for i in range(qubits):
            circuit.rz(next(angles), i)
            circuit.rx(z[i], i)
    return circuit


def zz_observables(qubits: int, layers: int) -> dict[str, Any]:
    """Return RY encoding with trained RXX between neighbours, read out as Z Z of neighbouring qubits in a ring.

    Args:
        qubits: of the circuit, one for each number; at least 2.
        layers: repetitions, with 2 * qubits angles each.
    """
    from qiskit.circuit import ParameterVector, QuantumCircuit

    z, theta = ParameterVector("z", qubits), ParameterVector("theta", 2 * qubits * layers)
    circuit, angles = QuantumCircuit(qubits), iter(theta)
    for _ in range(layers):
        for i in range(qubits):
            circuit.ry(z[i], i)
        for i in range(qubits):
            circuit.rxx(next(angles), i, (i + 1) % qubits)
        for i in range(qubits):
            circuit.ry(next(angles), i)
    return {"circuit": circuit, "observables": [("ZZ", [i, (i + 1) % qubits]) for i in range(qubits)]}
