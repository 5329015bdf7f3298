"""Running circuits through the journal: right values, a process that dies at every step, and the cap."""

from collections import Counter

import numpy as np
import pytest

from axolotl_qtha.circuit.aer import Engine
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.noise import device
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.ibm.runner import Runner
from axolotl_qtha.ibm.service import LocalService, connect

from ..circuit.reference import angles_and_inputs, expectations
from .boundary import ANSATZ, NOISELESS, Crash, events, points

pytestmark = pytest.mark.filterwarnings("ignore:.*no QubitProperties")  # the noiseless device has none

FAKE = IBMOptions(backend="fake:manila", shots=2000)


def within(values, exact, shots):
    """Whether values are within five standard errors; half a shot for those of +-1."""
    return (np.abs(values - exact) <= 5 * (np.sqrt((1 - exact**2).clip(0) / shots) + 0.5 / shots)).all()


@pytest.mark.parametrize(("qubits", "layers"), [(1, 2), (2, 2), (3, 1)])
def test_local_mode_without_noise_has_the_exact_values(tmp_path, qubits, layers):
    ansatz = Ansatz(qubits, layers)
    runner = Runner(ansatz, FAKE, LocalService(NOISELESS, FAKE), Journal(tmp_path))
    z, theta = angles_and_inputs(ansatz, tokens=30)
    values, errors = runner.expectations(runner.isa.gates.points(z, theta))
    exact = expectations(ansatz, z, theta)
    assert within(values, exact, 2000)
    assert np.abs(values - exact).std() > 0.2 * errors.mean(), "these are shots"
    assert np.allclose(errors, np.sqrt((1 - values**2) / 2000), rtol=0.02, atol=1e-4)


def test_local_mode_on_a_fake_device_has_the_noise_that_aer_gives_it(tmp_path, caplog):
    ansatz = Ansatz(3, 1)
    service = connect(FAKE, 3)  # at the root's level, WARNING, as under Axolotl
    assert "does not exercise: the queue, QPU usage" in caplog.text
    runner = Runner(ansatz, FAKE, service, Journal(tmp_path))
    z, theta = angles_and_inputs(ansatz, tokens=10)
    aer = Engine(ansatz, Simulation("aer", noise_model="fake:manila"), None)
    noisy = aer.expectations(aer.gates.points(z, theta))
    values, _ = runner.expectations(runner.isa.gates.points(z, theta))
    assert within(values, noisy, 2000)
    assert not within(expectations(ansatz, z, theta), noisy, 2000), "or the noise would not matter"


def test_a_seed_repeats_a_fake_device(tmp_path):
    """Two fresh journals, two jobs each; equal circuits of a job, and the same ones of two jobs, have draws of their own."""
    ansatz, asked = Ansatz(2, 1), []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        runner = Runner(ansatz, FAKE, LocalService(device("fake:manila", 2), FAKE), Journal(tmp_path / folder), seed)
        equal, seen = np.tile(points(runner, 1), (3, 1)), Counter()
        asked.append([runner.expectations(equal, runner.draws.keys(equal, seen))[0] for _ in range(2)])
        assert len(np.unique(np.concatenate(asked[-1]), axis=0)) == 6
        runner.journal.close()
    assert np.array_equal(asked[0], asked[1])
    assert not np.array_equal(asked[0], asked[2])


def test_another_seed_on_a_fake_device_is_another_measurement(tmp_path):
    for seed, jobs in ((1, 1), (2, 2), (1, 2)):
        runner = Runner(ANSATZ, FAKE, LocalService(NOISELESS, FAKE), Journal(tmp_path), seed)
        runner.expectations(points(runner))
        assert len(runner.journal.entries) == jobs
        runner.journal.close()


def test_journal_answers_what_was_run_before(start, cloud, tmp_path):
    runner = start()
    first = runner.expectations(points(runner))
    again = runner.expectations(points(runner)[::-1])
    assert len(cloud.jobs) == 1
    assert all(np.array_equal(a, b[::-1]) for a, b in zip(first, again, strict=True))
    runner = start()
    longer = runner.expectations(np.concatenate([points(runner), points(runner, seed=1)]))
    assert np.array_equal(longer[0][:2], first[0])
    assert [entry.circuits for entry in runner.journal.entries.values()] == [2, 2]
    assert Counter(row["event"] for row in events(tmp_path)) == {"intent": 2, "submitted": 2, "done": 2}


