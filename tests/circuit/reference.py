"""What Qiskit says of the circuit: the reference for every engine, sharing nothing with them but `Ansatz.circuit()`."""

import math

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.quantum_info import Statevector

# f'(0) from shifts of pi/2 and 3 pi/2, exact for f with the frequencies of the gate: the gaps between its generator's
# eigenvalues. RY: +-1/2, so 1 alone. CRZ: 0, +-1/2, so 1/2 and 1. Column w of the system is the rule applied to sin(w x).
SHIFTS = (math.pi / 2, 3 * math.pi / 2)
TWO_TERMS = (0.5, 0.0)
FOUR_TERMS = tuple(np.linalg.solve([[2 * math.sin(w * shift) for shift in SHIFTS] for w in (0.5, 1.0)], [0.5, 1.0]))


def angles_and_inputs(ansatz, tokens, seed=0, blocks=1):
    """Return z (tokens, B n) and theta (rows, B n) in float64, spread over more than a turn, for B circuits side by side."""
    random, width = np.random.default_rng(seed), blocks * ansatz.qubits
    return random.uniform(-4, 4, (tokens, width)), random.uniform(-4, 4, (ansatz.rows, width))


def values(circuit, z, theta):
    """Return the value of every parameter, looked up by the name of its vector and its index in it."""
    flat = {"z": z, "theta": theta.reshape(-1)}
    return {parameter: flat[parameter.vector.name][parameter.index] for parameter in circuit.parameters}


def z_expectations(circuit):
    """Return <Z_i> of every qubit of a circuit without free parameters. Qiskit's qubit 0 is the last axis."""
    n = circuit.num_qubits
    probabilities = Statevector(circuit).probabilities().reshape((2,) * n)
    marginals = [probabilities.sum(axis=tuple(k for k in range(n) if k != n - 1 - i)) for i in range(n)]
    return np.array([marginal[0] - marginal[1] for marginal in marginals])


def expectations(ansatz, z, theta):
    """Return <Z> (tokens, B n)."""
    circuit = ansatz.circuit()
    return np.concatenate(
        [
            np.stack([z_expectations(circuit.assign_parameters(values(circuit, row, theta[:, own]))) for row in z[:, own]])
            for own in columns(ansatz, z)
        ],
        axis=1,
    )


def columns(ansatz, z):
    """Return the columns of each circuit."""
    return [slice(first, first + ansatz.qubits) for first in range(0, z.shape[1], ansatz.qubits)]


def shift_gradients_side_by_side(ansatz, z, theta, grad):
    """Return d sum(grad * <Z>) / dz (tokens, B n) and / dtheta (rows, B n)."""
    by_z, by_theta = np.zeros(z.shape), np.zeros(theta.shape)
    for own in columns(ansatz, z):
        for token in range(len(z)):
            of_z, of_theta = shift_gradients(ansatz, z[token, own], theta[:, own], grad[token, own])
            by_z[token, own] = of_z
            by_theta[:, own] += of_theta
    return by_z, by_theta


def shift_gradients(ansatz, z, theta, grad):
    """Return d sum(grad * <Z>) / dz (n) and / dtheta (rows, n) of one token, by parameter shift of each gate by itself.

    A parameter in several gates (z is uploaded again in every layer) gets the sum over its gates.
    """
    shared = ansatz.circuit()
    own = ParameterVector("gate", len(shared.data))
    separate = QuantumCircuit(ansatz.qubits)
    for k, gate in enumerate(shared.data):
        separate.append(type(gate.operation)(own[k]), gate.qubits)
    value = values(shared, z, theta)
    point = np.array([value[gate.operation.params[0]] for gate in shared.data])

    def cost(shifted):
        return grad @ z_expectations(separate.assign_parameters({own: shifted}))

    sums = {"z": np.zeros(z.size), "theta": np.zeros(theta.size)}
    for k, gate in enumerate(shared.data):
        step = np.eye(len(point))[k]
        terms = {"ry": TWO_TERMS, "crz": FOUR_TERMS}[gate.name]
        derivative = sum(c * (cost(point + s * step) - cost(point - s * step)) for c, s in zip(terms, SHIFTS, strict=True) if c)
        parameter = gate.operation.params[0]
        sums[parameter.vector.name][parameter.index] += derivative
    return sums["z"], sums["theta"].reshape(theta.shape)
