"""Gradients from circuits alone: simultaneous perturbation, on exact values. Parameter shift is tested with Aer."""

import itertools

import numpy as np
import pytest
from qiskit.quantum_info import Pauli, Statevector

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.shifts import GateAngles, Slopes

from .reference import angles_and_inputs, shift_gradients


def exact(ansatz):
    """Return the exact <Z> of circuits with these gate angles, from Qiskit's state vector."""
    gates = GateAngles(ansatz)

    def run(points):
        states = [Statevector(gates.circuit.assign_parameters(dict(zip(gates.angles, row, strict=True)))) for row in points]
        z = [Pauli("I" * (ansatz.qubits - 1 - i) + "Z" + "I" * i) for i in range(ansatz.qubits)]
        return np.array([[state.expectation_value(operator).real for operator in z] for state in states])

    return run


@pytest.mark.parametrize(("step", "bias"), [(0.01, 1e-3), (0.1, 0.1)])
def test_spsa_averaged_over_all_directions_is_the_gradient(monkeypatch, step, bias):
    """With one qubit and layer there are 8 directions: their mean is the expectation itself, with no statistics."""
    ansatz = Ansatz(1, 1)
    z, theta = angles_and_inputs(ansatz, tokens=1)
    grad = np.array([[0.7]])
    expected = shift_gradients(ansatz, z[0], theta, grad[0])
    every = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    assert len(GateAngles(ansatz).kinds) == 3

    class Every:
        choice = staticmethod(lambda values, shape: every.reshape(shape))

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Every)
    by_z, by_theta = Slopes(GateAngles(ansatz), exact(ansatz), grad, z, theta).by_spsa(8, 0, step)
    scale = max(np.abs(expected[0]).max(), np.abs(expected[1]).max())
    assert np.abs(by_z - expected[0]).max() < bias * scale
    assert np.abs(by_theta - expected[1]).max() < bias * scale


@pytest.mark.slow
def test_spsa_is_unbiased_over_many_draws():
    ansatz = Ansatz(2, 1)
    z, theta = angles_and_inputs(ansatz, tokens=2)
    grad = np.random.default_rng(1).normal(size=z.shape)
    shifted = [shift_gradients(ansatz, row, theta, weight) for row, weight in zip(z, grad, strict=True)]
    expected = np.concatenate([np.stack([by_z for by_z, _ in shifted]).ravel(), sum(by_theta for _, by_theta in shifted).ravel()])
    gates, run = GateAngles(ansatz), exact(ansatz)

    def draw(seed, draws=1):
        return np.concatenate([g.ravel() for g in Slopes(gates, run, grad, z, theta).by_spsa(draws, seed, 1e-3)])

    draws = np.array([draw(seed) for seed in range(150)])
    mean, error = draws.mean(axis=0), draws.std(axis=0) / np.sqrt(len(draws))
    assert np.abs(mean - expected).max() <= 5 * error.max()
    assert (np.abs(mean - expected) <= 5 * error + 1e-6).all()
    assert error.max() < 0.3 * np.abs(expected).max()  # or nothing could fail
    several = np.array([draw(seed, 8) for seed in range(40)])
    assert several.std(axis=0).mean() == pytest.approx(draws.std(axis=0).mean() / np.sqrt(8), rel=0.3)


def test_spsa_moves_wanted_angles_only_and_repeats_itself():
    ansatz = Ansatz(2, 1)
    z, theta = angles_and_inputs(ansatz, tokens=3)
    gates, asked = GateAngles(ansatz), []

    def run(points):
        asked.append(points)
        return np.ones((len(points), 2))

    for seed in (0, 0, 1):
        _, by_theta = Slopes(gates, run, np.ones_like(z), z, theta, (True, False)).by_spsa(2, seed)
        assert not by_theta.any()
    assert asked[0].shape == (3 * 2 * 2, len(gates.kinds))
    assert np.array_equal(asked[0][:, ~gates.map.from_z], np.repeat(gates.points(z, theta), 4, axis=0)[:, ~gates.map.from_z])
    assert np.allclose(np.abs(asked[0] - np.repeat(gates.points(z, theta), 4, axis=0))[:, gates.map.from_z], 0.1)
    assert np.array_equal(asked[0], asked[1])
    assert not np.array_equal(asked[0], asked[2])
