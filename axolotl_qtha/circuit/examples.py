"""Circuits that are not built in, as a user would write them: `circuit: axolotl_qtha.circuit.examples:cz_ladder`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .ansatz import Ansatz

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

BASE = 3  # of the scales: sums of 1, 3, 9, ..., each with either sign or left out, are all whole numbers, each once
MOST_LAYERS = 8  # float32 has z times 3**7 to some 1e-4 radians


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


def reuploading(qubits: int, layers: int) -> QuantumCircuit:
    """Return the built-in circuit with RY(3**l z_i) as the encoding of layer l = 0, 1, ...: frequencies to (3**layers - 1) / 2.

    What is read out is a Fourier series in z_i, whose frequencies are sums of the scales: with the same scale in all layers there
    are `layers` of them, with these exponentially many (Schuld, Sweke, Meyer, arXiv 2008.08605; Shin, Teo, Jeong, arXiv
    2206.12105).

    Args:
        qubits: of the circuit, one for each number. On one alone all rotations add up, so that it has the highest frequency only.
        layers: repetitions, at most 8.

    Raises:
        ValueError: if there are more layers.
    """
    from qiskit.circuit import ParameterVector, QuantumCircuit

    if layers > MOST_LAYERS:
        why = f"float32 has no digits left for z times {BASE}**{layers - 1}"
        raise ValueError(f"{why}. What works: up to `circuit_layers: {MOST_LAYERS}`")
    z, layer = ParameterVector("z", qubits), Ansatz(qubits, 1)
    circuit, theta = QuantumCircuit(qubits), ParameterVector("theta", layer.rows * qubits * layers)
    angles = iter(theta)
    for scale in (BASE**each for each in range(layers)):
        for moment in layer.moments():
            for i in range(qubits):
                if moment.row is None:
                    circuit.ry(z[i] if scale == 1 else scale * z[i], i)
                elif moment.kind == "rotate":
                    circuit.ry(next(angles), i)
                else:
                    circuit.crz(next(angles), *layer.pairs(moment.kind)[i])
    return circuit
