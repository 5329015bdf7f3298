"""The circuit in a device's gates: its observables and PUBs, against Qiskit and the exact engine; SPSA on exact values."""

import itertools

import numpy as np
import pytest
from qiskit.providers.fake_provider import GenericBackendV2
from qiskit.quantum_info import Statevector
from qiskit_aer import AerSimulator
from qiskit_ibm_runtime import EstimatorV2
from qiskit_ibm_runtime.fake_provider import FakeManilaV2

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.shifts import GateAngles
from axolotl_qtha.ibm.circuits import ISACircuit, estimator_options, spsa
from axolotl_qtha.ibm.options import IBMOptions

from ..circuit.reference import angles_and_inputs, expectations, shift_gradients

LINE = GenericBackendV2(4, coupling_map=[(0, 1), (1, 2), (2, 3)], noise_info=False, seed=0)


@pytest.mark.parametrize("backend", [LINE, AerSimulator(), FakeManilaV2()], ids=["line", "aer", "manila"])
@pytest.mark.parametrize(("qubits", "layers"), [(1, 1), (2, 2), (3, 1)])
def test_the_pub_is_the_circuit_whatever_the_layout(backend, qubits, layers):
    ansatz = Ansatz(qubits, layers)
    z, theta = angles_and_inputs(ansatz, tokens=2)
    isa = ISACircuit(ansatz, backend)
    circuit, observables, values = isa.pub(isa.gates.points(z, theta))
    assert values.shape == (2, 1, len(isa.gates.kinds))
    assert (len(observables), len(observables[0])) == (1, qubits)
    if not isinstance(backend, AerSimulator):  # whose instructions are on any qubits
        for gate in circuit.data:
            where = tuple(circuit.find_bit(qubit).index for qubit in gate.qubits)
            assert backend.target.instruction_supported(gate.name, where)
    states = [Statevector(circuit.assign_parameters(row[0])) for row in values]
    result = [[state.expectation_value(operator).real for operator in observables[0]] for state in states]
    assert np.abs(np.array(result) - expectations(ansatz, z, theta)).max() < 1e-10


def test_a_circuit_is_recognised_in_another_process():
    ansatz = Ansatz(2, 1)
    assert ISACircuit(ansatz, LINE).digest == ISACircuit(ansatz, LINE).digest
    others = {ISACircuit(other, LINE).digest for other in (ansatz, Ansatz(2, 2), Ansatz(3, 1), Ansatz(2, 1, "2025-05"))}
    assert len(others) == 4


@pytest.mark.parametrize("shots", [1, 100, 5000])
def test_the_runtime_takes_every_combination_of_options(shots):
    for level, decoupling, twirling in itertools.product((0, 1, 2), ("none", "XX", "XpXm", "XY4"), (False, True)):
        block = IBMOptions(
            backend="fake:manila", shots=shots, resilience_level=level, dynamical_decoupling=decoupling, twirling=twirling
        )
        options = EstimatorV2(mode=LINE, options=estimator_options(block, "tag", 30)).options
        assert (options.default_shots, options.resilience_level, options.max_execution_time) == (shots, level, 30)
        assert options.environment.job_tags == ["tag"]
        assert (options.twirling.enable_gates is True) == (options.twirling.enable_measure is True) == twirling
        assert (options.dynamical_decoupling.enable is True) == (decoupling != "none")
        assert decoupling in ("none", options.dynamical_decoupling.sequence_type)
    precise = EstimatorV2(mode=LINE, options=estimator_options(IBMOptions(backend="fake:manila", precision=0.02), "tag", None))
    assert precise.options.default_precision == 0.02


def exact(ansatz):
    """Return the exact <Z> of circuits with these gate angles, from Qiskit's state vector."""
    isa = ISACircuit(ansatz, LINE)

    def run(points):
        circuit, observables, values = isa.pub(points)
        states = [Statevector(circuit.assign_parameters(row[0])) for row in values]
        return np.array([[state.expectation_value(operator).real for operator in observables[0]] for state in states])

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
    by_z, by_theta = spsa(GateAngles(ansatz), exact(ansatz), grad, z, theta, (True, True), 8, 0, step)
    scale = max(np.abs(expected[0]).max(), np.abs(expected[1]).max())
    assert np.abs(by_z - expected[0]).max() < bias * scale
    assert np.abs(by_theta - expected[1]).max() < bias * scale


def test_spsa_is_unbiased_over_many_draws():
    ansatz = Ansatz(2, 1)
    z, theta = angles_and_inputs(ansatz, tokens=2)
    grad = np.random.default_rng(1).normal(size=z.shape)
    shifted = [shift_gradients(ansatz, row, theta, weight) for row, weight in zip(z, grad, strict=True)]
    expected = np.concatenate([np.stack([by_z for by_z, _ in shifted]).ravel(), sum(by_theta for _, by_theta in shifted).ravel()])
    gates, run = GateAngles(ansatz), exact(ansatz)

    def draw(seed, draws=1):
        return np.concatenate([g.ravel() for g in spsa(gates, run, grad, z, theta, (True, True), draws, seed, 1e-3)])

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
        _, by_theta = spsa(gates, run, np.ones_like(z), z, theta, (True, False), 2, seed)
        assert not by_theta.any()
    assert asked[0].shape == (3 * 2 * 2, len(gates.kinds))
    assert np.array_equal(asked[0][:, ~gates.from_z], np.repeat(gates.points(z, theta), 4, axis=0)[:, ~gates.from_z])
    assert np.allclose(np.abs(asked[0] - np.repeat(gates.points(z, theta), 4, axis=0))[:, gates.from_z], 0.1)
    assert np.array_equal(asked[0], asked[1])
    assert not np.array_equal(asked[0], asked[2])
