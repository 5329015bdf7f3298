"""circuit.qpy: what it keeps, and what a stranger's may hold."""

import io
import random

import numpy as np
import pytest
from qiskit import QuantumCircuit, qpy
from qiskit.circuit import ParameterVector

from axolotl_qtha.circuit import circuit_file
from axolotl_qtha.circuit.own import called
from axolotl_qtha.circuit.recognised import ansatz_of

from .test_general import CASES, case, draws, run


def kept(folder, *circuits):
    circuit_file.write(folder, circuits)
    return circuit_file.read(folder / circuit_file.FILE, "mine")


@pytest.mark.parametrize("name", CASES)
def test_it_comes_back_as_it_was(name, tmp_path):
    own = case(name)
    found = kept(tmp_path, own)[len(own.inputs)]
    assert found.digest == own.digest
    assert found.observables == own.observables
    z, angles, weights = draws(ansatz_of(own))
    for mine, its in zip(run(ansatz_of(found), z, angles, weights), run(ansatz_of(own), z, angles, weights), strict=True):
        assert np.abs(mine - its).max() <= 1e-14


def test_circuits_of_several_sizes_lie_in_one_file(tmp_path):
    circuits = [called("axolotl_qtha.circuit.examples:cz_ladder", qubits, 1) for qubits in (2, 4)]
    assert {numbers: own.digest for numbers, own in kept(tmp_path, *circuits).items()} == {
        len(own.inputs): own.digest for own in circuits
    }


def written(tmp_path, data):
    path = tmp_path / "circuit.qpy"
    path.write_bytes(data)
    return path


def dumped(circuit, version=None):
    buffer = io.BytesIO()
    qpy.dump(circuit, buffer, **({} if version is None else {"version": version}))
    return buffer.getvalue()


def measured():
    z, theta = ParameterVector("z", 1), ParameterVector("theta", 1)
    circuit = QuantumCircuit(1, 1, metadata={"inputs": ["z[0]"], "trained": ["theta[0]"], "observables": ["Z"]})
    circuit.ry(z[0], 0)
    circuit.ry(theta[0], 0)
    circuit.measure(0, 0)
    return circuit


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is no QPY file"),
        (b"PK\x03\x04 a zip file", "is no QPY file"),
        (b"QISKIT\x0c" + bytes(100), "QPY version 12, whose reading is unsafe"),
        (b"QISKIT\x12" + bytes(100), "damaged"),
        (dumped(QuantumCircuit(2)), "does not say what its circuit's inputs and observables are"),
        (dumped(QuantumCircuit(2, metadata={"inputs": ["a"], "trained": [], "observables": []})), "names other parameters"),
        (dumped(measured()), "measures"),
    ],
)
def test_other_files_are_refused(data, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        circuit_file.read(written(tmp_path, data), "mine")
    assert "What works: " in str(error.value)


def test_a_file_that_is_far_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(circuit_file, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="more than any circuit needs"):
        circuit_file.read(written(tmp_path, bytes(11)), "mine")


def test_a_damaged_file_is_refused_or_is_a_circuit(tmp_path):
    """60 seeded mutations: never another error than a ValueError."""
    circuit_file.write(tmp_path, [case("zz_observables")])
    whole, source = (tmp_path / "circuit.qpy").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            data[source.randrange(7, len(data))] = source.randrange(256)
        try:
            circuit_file.read(written(tmp_path, bytes(data[: source.randint(20, len(data))])), "mine")
        except ValueError:
            refused += 1
    assert refused > 30
