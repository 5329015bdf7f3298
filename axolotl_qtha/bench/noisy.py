"""Noise by other ways than our engine's: Aer run by hand, and a fake device's own simulation of itself.

Both run the same transpiled circuit. What is read wrongly is taken from the device's properties here, qubit by qubit, and applied
to the distribution of outcomes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from qiskit import ClassicalRegister, QuantumCircuit, transpile

from ..circuit.ansatz import Ansatz
from ..circuit.noise import BASIS, FAKE, device, is_own
from ..circuit.own_noise import basis, flips, own
from ..circuit.shifts import GateAngles
from ..circuit.simulation import Simulation

DEVICE_SHOTS = 100_000  # of each circuit on the fake device itself

Flips = list[tuple[float, float]]  # of each qubit, P(read 1 | prepared 0) and P(read 0 | prepared 1)


def by_hand(ansatz: Ansatz, simulation: Simulation, z: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Return the exact <Z_i>, (tokens, n), of Aer's density matrix under the noise model, read out with its errors.

    Args:
        ansatz: the circuit.
        simulation: its noise model.
        z: inputs, (tokens, n), radians.
        angles: trained angles, (rows, n), radians.
    """
    from qiskit_aer import AerSimulator

    gates = GateAngles(ansatz)
    circuit, qubits, model, errors = _noisy(gates.circuit, simulation)
    simulator = AerSimulator(method="density_matrix", noise_model=model)
    values = []
    for bound in _bound(circuit, gates, z, angles):
        bound.save_density_matrix(qubits)
        state = simulator.run(bound).result().data()["density_matrix"]
        values.append(_read(np.real(np.diag(np.asarray(state))), errors))
    return np.array(values)


def by_device(ansatz: Ansatz, noise_model: str, z: np.ndarray, angles: np.ndarray, seed: int) -> np.ndarray:
    """Return <Z_i>, (tokens, n), of `DEVICE_SHOTS` shots by a fake device's own `run`; arguments as of `by_hand`."""
    gates, backend = GateAngles(ansatz), device(noise_model, ansatz.qubits)
    circuit, qubits = _placed(gates.circuit, backend)
    circuits = _bound(circuit, gates, z, angles)
    for bound in circuits:
        bound.add_register(register := ClassicalRegister(ansatz.qubits, "read"))
        bound.measure(qubits, register)
    result = backend.run(circuits, shots=DEVICE_SHOTS, seed_simulator=1 + seed).result()
    values = np.zeros((len(circuits), ansatz.qubits))
    for row, bound in zip(values, circuits, strict=True):
        for bits, count in result.get_counts(bound).items():
            row += count * (1 - 2 * np.array([int(bit) for bit in reversed(bits)]))
    return values / DEVICE_SHOTS


def _placed(circuit: QuantumCircuit, backend: Any) -> tuple[QuantumCircuit, list[int]]:
    placed = transpile(circuit, backend, optimization_level=3, seed_transpiler=0)  # as the engine does
    return placed, placed.layout.final_index_layout()


def _bound(circuit: QuantumCircuit, gates: GateAngles, z: np.ndarray, angles: np.ndarray) -> list[QuantumCircuit]:
    """Return a circuit for each token."""
    bound = []
    for point in gates.points(z, angles):
        values = dict(zip(gates.angles, point, strict=True))
        bound.append(circuit.assign_parameters({angle: values[angle] for angle in circuit.parameters}))
    return bound


def _noisy(circuit: QuantumCircuit, simulation: Simulation) -> tuple[QuantumCircuit, list[int], Any, Flips]:
    """Return a circuit in the gates of a noise model, where its qubits are, the noise of its gates, and its read-out errors."""
    from qiskit_aer.noise import NoiseModel, depolarizing_error

    name, strengths, count = simulation.noise_model, simulation.strengths, circuit.num_qubits
    found = own(name) if is_own(name) else device(name, count) if name.startswith(FAKE) else None
    if found is not None and not isinstance(found, NoiseModel):
        placed, qubits = _placed(circuit, found)
        return placed, qubits, NoiseModel.from_backend(found, readout_error=False), [_measured(found, qubit) for qubit in qubits]
    if found is not None:
        errors = flips(name, found)
        compiled = transpile(circuit, basis_gates=basis(name, found), optimization_level=0)
        return compiled, list(range(count)), found, [errors.get(i, errors.get(None, (0.0, 0.0))) for i in range(count)]
    model = NoiseModel(basis_gates=BASIS)
    if name == "depolarizing":
        model.add_all_qubit_quantum_error(depolarizing_error(strengths.one_qubit, 1), ["ry"])
        model.add_all_qubit_quantum_error(depolarizing_error(strengths.two_qubits, 2), ["cx"])
    compiled = transpile(circuit, basis_gates=BASIS, optimization_level=0)
    return compiled, list(range(count)), model, [(0.0, 0.0) if name == "none" else strengths.readout] * count


def _measured(backend: Any, qubit: int) -> tuple[float, float]:
    """Return how often a device reads a qubit wrongly: by its properties, else the one number of its target."""
    properties = getattr(backend, "properties", None)
    known = properties() if callable(properties) else None
    if known is None:
        entry = backend.target["measure"].get((qubit,))
        mean = (entry.error if entry else None) or 0.0
        return mean, mean
    values = known.qubit_property(qubit)
    mean = values.get("readout_error", (0.0, None))
    up, down = (values.get(key, mean)[0] for key in ("prob_meas1_prep0", "prob_meas0_prep1"))
    return up, down


def _read(probabilities: np.ndarray, errors: Flips) -> np.ndarray:
    """Return <Z_i> as read out, of the distribution of outcomes (2**n), in which qubit 0 is the lowest bit."""
    count = len(errors)
    table = probabilities.reshape([2] * count)  # the last axis is qubit 0
    for qubit, (up, down) in enumerate(errors):
        axis = count - 1 - qubit
        table = np.moveaxis(np.tensordot(np.array([[1 - up, down], [up, 1 - down]]), table, axes=(1, axis)), 0, axis)
    values = []
    for qubit in range(count):
        zero, one = np.moveaxis(table, count - 1 - qubit, 0).reshape(2, -1).sum(axis=1)
        values.append(zero - one)
    return np.array(values)
