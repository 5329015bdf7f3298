"""Noise models by strengths and by import path, against Aer's own run of the same circuit, read out by Aer itself."""

import numpy as np
import pytest
from qiskit import ClassicalRegister, transpile
from qiskit_aer import AerSimulator

from axolotl_qtha.circuit import aer, noise
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.simulation import Simulation, Strengths

from . import own_models
from .reference import angles_and_inputs, values
from .test_noise import run

HERE = "tests.circuit.own_models"
SHOTS = 200_000


def sampled(ansatz, z, theta, model, basis):
    """<Z> by Aer alone: Qiskit's circuit, measured and read out with a noise model; (tokens, n)."""
    circuit, rows = ansatz.circuit(), []
    for row in z:
        bound = transpile(circuit.assign_parameters(values(circuit, row, theta)), basis_gates=basis, optimization_level=0)
        bound.add_register(ClassicalRegister(ansatz.qubits))
        bound.measure(range(ansatz.qubits), range(ansatz.qubits))
        simulator = AerSimulator(method="density_matrix", noise_model=model, seed_simulator=3)
        counts = simulator.run(bound, shots=SHOTS).result().get_counts()
        signs = {bits: 1 - 2 * np.array([int(bit) for bit in reversed(bits)]) for bits in counts}
        rows.append(sum(count * signs[bits] for bits, count in counts.items()) / SHOTS)
    return np.array(rows)


@pytest.mark.parametrize(
    ("name", "basis"), [("MODEL", ["ry", "rz", "cx"]), ("by_rx", ["rx", "rz", "cz"])], ids=["an object", "a function, RX and CZ"]
)
def test_an_own_noise_model_is_what_aer_makes_of_it(name, basis):
    ansatz = Ansatz(2, 1)
    z, theta = angles_and_inputs(ansatz, tokens=3)
    exact = run(ansatz, z, theta, f"{HERE}:{name}")
    model = getattr(own_models, name)
    by_hand = sampled(ansatz, z, theta, model() if callable(model) else model, basis)
    assert (np.abs(by_hand - exact) <= 5 * np.sqrt((1 - exact**2) / SHOTS)).all()  # 5 standard errors of the shots
    shots = run(ansatz, z, theta, f"{HERE}:{name}", shots=SHOTS)
    assert (np.abs(shots - exact) <= 5 * np.sqrt((1 - exact**2) / SHOTS)).all()
    clean = run(ansatz, z, theta, "none")
    assert np.abs(exact - clean).max() > 0.02, "the noise is there"


def test_an_own_device_is_the_same_as_by_name():
    ansatz = Ansatz(3, 1)
    z, theta = angles_and_inputs(ansatz, tokens=2)
    for name in (f"{HERE}:DEVICE", "qiskit_ibm_runtime.fake_provider:FakeManilaV2"):
        assert np.array_equal(run(ansatz, z, theta, name), run(ansatz, z, theta, "fake:manila"))


def test_readout_alone_flips_as_it_says():
    """<Z> as read is (1 - p - q) <Z> + q - p, of exact circuits: double precision, 1e-12."""
    ansatz, (up, down) = Ansatz(3, 1), (0.01, 0.06)
    z, theta = angles_and_inputs(ansatz, tokens=4)
    simulation = Simulation("aer", noise_model="readout", strengths=Strengths(readout=(up, down)))
    engine = aer.Engine(ansatz, simulation, None)
    expected = (1 - up - down) * run(ansatz, z, theta, "none") + down - up
    assert np.abs(engine.expectations(engine.gates.points(z, theta)) - expected).max() <= 1e-12


def test_strengths_are_those_of_the_gates():
    """One qubit, one layer: two RY and what the layer has; <Z> shrinks by 1 - p after each RY, whatever its angle."""
    ansatz, p = Ansatz(1, 1), 0.07
    z, theta = angles_and_inputs(ansatz, tokens=2)
    engine = aer.Engine(ansatz, Simulation("aer", noise_model="depolarizing", strengths=Strengths(one_qubit=p)), None)
    turns = engine.measurements[0].circuit.count_ops()["ry"]
    expected = (1 - p) ** turns * run(ansatz, z, theta, "none")
    assert np.abs(engine.expectations(engine.gates.points(z, theta)) - expected).max() <= 1e-12
    usual = aer.Engine(ansatz, Simulation("aer", noise_model="depolarizing"), None)
    assert np.abs(usual.expectations(usual.gates.points(z, theta)) - expected * (0.999 / (1 - p)) ** turns).max() <= 1e-12


@pytest.mark.parametrize(
    ("path", "qubits", "words"),
    [
        ("no_such_package.module:model", 2, "cannot be imported: `import no_such_package.module` fails with ModuleNotFoundError"),
        (f"{HERE}:modle", 2, "was imported and has no `modle`, but .*"),
        (f"{HERE}:NUMBER", 2, "gives no NoiseModel or BackendV2, but an object of builtins.int. What works: `my_package"),
        (f"{HERE}:number", 2, "gives no NoiseModel or BackendV2, but an object of builtins.int"),
        (f"{HERE}:broken", 2, "calling it without arguments fails with RuntimeError: no file of mine"),
        (f"{HERE}:SIMULATOR", 2, "is a simulator.*`simulator.options.noise_model`"),
        (f"{HERE}:small_device", 3, "has 2 qubits, the circuit 3"),
        (f"{HERE}:without_turns", 2, "has the basis gates .*of which circuits with free angles cannot be made"),
        (f"{HERE}:correlated", 2, "no read-out error of one qubit by itself.*add_readout_error"),
        (f"{HERE}:noisy_measurement", 2, "no read-out error of one qubit by itself"),
        ("/home/me/model.py:model", 2, "is unknown"),
    ],
)
def test_bad_paths(path, qubits, words):
    with pytest.raises(ValueError, match=f"qtha.noise_model: '{path}' .*{words}"):
        noise.check(path, qubits)
