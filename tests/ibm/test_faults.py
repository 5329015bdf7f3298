"""Faults of the network, of IBM and of its jobs, time-outs and Ctrl-C: nothing is submitted twice or lost."""

import io
import os
import resource
import signal
import time
from types import SimpleNamespace

import click
import numpy as np
import pytest
import requests
from qiskit_ibm_runtime.exceptions import RuntimeJobTimeoutError
from rich.console import Console

from axolotl_qtha.ibm import jobs as jobs_module
from axolotl_qtha.ibm import progress as progress_module
from axolotl_qtha.ibm.calls import CALLS
from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.ibm.progress import progress
from axolotl_qtha.ibm.runner import JobFailed, Runner
from axolotl_qtha.ibm.service import LocalService
from axolotl_qtha.training.ending import Stop

from .boundary import ANSATZ, NOISELESS, api_error, events, points

pytestmark = pytest.mark.filterwarnings("ignore:.*no QubitProperties")  # the noiseless device has none

FAKE = IBMOptions(backend="fake:manila", shots=2000)

TRANSIENT = [
    api_error(500),
    api_error(503),
    api_error(429),
    api_error(-1),
    requests.exceptions.ConnectionError("reset"),
    requests.exceptions.ReadTimeout("slow"),
    RuntimeJobTimeoutError("slow"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=lambda error: f"{type(error).__name__} {error}"[:60])
@pytest.mark.parametrize("place", ["submit", "submitted", "find", "status", "result", "usage"])
def test_passing_faults_cost_nothing_but_time(start, cloud, place, error):
    runner = start()
    cloud.plan(place, *[error] * (1 if place == "submitted" else 2))
    if place == "find":  # asked after a failed submission
        cloud.plan("submitted", error)
    values, _ = runner.expectations(points(runner))
    assert len(cloud.jobs) == 1
    assert np.array_equal(values, cloud.jobs[0]._job.result()[0].data.evs)
    assert not cloud.faults[place]
    assert runner.journal.used(local=False) == 3.0


def test_a_server_that_stays_down(start, cloud, tmp_path):
    runner = start()
    cloud.plan("submit", *[api_error(500)] * 20)
    with pytest.raises(JobFailed, match=r"does not answer.*may be submitted or not. Start again"):
        runner.expectations(points(runner))
    assert 20 - len(cloud.faults["submit"]) == 6
    assert [row["event"] for row in events(tmp_path)] == ["intent"]
    cloud.faults.clear()
    runner = start()
    runner.expectations(points(runner))
    assert len(cloud.jobs) == 1


@pytest.mark.parametrize("place", ["submit", "submitted"])
def test_the_same_process_may_go_on_after_an_error(start, cloud, place):
    runner = start()
    cloud.plan(place, ValueError("not known whether it was submitted"))
    with pytest.raises(ValueError, match="not known"):
        runner.expectations(points(runner))
    runner.expectations(points(runner))
    assert len(cloud.jobs) == 1


@pytest.mark.parametrize("full", [0, 2])
def test_a_full_disk_names_the_journal_and_nothing_is_paid_twice(start, cloud, tmp_path, monkeypatch, full):
    """No file may grow, as on a full disk, from the first write on, or from the results of a job that has ended."""
    runner, before = start(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_more(*_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))

    if full:
        keep = runner.journal.answer
        monkeypatch.setattr(runner.journal, "answer", lambda *args: (no_more(), keep(*args)))
    else:
        no_more()
    try:
        with pytest.raises(
            OSError, match=r"qtha.ibm.journal: .*cannot be written.*kept.*next start; nothing is paid twice"
        ) as error:
            runner.expectations(points(runner))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(cloud.jobs) == bool(full)
    runner = start()
    runner.expectations(points(runner))
    assert len(cloud.jobs) == 1


def test_a_refused_job_is_not_tried_again(start, cloud, tmp_path):
    runner = start(mode="session")
    cloud.plan("submit", api_error(400, "You are not authorized to run a session when using the open plan"), api_error(400))
    with pytest.raises(JobFailed, match=r"takes no job: .*not authorized to run a session.*What works.*`mode: batch`"):
        runner.expectations(points(runner))
    assert len(cloud.faults["submit"]) == 1
    assert [row["event"] for row in events(tmp_path)] == ["intent", "failed"]
    assert start().journal.used(local=False) == 0


def test_a_submission_that_the_runtime_repeated_by_itself_is_cancelled(start, cloud, caplog):
    runner = start()
    cloud.faults["copies"] = 2
    runner.expectations(points(runner))
    assert [job.cancelled for job in cloud.jobs] == [True, False]
    assert "submitted twice" in caplog.text


def test_a_failed_job_says_why_and_the_others_are_kept(start, cloud, tmp_path):
    runner = start(size=1)
    submit, states = runner.service.submit, iter([["RUNNING", "DONE"], ["QUEUED", "ERROR"]])

    def one_fails(pub, options):
        cloud.states = next(states)
        return submit(pub, options)

    runner.service.submit, cloud.reason = one_fails, "Error code 8000; control electronics"
    with pytest.raises(JobFailed, match=r"failed \(Error code 8000; control electronics\).*What was done is kept"):
        runner.expectations(points(runner))
    assert [entry.state for entry in runner.journal.entries.values()] == ["done", "failed"]
    assert runner.journal.used(local=False) == 6.0, "failed jobs are billed too"
    cloud.states = None
    runner = start()
    runner.expectations(points(runner))
    assert len(cloud.jobs) == 3, "only the failed one is run again"


def test_a_local_job_that_fails_says_why(tmp_path):
    class Broken(LocalService):
        def submit(self, pub, options):
            self.backend.run = lambda *_, **__: (_ for _ in ()).throw(ValueError("no such gate"))
            return super().submit(pub, options)

    backend = type(NOISELESS)(3, noise_info=False, seed=0)
    runner = Runner(ANSATZ, FAKE, Broken(backend, FAKE), Journal(tmp_path))
    with pytest.raises(JobFailed, match="ValueError: no such gate"):
        runner.expectations(points(runner))


def test_a_job_cancelled_by_someone_else(start, cloud):
    cloud.states, cloud.reason = ["QUEUED", "CANCELLED"], "cancelled by the administrator"
    runner = start()
    with pytest.raises(JobFailed, match=r"was cancelled \(cancelled by the administrator\)"):
        runner.expectations(points(runner))


def test_a_job_that_never_ends_is_cancelled(start, cloud):
    cloud.states = ["RUNNING"]
    runner = start(timeout_seconds=0.05)
    before = time.monotonic()
    with pytest.raises(JobFailed, match=r"1 jobs had not ended after timeout_seconds: 0.05"):
        runner.expectations(points(runner))
    assert time.monotonic() - before < 5
    assert cloud.jobs[0].cancelled
    assert [entry.state for entry in runner.journal.entries.values()] == ["cancelled"]
    assert runner.journal.used(local=False) == 3.0


def test_results_that_are_not_numbers_are_refused(start):
    runner = start()
    submit = runner.service.submit

    def spoiled(pub, options):
        job = submit(pub, options)
        job._job.result()[0].data.evs[0, 0] = np.nan
        return job

    runner.service.submit = spoiled
    with pytest.raises(JobFailed, match="of no use: <Z> is not finite"):
        runner.expectations(points(runner))


# Ctrl-C.


@pytest.mark.parametrize("place", ["submitted", "status"])
@pytest.mark.parametrize(
    ("terminal", "answer", "cancelled"),
    [(False, None, True), (True, True, True), (True, False, False), (True, click.Abort(), False)],
    ids=["no terminal", "yes", "no", "Ctrl-C again"],
)
def test_ctrl_c(start, cloud, monkeypatch, place, terminal, answer, cancelled):
    cloud.states = ["QUEUED", "RUNNING", "DONE"]
    runner = start()
    asked = []

    def confirm(text, **_):
        asked.append(text)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(jobs_module.sys.stdin, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(jobs_module.click, "confirm", confirm)
    cloud.plan(place, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        runner.expectations(points(runner))
    assert len(asked) == terminal
    assert cloud.jobs[0].cancelled == cancelled
    assert [entry.state for entry in runner.journal.entries.values()] == ["cancelled" if cancelled else "submitted"]
    runner = start()
    runner.expectations(points(runner))
    assert len(cloud.jobs) == (2 if cancelled else 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_step_of_a_training(start, cloud, monkeypatch, number, code):
    """It ends at once, with its jobs cancelled: the step may wait for hours."""
    cloud.states = ["RUNNING"]
    runner, before = start(), signal.getsignal(number)
    pressed = iter([True])
    monkeypatch.setattr(cloud, "fault", lambda place: place == "status" and next(pressed, 0) and os.kill(os.getpid(), number))
    monkeypatch.setattr(CALLS, "waiting", True)
    with pytest.raises(SystemExit) as ended, Stop(SimpleNamespace(is_world_process_zero=lambda: True)).listening():
        runner.expectations(points(runner))
    assert ended.value.code == code
    assert signal.getsignal(number) == before
    assert [job.cancelled for job in cloud.jobs] == [True]
    assert [entry.state for entry in runner.journal.entries.values()] == ["cancelled"]


# What is seen meanwhile.


def test_progress_names_the_place_in_the_queue(start, cloud, caplog):
    cloud.states = ["QUEUED", "QUEUED", "RUNNING", "DONE"]
    runner = start()
    runner.expectations(points(runner))
    assert caplog.text.count("1 queued, place 7 in the queue, after 0 s") == 1
    assert "1 running, after 0 s" in caplog.text


def test_progress_of_a_long_wait(start, cloud, caplog, monkeypatch):
    service = start().service
    with progress(service, {"a": None, "b": None}) as show:
        for elapsed in range(0, 1800, 5):
            show({"a": "QUEUED", "b": "RUNNING"}, elapsed)
    lines = [record.message for record in caplog.records]
    assert [line.rsplit("after ")[-1] for line in lines] == ["0 s", "600 s", "1,200 s"]
    assert all("1 queued, 1 running, place 7 in the queue" in line for line in lines)
    caplog.clear()
    screen = io.StringIO()
    monkeypatch.setattr(progress_module, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))
    with progress(service, {"a": None}) as show:
        show({"a": "QUEUED"}, 3725.0)
        time.sleep(0.2)  # it is drawn 12 times a second
    assert "1 queued, place 7 in the queue, 3,725 s" in screen.getvalue()
    assert not caplog.records
