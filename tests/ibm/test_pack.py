"""Several circuits side by side in one of the device's: where they go, what is asked and answered, the journal, and the cost."""

import dataclasses
import json

import numpy as np
import pytest
from qiskit.providers.fake_provider import GenericBackendV2
from qiskit.quantum_info import Statevector
from qiskit_ibm_runtime.fake_provider import FakeManilaV2, FakeTorino

from axolotl_qtha.circuit.aer import Engine
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.shifts import GateAngles
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.ibm.circuits import WORSE, ISACircuit
from axolotl_qtha.ibm.cost import rate
from axolotl_qtha.ibm.engine import refuse_unsimulated
from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.ibm.placement import places
from axolotl_qtha.ibm.runner import Runner
from axolotl_qtha.ibm.service import LocalService

from ..circuit.reference import angles_and_inputs, expectations
from .boundary import ANSATZ, PAID, Cloud, StandIn, events, points
from .test_runner import within

pytestmark = pytest.mark.filterwarnings("ignore:.*no QubitProperties")

RING = GenericBackendV2(10, coupling_map=[(i, i + 1) for i in range(9)], noise_info=False, seed=0)
TORINO, MANILA = FakeTorino(), FakeManilaV2()


def options(**changes):
    return IBMOptions(**{"backend": "fake:torino", "shots": 1024, "resilience_level": 0, **changes})


@pytest.mark.parametrize(("qubits", "pack"), [(2, 3), (3, 3), (4, 2), (1, 5)])
def test_the_pub_is_every_circuit_in_its_place(qubits, pack):
    ansatz = Ansatz(qubits, 2)
    z, theta = angles_and_inputs(ansatz, tokens=2 * pack - 1)
    isa = ISACircuit(ansatz, RING, options(pack=pack))
    circuit, observables, values = isa.pub(isa.gates.points(z, theta))
    assert values.shape == (2, 1, pack * len(isa.gates.kinds))
    assert (isa.pack, len(observables[0]), len(set(isa.qubits))) == (pack, pack * qubits, pack * qubits)
    for gate in circuit.data:
        assert RING.target.instruction_supported(gate.name, tuple(circuit.find_bit(qubit).index for qubit in gate.qubits))
    states = [Statevector(circuit.assign_parameters(row[0])) for row in values]
    result = [[state.expectation_value(operator).real for operator in observables[0]] for state in states]
    in_order = np.array(result).reshape(2 * pack, qubits)
    assert np.abs(in_order[:-1] - expectations(ansatz, z, theta)).max() < 1e-10
    assert np.abs(in_order[-1] - in_order[-2]).max() < 1e-10  # what fills the last row


@pytest.mark.parametrize(("backend", "qubits", "least"), [(TORINO, 4, 20), (TORINO, 8, 9), (MANILA, 2, 2), (MANILA, 4, 1)])
def test_places_share_no_qubit_and_the_best_come_first(backend, qubits, least):
    circuit = GateAngles(Ansatz(qubits, 1)).circuit
    found, taken = places(circuit, backend), set()
    assert len(found) >= least
    for place in found:
        used = {place.circuit.find_bit(qubit).index for gate in place.circuit.data for qubit in gate.qubits}
        assert used >= set(place.qubits)
        assert taken.isdisjoint(used)
        taken |= used
    errors = [place.error for place in found]
    assert errors == sorted(errors)
    # the first one's, from the calibration: a chain of two-qubit and one-qubit gates and the read-out
    first, right = found[0], 1.0
    for gate in first.circuit.data:
        where = tuple(first.circuit.find_bit(qubit).index for qubit in gate.qubits)
        right *= 1 - (backend.target[gate.operation.name][where].error or 0)
    for qubit in first.qubits:
        right *= 1 - backend.target["measure"][(qubit,)].error
    assert first.error == pytest.approx(1 - right)
    assert 0.01 < first.error < 0.6


def test_auto_takes_the_good_ones():
    every = places(GateAngles(Ansatz(4, 2)).circuit, TORINO)
    on_real = IBMOptions(backend="torino", max_qpu_seconds=60, pack="auto")
    chosen = ISACircuit(Ansatz(4, 2), TORINO, on_real)
    faults = [-np.log(1 - place.error) for place in every]
    assert 1 < chosen.pack == sum(fault <= WORSE * faults[0] for fault in faults) < len(every)
    long = places(GateAngles(Ansatz(8, 8)).circuit, TORINO)  # almost every run has a fault, and still some groups are better
    assert max(place.error for place in long) < 1
    assert ISACircuit(Ansatz(8, 8), TORINO, on_real).pack < len(long)
    assert ISACircuit(Ansatz(4, 2), TORINO, options(pack="auto")).pack == 2  # simulated: 8 qubits
    assert ISACircuit(Ansatz(8, 1), TORINO, options(pack="auto")).pack == 1


