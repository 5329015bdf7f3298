"""Noise by other ways than our engine's: Aer run by hand, and a fake device's own simulation of itself.

Both run the same transpiled circuit. What is read wrongly is taken from the device's properties here, qubit by qubit, and applied
to the distribution of outcomes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from qiskit import ClassicalRegister, QuantumCircuit, transpile

from ..circuit.ansatz import Ansatz
from ..circuit.noise import FAKE, device, is_own, plain_basis
from ..circuit.observables import groups
from ..circuit.own_noise import basis, flips, own
from ..circuit.shifts import GateAngles
from ..circuit.simulation import Simulation

DEVICE_SHOTS = 100_000  # of each circuit on the fake device itself

Flips = list[tuple[float, float]]  # of each qubit, P(read 1 | prepared 0) and P(read 0 | prepared 1)


def by_hand(ansatz: Ansatz, simulation: Simulation, z: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Return the exact values of the observables, (tokens, n), of Aer's density matrix under the noise model, read out.

    Args:
        ansatz: the circuit.
        simulation: its noise model.
        z: inputs, (tokens, n), radians.
        angles: trained angles, (rows, columns), radians.
    """
    from qiskit_aer import AerSimulator

    gates, values = GateAngles(ansatz), np.empty(z.shape)
    for group in groups(gates.observables):
        circuit, qubits, model, errors = _noisy(group.turned(gates.circuit), simulation)
        simulator = AerSimulator(method="density_matrix", noise_model=model)
        for row, bound in zip(values, _bound(circuit, gates, z, angles), strict=True):
            bound.save_density_matrix(qubits)
            state = np.asarray(simulator.run(bound).result().data()["density_matrix"])
            table = _read_out(np.real(np.diag(state)), errors)
            for i in group.which:
                row[i] = _parity(table, gates.observables[i])
    return values


def by_device(ansatz: Ansatz, noise_model: str, z: np.ndarray, angles: np.ndarray, seed: int) -> np.ndarray:
    """Return the same of `DEVICE_SHOTS` shots by a fake device's own `run`; arguments as of `by_hand`."""
    gates, backend, values = GateAngles(ansatz), device(noise_model, ansatz.qubits), np.empty(z.shape)
    for group in groups(gates.observables):
        circuit, qubits = _placed(group.turned(gates.circuit), backend)
        circuits = _bound(circuit, gates, z, angles)
        for bound in circuits:
            bound.add_register(register := ClassicalRegister(ansatz.qubits, "read"))
            bound.measure(qubits, register)
        result = backend.run(circuits, shots=DEVICE_SHOTS, seed_simulator=1 + seed).result()
        for number, row in enumerate(values):
            table = np.zeros([2] * ansatz.qubits)
            for bits, count in result.get_counts(number).items():
                table[tuple(map(int, bits))] += count / DEVICE_SHOTS
            for i in group.which:
                row[i] = _parity(table, gates.observables[i])
    return values


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
    gates = plain_basis(circuit)
    model = NoiseModel(basis_gates=gates)
    if name == "depolarizing":
        model.add_all_qubit_quantum_error(depolarizing_error(strengths.one_qubit, 1), ["rx", "ry"])
        model.add_all_qubit_quantum_error(depolarizing_error(strengths.two_qubits, 2), ["cx"])
    compiled = transpile(circuit, basis_gates=gates, optimization_level=0)
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


def _read_out(probabilities: np.ndarray, errors: Flips) -> np.ndarray:
    """Return the distribution of what is read, (2, ..., 2), of that of the outcomes, (2**n); the last axis is qubit 0."""
    count = len(errors)
    table = probabilities.reshape([2] * count)
    for qubit, (up, down) in enumerate(errors):
        axis = count - 1 - qubit
        table = np.moveaxis(np.tensordot(np.array([[1 - up, down], [up, 1 - down]]), table, axes=(1, axis)), 0, axis)
    return table


def _parity(table: np.ndarray, label: str) -> float:
    """Return the mean of the product of the signs of the qubits that a Pauli label acts on; its last letter is qubit 0's."""
    signed = table
    for axis, letter in enumerate(label):
        shape = [2 if i == axis else 1 for i in range(table.ndim)]
        signed = signed * (np.array([1.0, 1.0 if letter == "I" else -1.0]).reshape(shape))
    return float(signed.sum())
