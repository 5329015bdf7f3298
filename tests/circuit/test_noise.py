"""Noise on Aer: against density matrices, against Aer's own simulator of a device, and gradients by finite differences."""

import sys

import numpy as np
import pytest
import torch
from qiskit import ClassicalRegister, QuantumCircuit, transpile
from qiskit.quantum_info import DensityMatrix, Pauli, pauli_basis
from qiskit_ibm_runtime.fake_provider import FakeManilaV2

from axolotl_qtha.circuit import aer, noise
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.shifts import GateAngles
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.tuner.backends import expectation_values

from .reference import angles_and_inputs, values

NOISES = ["depolarizing", "fake:manila"]


def run(ansatz, z, theta, noise_model, shots=None, seed=0):
    engine = aer.Engine(ansatz, Simulation("aer", shots, seed, noise_model), None)
    return engine.expectations(engine.gates.points(z, theta))


def depolarise(state, probability, qubits):
    """(1 - p) rho + p (the average of P rho P over all Paulis P on the qubits), which is p times the maximally mixed state."""
    paulis = pauli_basis(len(qubits))
    mixed = sum(state.evolve(pauli, qubits).data for pauli in paulis) / len(paulis)
    return DensityMatrix((1 - probability) * state.data + probability * mixed)


@pytest.mark.parametrize(("qubits", "layers"), [(1, 1), (2, 1), (3, 1)])
def test_depolarizing_is_what_it_says(qubits, layers):
    ansatz = Ansatz(qubits, layers)
    z, theta = angles_and_inputs(ansatz, tokens=1)
    circuit = ansatz.circuit()
    circuit = transpile(
        circuit.assign_parameters(values(circuit, z[0], theta)), basis_gates=["ry", "rz", "cx"], optimization_level=0
    )
    state = DensityMatrix.from_label("0" * qubits)
    for gate in circuit.data:
        where = [circuit.find_bit(qubit).index for qubit in gate.qubits]
        state = state.evolve(gate.operation, where)
        probability = {"ry": 0.001, "cx": 0.01, "rz": 0.0}[gate.operation.name]
        if probability:
            state = depolarise(state, probability, where)
    expected = [state.expectation_value(Pauli("I" * (qubits - 1 - i) + "Z" + "I" * i)).real for i in range(qubits)]
    assert np.abs(run(ansatz, z, theta, "depolarizing")[0] - expected).max() <= 1e-12  # double precision, tens of gates
    assert np.abs(run(ansatz, z, theta, "none")[0] - expected).max() > 1e-4  # and that is not nothing


@pytest.mark.slow
def test_a_device_is_simulated_as_it_does_itself():
    """Our part of the noise model and read-out, against the fake device's own simulation with bound angles and shots."""
    ansatz, shots = Ansatz(3, 1), 100_000
    z, theta = angles_and_inputs(ansatz, tokens=3)
    exact = run(ansatz, z, theta, "fake:manila")
    backend = FakeManilaV2()
    circuit = ansatz.circuit()
    for row, mine in zip(z, exact, strict=True):
        bound = transpile(circuit, backend, optimization_level=3, seed_transpiler=0).assign_parameters(
            values(circuit, row, theta)
        )
        bound.add_register(ClassicalRegister(3))
        bound.measure(bound.layout.final_index_layout(), range(3))
        counts = backend.run(bound, shots=shots, seed_simulator=1).result().get_counts()
        signs = {bits: 1 - 2 * np.array([int(bit) for bit in reversed(bits)]) for bits in counts}
        sampled = sum(count * signs[bits] for bits, count in counts.items()) / shots
        assert (np.abs(sampled - mine) <= 5 * np.sqrt((1 - mine**2) / shots)).all()


def flips(properties, qubit):
    """P(read 1 | prepared 0) and P(read 0 | prepared 1) of a device's qubit, as its last calibration measured them."""
    return (properties.qubit_property(qubit, name)[0] for name in ("prob_meas1_prep0", "prob_meas0_prep1"))


def test_readout_errs_as_the_device_measured_it_not_by_the_mean():
    """Without gates <Z> is 1, read out as 1 - 2 P(1|0). The target of a device has the mean of the two flips alone."""
    backend = FakeManilaV2()
    compiled = noise.compile_for(QuantumCircuit(3), backend)
    slope, offset = compiled.confusion.T
    for qubit, read_0, read_1 in zip(compiled.qubits, slope + offset, offset - slope, strict=True):
        up, down = flips(backend.properties(), qubit)
        assert (read_0, read_1) == pytest.approx((1 - 2 * up, 2 * down - 1), abs=1e-12)
        assert abs(up - down) > 0.005, "or the mean would do"


