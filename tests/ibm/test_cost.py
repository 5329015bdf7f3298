"""Prices: counts against an independent transpile, seconds against IBM's formula."""

import pytest
from qiskit import QuantumCircuit
from qiskit.transpiler import generate_preset_pass_manager
from qiskit_ibm_runtime.fake_provider import FakeManilaV2, FakeTorino

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.ibm.circuits import ISACircuit
from axolotl_qtha.ibm.cost import Cost, rate
from axolotl_qtha.ibm.options import IBMOptions

from .boundary import NOISELESS

pytestmark = pytest.mark.filterwarnings("ignore:.*no QubitProperties")

MANILA = FakeManilaV2()


def options(**changes):
    return IBMOptions(**{"backend": "fake:manila", "shots": 1000, "resilience_level": 0, **changes})


def independent(ansatz, backend):
    """Return the circuit as Qiskit's pass manager makes it of the original, whose gates share their parameters."""
    manager = generate_preset_pass_manager(optimization_level=3, backend=backend, seed_transpiler=0)
    return manager.run(ansatz.circuit())


@pytest.mark.parametrize("backend", [MANILA, FakeTorino()], ids=["manila", "torino"])
@pytest.mark.parametrize(("qubits", "layers"), [(2, 1), (3, 2)])
def test_counts_are_those_of_an_independent_transpile(backend, qubits, layers):
    ansatz = Ansatz(qubits, layers)
    price = rate(ISACircuit(ansatz, backend), options(), backend)
    expected: QuantumCircuit = independent(ansatz, backend)
    assert price.gates == dict(expected.count_ops())
    assert price.depth == expected.depth()
    assert price.two_qubit_gates == sum(len(gate.qubits) == 2 for gate in expected.data) > 0


def test_seconds_are_ibms_formula():
    isa = ISACircuit(Ansatz(2, 1), MANILA)
    price = rate(isa, options(), MANILA)
    measured = independent(Ansatz(2, 1), MANILA)
    measured.measure_active()
    length = measured.estimate_duration(MANILA.target) + max(MANILA.target["reset"][(qubit,)].duration for qubit in isa.qubits)
    assert 1e-6 < length < 5e-5
    cost = price.cost(7)
    assert cost == Cost(7, 1, 7000, pytest.approx(2 + 7000 * (250e-6 + length), rel=1e-6))
    assert price.cost(0) == Cost(0, 0, 0, 0.0)
    # a device that does not say how long its gates take: IBM's "typical" length
    blind = rate(ISACircuit(Ansatz(2, 1), NOISELESS), options(), NOISELESS)
    assert blind.assumed
    assert blind.cost(7).qpu_seconds == pytest.approx(2 + 7000 * 0.00035)  # and IBM's quick formula


def test_mitigation_costs_what_its_options_say():
    isa = ISACircuit(Ansatz(2, 1), MANILA)

    def of(**changes):
        return rate(isa, options(**changes), MANILA)

    assert (of().executions, of().learning) == (1000, 0)
    assert of(precision=0.1, shots=None).executions == 100
    # 32 randomisations, of at least 64 shots each
    assert of(twirling=True).executions == 16 * 64
    assert (of(resilience_level=1, shots=4096).executions, of(resilience_level=1, shots=4096).learning) == (4096, 4096)
    assert (of(resilience_level=2, shots=4096).executions, of(resilience_level=2, shots=4096).learning) == (3 * 4096, 4096)
    assert of(resilience_level=2).seconds - 250e-6 == pytest.approx(3 * (of().seconds - 250e-6))


def test_jobs_stay_within_the_limits():
    isa = ISACircuit(Ansatz(2, 1), MANILA)
    for changes in ({"shots": 5_000_000}, {"shots": 1}, {"shots": 4096, "resilience_level": 2}):
        price = rate(isa, options(**changes), MANILA)
        assert price.job(price.circuits_per_job).executions <= 5_000_000
        full = price.cost(2 * price.circuits_per_job + 1)
        assert (full.jobs, full.circuits) == (3, 2 * price.circuits_per_job + 1)
        assert full.executions == full.circuits * price.executions + 3 * price.learning
    assert rate(isa, options(shots=4096), MANILA).circuits_per_job == 5_000_000 // 4096
    # with few shots the control system's memory is the limit: 26.8 million instructions a qubit, on that which has the most
    instructions = {"rz": 1, "sx": 2, "x": 2, "cx": 5}
    each = 60 + max(
        sum(instructions[gate.operation.name] for gate in isa.circuit.data if qubit in gate.qubits)
        for qubit in isa.circuit.qubits
    )
    assert rate(isa, options(shots=1), MANILA).circuits_per_job == 26_800_000 // each