@pytest.mark.parametrize(
    ("backend", "pack", "words"),
    [
        (TORINO, 34, ["qtha.ibm.pack: 34", "need 136", "torino has 133", "`pack: auto`, or fewer"]),
        (TORINO, 33, ["qtha.ibm.pack: 33", "groups of as many that are connected and work", "`pack: auto`, or at most 2"]),
        (MANILA, 2, ["qtha.ibm.pack: 2", "need 8", "has 5", "`pack: auto`, or fewer"]),
    ],
)
def test_more_than_the_device_holds(backend, pack, words):
    with pytest.raises(ValueError, match="What works") as caught:
        ISACircuit(Ansatz(4, 1), backend, options(pack=pack))
    for word in words:
        assert word in str(caught.value)


def test_without_noise_the_values_are_exact_up_to_shots(tmp_path):
    ansatz, block = Ansatz(3, 1), options(shots=2000, pack=3)
    runner = Runner(ansatz, block, LocalService(RING, block), Journal(tmp_path))
    z, theta = angles_and_inputs(ansatz, tokens=10, blocks=2)  # two blocks a token: 20 circuits in 7 rows
    asked = runner.isa.gates.points(z, theta)
    values, errors = runner.expectations(asked)
    exact = expectations(ansatz, z, theta).reshape(20, 3)
    assert within(values, exact, 2000)
    assert np.allclose(errors, np.sqrt((1 - values**2) / 2000), rtol=0.02, atol=1e-4)
    (entry,) = runner.journal.entries.values()
    assert (entry.circuits, entry.pack) == (7, 3)
    assert runner.places(asked).tolist() == [i % 3 for i in range(20)]
    assert np.array_equal(runner.expectations(asked[::-1])[0], values[::-1])
    assert runner.places(asked[::-1]).tolist() == [i % 3 for i in range(20)][::-1]


@pytest.mark.slow
def test_each_place_has_the_noise_of_its_qubits(tmp_path):
    """Against Aer's own simulation of the device's noise, place by place, on the circuits as they were placed."""
    ansatz, block = Ansatz(2, 1), options(backend="fake:manila", shots=4000, pack=2)
    runner = Runner(ansatz, block, LocalService(MANILA, block), Journal(tmp_path))
    z, theta = angles_and_inputs(ansatz, tokens=12)
    values, _ = runner.expectations(runner.isa.gates.points(z, theta))
    from qiskit_aer import AerSimulator

    simulator = AerSimulator.from_backend(MANILA)
    for p, place in enumerate(runner.isa.places):
        measured = place.circuit.copy()
        from qiskit import ClassicalRegister

        measured.add_register(register := ClassicalRegister(2))
        measured.measure(place.qubits, register)
        for row, given in list(zip(runner.isa.gates.points(z, theta), values, strict=True))[p::2]:
            bound = measured.assign_parameters({p: row[p.index] for p in measured.parameters})
            counts = simulator.run(bound, shots=4000, seed_simulator=1).result().get_counts()
            found = np.array([sum(n * (1 - 2 * int(bits[1 - i])) for bits, n in counts.items()) / 4000 for i in range(2)])
            # both are sampled: five standard errors of a difference
            assert (np.abs(found - given) <= 5 * np.sqrt(2 * (1 - found**2) / 4000) + 1 / 4000).all()


