"""The circuit in a device's gates: its observables and PUBs, against Qiskit and the exact engine."""

import itertools

import numpy as np
import pytest
from qiskit.providers.fake_provider import GenericBackendV2
from qiskit.quantum_info import Statevector
from qiskit_aer import AerSimulator
from qiskit_ibm_runtime import EstimatorV2
from qiskit_ibm_runtime.fake_provider import FakeManilaV2

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.ibm.circuits import ISACircuit, estimator_options
from axolotl_qtha.ibm.options import IBMOptions

from ..circuit.reference import angles_and_inputs, expectations

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