def test_equal_circuits_have_shots_of_their_own_and_a_call_repeated_costs_nothing(start, cloud):
    runner = start()
    equal = np.tile(points(runner, 1, seed=2), (5, 1))
    first = runner.expectations(equal)[0]
    assert cloud.jobs[-1]._job.result()[0].data.evs.shape == (5, 2)
    assert len(np.unique(first, axis=0)) > 1, "one draw of shots for all"
    again = start()
    for repeated in (equal, equal[:3]):  # as under checkpointing; and fewer of them
        assert np.array_equal(again.expectations(repeated)[0], first[: len(repeated)])
    assert len(cloud.jobs) == 1
    again.expectations(np.concatenate([equal, equal[:2]]))
    assert cloud.jobs[-1]._job.result()[0].data.evs.shape == (2, 2), "two more draws"


@pytest.mark.parametrize("changes", [{"shots": 65}, {"resilience_level": 1}, {"twirling": True}, {"dynamical_decoupling": "XX"}])
def test_other_options_are_other_results(start, cloud, changes):
    runner = start()
    runner.expectations(points(runner))
    runner = start(**changes)
    runner.expectations(points(runner))
    assert len(cloud.jobs) == 2
    runner = start(tokens_per_step=1, max_qpu_seconds=2000, mode="job", gradient="none")  # these change no result
    runner.expectations(points(runner))
    assert len(cloud.jobs) == 2


def test_another_calibration_is_another_result(start, cloud):
    runner = start()
    runner.expectations(points(runner))
    cloud.calibration = "2026-01-02"
    runner = start()
    runner.expectations(points(runner))
    assert len(cloud.jobs) == 2


def test_large_requests_become_jobs_within_the_limits(start, cloud):
    runner = start(size=3)
    values, _ = runner.expectations(points(runner, tokens=8))
    assert [job._job.result()[0].data.evs.shape for job in cloud.jobs] == [(3, 2), (3, 2), (2, 2)]
    assert within(values, expectations(ANSATZ, *angles_and_inputs(ANSATZ, 8)), 64)
    # IBM stops them before they could use more than the cap, all together
    shares = [options["max_execution_time"] for options in cloud.options]
    assert sum(shares) <= 1000
    assert all(share >= 300 for share in shares)


# A process that dies, at every step.


def crashed(start, cloud, place):
    """Run until a process dies at a place, then start another one."""
    runner = start()
    cloud.plan(place, Crash())
    with pytest.raises(Crash):
        runner.expectations(points(runner))
    return start()


def test_death_between_intent_and_submission(start, cloud, tmp_path):
    runner = crashed(start, cloud, "submit")
    assert [row["event"] for row in events(tmp_path)] == ["intent", "lost"]
    runner.expectations(points(runner))
    assert len(cloud.jobs) == 1
    assert runner.journal.used(local=False) == 3.0


def test_death_between_submission_and_its_record(start, cloud, tmp_path):
    runner = crashed(start, cloud, "submitted")
    assert [row["event"] for row in events(tmp_path)] == ["intent", "submitted"]
    values, _ = runner.expectations(points(runner))
    assert len(cloud.jobs) == 1, "submitted twice"
    assert np.array_equal(values, cloud.jobs[0]._job.result()[0].data.evs)


@pytest.mark.parametrize("place", ["status", "result", "usage"])
def test_death_before_the_result_is_kept(start, cloud, place):
    runner = crashed(start, cloud, place)
    cloud.calibration = "the device was calibrated meanwhile"
    values, _ = runner.expectations(points(runner))
    assert len(cloud.jobs) == 1, "submitted twice"
    assert np.array_equal(values, cloud.jobs[0]._job.result()[0].data.evs)
    assert runner.journal.used(local=False) == 3.0


def test_death_while_the_result_is_written(start, cloud, tmp_path):
    runner = start()
    values, _ = runner.expectations(points(runner))
    (result,) = (tmp_path / "results").iterdir()
    result.write_bytes(result.read_bytes()[:-5])
    runner = start()
    assert np.array_equal(runner.expectations(points(runner))[0], values)
    assert len(cloud.jobs) == 1, "submitted twice"
    assert runner.journal.used(local=False) == 3.0