def test_a_step_costs_a_fraction():
    """`ibm.yml` on a device of 133 qubits, 8 blocks a circuit: 2 s a job, and (delay + length) for each execution of each row."""
    ansatz, seconds = Ansatz(2, 1), {}
    for pack in (1, 8):
        block = options(pack=pack)
        price = rate(ISACircuit(ansatz, TORINO, block), block, TORINO)
        for tokens in (8, 32):
            circuits = [tokens, tokens * 28]
            seconds[tokens, pack] = sum(price.cost(n).qpu_seconds for n in circuits)
            rows = sum(-(-n // pack) for n in circuits)
            assert seconds[tokens, pack] == pytest.approx(2 * 2 + rows * 1024 * price.seconds)
            assert sum(price.cost(n).executions for n in circuits) == rows * 1024
    assert seconds[8, 8] <= seconds[8, 1] / 5
    assert seconds[32, 8] <= seconds[32, 1] / 7


def test_instructions_are_counted_for_each_qubit():
    alone, packed = (rate(ISACircuit(ANSATZ, TORINO, options(shots=1, pack=n)), options(shots=1), TORINO) for n in (1, 8))
    assert packed.circuits_per_job >= 0.8 * alone.circuits_per_job  # other qubits, not eight times as many instructions
    assert packed.circuits_per_job * 8 > alone.circuits_per_job


def runner_of(folder, cloud, **changes):
    block = IBMOptions.model_validate({**PAID.model_dump(), **changes})
    return Runner(ANSATZ, block, StandIn(block, cloud, RING), Journal(folder))


def test_another_number_is_another_measurement_and_one_is_as_before(tmp_path):
    cloud, before = Cloud(), None
    for pack, jobs in ((1, 1), (3, 2), (1, 2), (3, 2), (2, 3)):
        runner = runner_of(tmp_path, cloud, pack=pack)
        values, _ = runner.expectations(points(runner, 4))
        assert len(cloud.jobs) == jobs
        assert before is None or not within(values, values + 1, 64)
        runner.journal.close()
    assert [entry.circuits for entry in runner.journal.entries.values()] == [4, 2, 2]


def test_a_journal_of_an_earlier_version_is_read(tmp_path):
    cloud = Cloud()
    runner = runner_of(tmp_path, cloud)
    values, _ = runner.expectations(points(runner, 4))
    runner.journal.close()
    rows = [{key: value for key, value in row.items() if key != "pack"} for row in events(tmp_path)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = runner_of(tmp_path, cloud)
    assert np.array_equal(again.expectations(points(again, 4))[0], values)
    assert len(cloud.jobs) == 1


def test_a_job_of_another_number_is_picked_up(tmp_path):
    """A run that died with three blocks a circuit goes on with one: the job it left is kept as it was asked."""
    cloud = Cloud()
    cloud.states = ["QUEUED"]
    runner = runner_of(tmp_path, cloud, pack=3, timeout_seconds=0.01)
    asked = points(runner, 5)
    cloud.plan("cancel", RuntimeError("the process dies here"))
    with pytest.raises(Exception, match="had not ended"):
        runner.expectations(asked)
    runner.journal.close()
    for job in cloud.jobs:
        job._states.clear()
        job._states.append("DONE")
        job.cancelled = False
    once = runner_of(tmp_path, cloud)
    once._wait({entry.tag for entry in once.journal.open(False)})
    once.journal.close()
    again = runner_of(tmp_path, cloud, pack=3)
    values, _ = again.expectations(asked)
    assert len(cloud.jobs) == 1
    z, theta = angles_and_inputs(ANSATZ, 5)
    assert within(values, expectations(ANSATZ, z, theta), 64)


def test_large_requests_are_cut_by_rows(tmp_path):
    cloud = Cloud()
    runner = runner_of(tmp_path, cloud, pack=2)
    runner.rate = dataclasses.replace(runner.rate, circuits_per_job=2)
    values, _ = runner.expectations(points(runner, tokens=9))
    assert [job._job.result()[0].data.evs.shape for job in cloud.jobs] == [(2, 4), (2, 4), (1, 4)]
    assert within(values, expectations(ANSATZ, *angles_and_inputs(ANSATZ, 9)), 64)


def test_what_cannot_be_simulated_is_refused_before_it_is_run():
    refuse_unsimulated(12, 3)
    with pytest.raises(ValueError, match=r"qtha.ibm.pack: 12 is 48 qubits in one circuit.*`pack: auto`"):
        refuse_unsimulated(48, 12)


@pytest.mark.slow
def test_two_circuits_of_four_qubits_are_simulated_with_noise(tmp_path):
    ansatz, block = Ansatz(4, 1), options(shots=500, pack="auto")
    runner = Runner(ansatz, block, LocalService(TORINO, block), Journal(tmp_path))
    z, theta = angles_and_inputs(ansatz, tokens=3)
    values, _ = runner.expectations(runner.isa.gates.points(z, theta))
    assert runner.isa.pack == 2
    exact = expectations(ansatz, z, theta)
    noisy = Engine(ansatz, Simulation("aer"), None, TORINO)
    alone = noisy.expectations(noisy.gates.points(z, theta))
    # noise pulls <Z> towards 0 on the best qubits as on others; the difference of places is small beside that of the exact values
    assert np.abs(values - alone).max() < 0.25
    assert np.abs(values - exact).max() < 0.5
