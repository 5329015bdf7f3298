"""Choosing a device: what is refused, with IBM's answers planted at the runtime's own classes."""

import traceback
from collections import deque
from types import SimpleNamespace

import pytest
import qiskit_ibm_runtime
import requests
from qiskit.providers.exceptions import QiskitBackendNotFoundError
from qiskit_ibm_runtime.accounts.exceptions import AccountNotFoundError, InvalidAccountError
from qiskit_ibm_runtime.exceptions import IBMInputValueError, IBMNotAuthorizedError, RuntimeJobNotFound

from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.ibm.service import LocalService, RuntimeService, connect, is_refused, is_transient

from .boundary import NOISELESS, api_error, hurry

PLANTED = "Zq83-planted-credential"


def device(name, qubits=5, operational=True, max_shots=100_000):
    status = SimpleNamespace(operational=operational)
    return SimpleNamespace(name=name, num_qubits=qubits, max_shots=max_shots, status=lambda: status)


class Runtime:
    """QiskitRuntimeService, as far as choosing a device goes."""

    devices = (
        device("ibm_oslo", 7),
        device("ibm_osaka", 127),
        device("ibm_small", 2),
        device("ibm_down", 127, operational=False),
    )
    error = None

    def __init__(self, instance=None):
        type(self).asked = instance
        if self.error is not None:
            raise self.error

    def backends(self):
        return list(self.devices)

    def backend(self, name):
        for backend in self.devices:
            if backend.name == name:
                return backend
        raise QiskitBackendNotFoundError("none")

    def least_busy(self, min_num_qubits, operational, simulator):
        assert (operational, simulator) == (True, False)
        found = [backend for backend in self.devices if backend.num_qubits >= min_num_qubits]
        if not found:
            raise QiskitBackendNotFoundError("none")
        return found[-2]


@pytest.fixture
def runtime(monkeypatch):
    class Here(Runtime):
        pass

    monkeypatch.setattr(qiskit_ibm_runtime, "QiskitRuntimeService", Here)
    return Here


def options(**changes):
    return IBMOptions(**{"max_qpu_seconds": 60, **changes})


def test_no_account_at_all(monkeypatch, tmp_path):
    """The real QiskitRuntimeService, with neither a file nor a variable: it finds that out without the network."""
    monkeypatch.setattr("qiskit_ibm_runtime.accounts.management._DEFAULT_ACCOUNT_CONFIG_JSON_FILE", str(tmp_path / "none.json"))
    for name in ("QISKIT_IBM_TOKEN", "QISKIT_IBM_CHANNEL", "QISKIT_IBM_INSTANCE", "QISKIT_IBM_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"finds no account of IBM Quantum.*save_account.*QISKIT_IBM_TOKEN.*fake:manila"):
        connect(options(), 2)


def test_ibm_does_not_answer(monkeypatch):
    """The real QiskitRuntimeService with a token, behind a proxy that is not there."""
    monkeypatch.setenv("QISKIT_IBM_TOKEN", PLANTED * 2)
    monkeypatch.setenv("QISKIT_IBM_CHANNEL", "ibm_quantum_platform")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ValueError, match=r"gets no answer from IBM's servers to sign in.*nothing was submitted") as refused:
        connect(options(), 2)
    assert PLANTED not in "".join(traceback.format_exception(refused.value))


def test_a_fault_while_choosing_a_device_passes(runtime, monkeypatch):
    hurry(monkeypatch)
    faults = {
        name: deque([api_error(500), requests.exceptions.ReadTimeout("slow")]) for name in ("backend", "backends", "least_busy")
    }

    def failing(name):
        answer = getattr(Runtime, name)

        def call(self, *arguments, **keywords):
            if faults[name]:
                raise faults[name].popleft()
            return answer(self, *arguments, **keywords)

        return call

    for name in faults:
        monkeypatch.setattr(runtime, name, failing(name))
    assert connect(options(), 2).name == "ibm_small"
    assert connect(options(backend="ibm_oslo"), 2).name == "ibm_oslo"
    with pytest.raises(ValueError, match="`ibm_oslo`"):
        connect(options(backend="ibm_olso"), 2)
    assert not any(faults.values())