def test_calibration_between_the_runs_does_not_orphan_a_running_job(start, cloud):
    cloud.states = ["QUEUED", "RUNNING", "DONE"]
    crashed(start, cloud, "status")
    cloud.calibration = "2026-01-02"
    runner = start()
    runner.expectations(points(runner))
    assert len(cloud.jobs) == 1
    runner.expectations(points(runner))
    assert len(cloud.jobs) == 1


# The cap.


def test_nothing_is_submitted_above_the_cap(start, cloud, tmp_path):
    runner = start(max_qpu_seconds=10)
    runner.expectations(points(runner))  # estimated at 2.05, billed 3
    cost = runner.cost(2).qpu_seconds
    assert 2 < cost < 2.1
    runner.expectations(points(runner, seed=1))
    assert runner.remaining() == pytest.approx(4)
    cloud.seconds = 2.5
    runner.expectations(points(runner, seed=2))
    expected = rf"max_qpu_seconds: 10.0 leaves 1.5 s \(8.5 s are used, 0.0 s go to 0 jobs.*2 circuits need about {cost:.1f} s: "
    with pytest.raises(ValueError, match=expected + rf"{cost - 1.5:.1f} s too many.*`max_qpu_seconds: 11`"):
        runner.expectations(points(runner, seed=3))
    assert len(cloud.jobs) == 3
    with pytest.raises(ValueError, match=r"leaves 1.5 s"):  # nor in another process
        (again := start(max_qpu_seconds=10)).expectations(points(again, seed=3))
    assert len(cloud.jobs) == 3
    assert [row["event"] for row in events(tmp_path)].count("intent") == 3
    again.expectations(points(again))  # what is in the journal is free
    more = start(max_qpu_seconds=11)
    more.expectations(points(more, seed=3))
    assert len(cloud.jobs) == 4
    assert cloud.options[-1]["max_execution_time"] == 2, "what was left"


def test_a_request_is_refused_as_a_whole(start, cloud):
    runner = start(max_qpu_seconds=5, size=1)
    with pytest.raises(ValueError, match="4 circuits need about 8"):
        runner.expectations(points(runner, tokens=4))
    assert not cloud.jobs


def test_usage_that_ibm_has_not_settled_counts_as_estimated(start, cloud):
    cloud.seconds = None
    runner = start(max_qpu_seconds=3)
    runner.expectations(points(runner))
    with pytest.raises(ValueError, match=r"leaves 1.0 s"):
        runner.expectations(points(runner, seed=1))
    cloud.seconds = 0.5  # settled meanwhile
    runner = start(max_qpu_seconds=3)
    assert runner.remaining() == 2.5
    runner.expectations(points(runner, seed=1))


def test_a_job_that_used_more_than_the_cap_is_kept_and_the_last(start, cloud):
    cloud.seconds = 50.0
    runner = start(max_qpu_seconds=10)
    values, _ = runner.expectations(points(runner))
    assert np.array_equal(runner.expectations(points(runner))[0], values)
    with pytest.raises(ValueError, match=r"leaves 0.0 s \(50.0 s are used.*`max_qpu_seconds: 53`"):
        runner.expectations(points(runner, seed=1))
    assert len(cloud.jobs) == 1


def test_jobs_under_way_count(start, cloud):
    cloud.states = ["RUNNING"]
    crashed(start, cloud, "status")
    runner = start(max_qpu_seconds=4)
    assert runner.remaining() == pytest.approx(4 - runner.cost(2).qpu_seconds)
    with pytest.raises(ValueError, match=r"2.0 s go to 1 jobs under way"):
        runner.expectations(points(runner, seed=1))
    assert len(cloud.jobs) == 1


def test_what_ibm_may_let_a_job_use_is_not_given_away_twice(start, cloud):
    """The first job may run up to the cap, 1000 s: the second is submitted only when the first has ended."""
    cloud.states = ["RUNNING", "RUNNING", "RUNNING", "DONE"]
    runner = crashed(start, cloud, "status")
    assert cloud.options[0]["max_execution_time"] == 1000
    runner.expectations(points(runner, seed=1))
    assert runner.journal.entries[cloud.jobs[0].tag].state == "done"
    assert cloud.options[1]["max_execution_time"] == 997