def test_without_angles_a_fake_device_reads_what_aer_has_for_it():
    """Two qubits, one layer, all angles zero: the fake device's own sampler, 200,000 shots, within 5 standard errors."""
    ansatz, shots, backend = Ansatz(2, 1), 200_000, FakeManilaV2()
    z, theta = np.zeros((1, 2)), np.zeros((ansatz.rows, 2))
    (mine,) = run(ansatz, z, theta, "fake:manila")
    gates = GateAngles(ansatz)
    compiled = noise.compile_for(gates.circuit, backend)
    measured = compiled.circuit.assign_parameters(dict.fromkeys(compiled.circuit.parameters, 0.0))
    measured.add_register(ClassicalRegister(2))
    measured.measure(compiled.qubits, range(2))
    counts = backend.run(measured, shots=shots, seed_simulator=7).result().get_counts()
    sampled = sum(count * (1 - 2 * np.array([int(bit) for bit in reversed(bits)])) for bits, count in counts.items()) / shots
    assert (np.abs(sampled - mine) <= 5 * np.sqrt((1 - mine**2) / shots)).all()
    (with_shots,) = run(ansatz, z, theta, "fake:manila", shots=shots)
    assert (np.abs(with_shots - mine) <= 5 * np.sqrt((1 - mine**2) / shots)).all()


@pytest.mark.parametrize("noise_model", NOISES)
@pytest.mark.parametrize("shots", [5, 400], ids=["one state vector a shot", "density matrix"])
def test_noisy_shots_are_within_five_standard_errors(noise_model, shots):
    ansatz = Ansatz(3, 1)
    z, theta = angles_and_inputs(ansatz, tokens=100)
    exact = run(ansatz, z, theta, noise_model)
    scores = (run(ansatz, z, theta, noise_model, shots) - exact) / np.sqrt((1 - exact**2) / shots)
    assert np.abs(scores).max() <= 5
    assert scores.std() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("noise_model", NOISES)
def test_parameter_shift_is_exact_under_noise(noise_model):
    ansatz = Ansatz(2, 2)
    z, theta = angles_and_inputs(ansatz, tokens=2)
    grad = np.random.default_rng(1).normal(size=z.shape)
    engine = aer.Engine(ansatz, Simulation("aer", noise_model=noise_model), None)
    by_z, by_theta = engine.gradients(grad, z, theta)
    point, step = np.concatenate([z.ravel(), theta.ravel()]), 1e-4

    def cost(point):
        inputs, angles = point[: z.size].reshape(z.shape), point[z.size :].reshape(theta.shape)
        return (grad * engine.expectations(engine.gates.points(inputs, angles))).sum()

    for k, slope in enumerate(np.concatenate([by_z.ravel(), by_theta.ravel()])):
        shift = step * np.eye(point.size)[k]
        # central differences: truncation of step^2 / 6 times a third derivative of size 1, about 2e-9
        assert (cost(point + shift) - cost(point - shift)) / (2 * step) == pytest.approx(slope, abs=1e-7)


@pytest.mark.slow
def test_only_the_noise_of_the_qubits_used_is_translated():
    compiled = noise.compile_circuit(Ansatz(2, 1).circuit(), "fake:torino")  # 133 qubits
    assert len(compiled.noise.noise_qubits) == compiled.width == 2
    assert (compiled.confusion[:, 0] < 1).all()


def test_an_adjoint_gradient_leaves_the_noise_out():
    ansatz = Ansatz(2, 1)
    z, theta = (torch.tensor(array, requires_grad=True) for array in angles_and_inputs(ansatz, tokens=3))
    noisy = {
        gradient: torch.autograd.grad(
            expectation_values(z, theta, ansatz, Simulation("aer", noise_model="fake:manila", gradient=gradient)).sum(),
            (z, theta),
        )
        for gradient in ("parameter_shift", "adjoint")
    }
    clean = torch.autograd.grad(expectation_values(z, theta, ansatz).sum(), (z, theta))
    assert all(torch.equal(a, b) for a, b in zip(noisy["adjoint"], clean, strict=True))
    assert (noisy["parameter_shift"][1] - clean[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "qubits", "words"),
    [
        ("depolarising", 2, "'depolarising' is unknown. What works: `none`, `depolarizing`, `readout`, `fake:`"),
        ("manila", 2, "'manila' is unknown"),
        ("fake:manilla", 2, "names no device. What works: `fake:manila`"),
        ("fake:", 2, "names no device"),
        ("fake:manila", 6, "has 5 qubits, the circuit 6. What works: `qubits:` a divisor of the rank up to 5, or a larger"),
    ],
)
def test_bad_names(name, qubits, words):
    with pytest.raises(ValueError, match=f"qtha.noise_model: .*{words}"):
        noise.check(name, qubits)


@pytest.mark.parametrize("name", ["fake:manila", "fake:fake_manila", "fake:Manila"])
def test_spellings_of_a_device(name):
    assert noise.device(name, 5).name == "fake_manila"


def test_without_ibms_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "qiskit_ibm_runtime", None)
    with pytest.raises(ValueError, match=r"needs qiskit-ibm-runtime. What works: `pip install \"axolotl-qtha\[ibm\]\"`"):
        noise.check("fake:manila", 2)