@pytest.mark.parametrize(
    ("error", "changes", "words"),
    [
        (AccountNotFoundError(PLANTED), {}, ["no account", "save_account", "QISKIT_IBM_TOKEN"]),
        (InvalidAccountError(f"token {PLANTED}"), {}, ["no account of IBM Quantum that works (InvalidAccountError)"]),
        (IBMNotAuthorizedError(f"401 {PLANTED}"), {}, ["is not authorised", "save_account"]),
        (IBMInputValueError(PLANTED), {"instance": PLANTED}, ["qtha.ibm.instance: '(not shown)'", "is not an instance"]),
        (IBMInputValueError(PLANTED), {}, ["qtha.ibm.instance: None", "no instance saved"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_accounts_that_do_not_work(runtime, error, changes, words):
    runtime.error = error
    with pytest.raises(ValueError, match="What works") as refused:
        connect(options(**changes), 2)
    for word in words:
        assert word in str(refused.value)
    assert PLANTED not in str(refused.value)
    assert refused.value.__suppress_context__, "IBM's error would be printed with it"


@pytest.mark.parametrize(
    ("changes", "qubits", "words"),
    [
        ({"backend": "ibm_olso"}, 2, ["qtha.ibm.backend: (str, value not shown)", "`ibm_oslo`"]),
        ({"backend": "zzz"}, 2, ["`ibm_down`, `ibm_osaka`, `ibm_oslo`, `ibm_small`"]),
        ({"backend": "ibm_small"}, 4, ["has 2 qubits, the circuit 4", "`qubits:`", "least_busy"]),
        ({"backend": "ibm_down"}, 4, ["not in operation", "least_busy"]),
        ({"backend": "least_busy"}, 200, ["no device of 200 qubits", "fake:torino"]),
        ({"backend": "ibm_oslo", "shots": 100_001}, 2, ["qtha.ibm.shots: 100001", "100,000 at most", "`shots: 100000`"]),
        (
            {"backend": "ibm_oslo", "precision": 0.001},
            2,
            ["qtha.ibm.precision: 0.001", "1,000,000 shots", "`precision: 0.003` or"],
        ),
        ({"backend": "fake:manila"}, 6, ["has 5 qubits, the circuit 6"]),
    ],
    ids=str,
)
def test_devices_that_do_not_work(runtime, changes, qubits, words):
    with pytest.raises(ValueError, match="What works") as refused:
        connect(options(**changes), qubits)
    for word in words:
        assert word in str(refused.value)


def test_the_device_that_was_asked_for(runtime):
    assert connect(options(backend="ibm_oslo", instance="mine"), 2).name == "ibm_oslo"
    assert runtime.asked == "mine"
    assert connect(options(), 100).name == "ibm_osaka"
    assert runtime.asked is None
    # what `least_busy` stood for when the journal was begun: its results and jobs are there
    assert connect(options(), 2, preferred="ibm_oslo").name == "ibm_oslo"
    fake = connect(IBMOptions(backend="fake:manila"), 2)
    assert type(fake) is LocalService
    assert (fake.name, fake.calibration[:10]) == ("fake_manila", "2024-05-27")


def test_a_session_on_the_open_plan(monkeypatch):
    def refuse(*_, **__):
        raise api_error(400, "You are not authorized to run a session when using the open plan")

    monkeypatch.setattr(qiskit_ibm_runtime, "Session", refuse)
    service = RuntimeService(None, NOISELESS, options(mode="session"))
    with pytest.raises(ValueError, match=r"qtha.ibm.mode: 'session' is refused by IBM: .*open plan.*`mode: batch`"):
        service.start(60)


def test_batches_and_sessions_are_opened_once_and_closed(monkeypatch):
    opened = []

    class Mode:
        session_id = "s1"

        def __init__(self, backend, max_time=None):
            opened.append((type(self).__name__, max_time))

        def close(self):
            opened.append("closed")

        def usage(self):
            return 12

    for kind in ("Batch", "Session"):
        monkeypatch.setattr(qiskit_ibm_runtime, kind, type(kind, (Mode,), {}))
    expected = {"job": ([], None), "batch": ([("Batch", None), "closed"], None), "session": ([("Session", 60), "closed"], "s1")}
    for mode, (calls, billed) in expected.items():
        opened.clear()
        service = RuntimeService(None, NOISELESS, options(mode=mode))
        assert (service.start(60), service.start(60)) == (billed, None)
        assert service.stop() == (None if mode == "job" else 12)
        assert service.stop() is None
        assert opened == calls


def test_jobs_are_found_by_id_and_tag():
    def job(job_id):
        if job_id != "here":
            raise RuntimeJobNotFound("gone")
        return job_id

    runtime = SimpleNamespace(job=job, jobs=lambda limit, job_tags, descending: [(limit, job_tags, descending)])
    service = RuntimeService(runtime, NOISELESS, options())
    assert (service.job("here"), service.job("gone")) == ("here", None)
    assert service.find("tag") == [(None, ["tag"], False)]


@pytest.mark.parametrize(
    ("metrics", "seconds", "place"),
    [
        ({"usage": {"status": "pending", "qpu_charge_time_seconds": 1}, "position_in_queue": 4}, None, 4),
        ({"usage": {"status": "final", "qpu_charge_time_seconds": 3}}, 3.0, None),
        ({"usage": {"status": "final", "quantum_seconds": 2}}, 2.0, None),
        ({"usage": {}}, None, None),
        ({}, None, None),
    ],
)
def test_usage_counts_when_it_is_final(metrics, seconds, place):
    service, job = RuntimeService(None, NOISELESS, options()), SimpleNamespace(metrics=lambda: metrics)
    assert service.usage(job) == seconds
    assert service.queue_position(job) == place


def test_which_errors_pass_and_which_are_a_no():
    for error in (api_error(500), api_error(502), api_error(429), api_error(-1), requests.exceptions.ConnectTimeout()):
        assert is_transient(error)
        assert not is_refused(error)
    for error in (api_error(400), api_error(403), api_error(404)):
        assert is_refused(error)
        assert not is_transient(error)
    for error in (ValueError("ours"), OSError("disk"), IBMInputValueError("x")):
        assert not is_refused(error)
        assert not is_transient(error)
