"""Noise models and devices as a user's module has them, named by import path in the tests."""

from qiskit.providers.fake_provider import GenericBackendV2
from qiskit_aer import AerSimulator
from qiskit_aer.noise import NoiseModel, ReadoutError, depolarizing_error
from qiskit_ibm_runtime.fake_provider import FakeManilaV2

from axolotl_qtha.circuit.examples import cz_ladder

FLIPS = {0: (0.01, 0.05), 1: (0.04, 0.02)}  # by qubit: P(read 1 | prepared 0) and P(read 0 | prepared 1)


def _noisy(basis, gate, probability):
    model = NoiseModel(basis_gates=basis)
    model.add_all_qubit_quantum_error(depolarizing_error(probability, 1), gate)
    for qubit, (up, down) in FLIPS.items():
        model.add_readout_error(ReadoutError([[1 - up, up], [down, 1 - down]]), [qubit])
    return model


MODEL = _noisy(["ry", "rz", "cx"], "ry", 0.02)
DEVICE = FakeManilaV2()
SIMULATOR = AerSimulator()
NUMBER = 7


def xy(qubits, layers):
    """A circuit whose observables take two measurements."""
    return {"circuit": cz_ladder(qubits, layers), "observables": [("XX", [0, 1]), ("Y", [1]), ("ZX", [2, 0])]}


def by_rx():
    return _noisy(["rx", "rz", "cz"], "rx", 0.02)


def small_device():
    return GenericBackendV2(2, seed=1)


def broken():
    raise RuntimeError("no file of mine")


def number():
    return 7


def without_turns():
    return NoiseModel(basis_gates=["x", "cx"])


def correlated():
    model = NoiseModel(basis_gates=["ry", "rz", "cx"])
    model.add_readout_error(ReadoutError([[0.9, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0.1, 0.9]]), [0, 1])
    return model


def noisy_measurement():
    model = NoiseModel(basis_gates=["ry", "rz", "cx"])
    model.add_all_qubit_quantum_error(depolarizing_error(0.1, 1), "measure")
    return model
