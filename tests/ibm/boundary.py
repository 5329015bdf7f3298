"""What stands in for IBM's servers, at the service's boundary alone: circuits are really run, by the runtime's local mode.

Its jobs outlive the runner that submitted them, as IBM's do, and each of its answers can be made to fail.
"""

import json
from collections import deque

from qiskit.providers.fake_provider import GenericBackendV2
from qiskit_ibm_runtime.api.exceptions import RequestsApiError
from qiskit_ibm_runtime.exceptions import IBMRuntimeError

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.ibm import service
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.ibm.service import LocalService

from ..circuit.reference import angles_and_inputs

ANSATZ = Ansatz(2, 1)
PAID = IBMOptions(backend="stand_in", shots=64, max_qpu_seconds=1000, resilience_level=0, timeout_seconds=20)
NOISELESS = GenericBackendV2(3, coupling_map=[(0, 1), (1, 2)], noise_info=False, seed=0)


class Crash(RuntimeError):
    """The process dies here."""


def api_error(code, text="told so"):
    """Return what the runtime raises for an HTTP status; -1: no answer at all."""
    try:
        try:
            raise RequestsApiError(f"{code} {text}", code)
        except RequestsApiError as error:
            raise IBMRuntimeError(f"Failed to run program: {error}") from None
    except IBMRuntimeError as error:
        return error


class Cloud:
    """IBM's side."""

    def __init__(self, seconds=3.0):
        self.jobs, self.seconds, self.options, self.calibration = [], seconds, [], "2026-01-01"
        self.faults = {}  # place -> exceptions to raise, one at a time; None lets one pass
        self.states = None  # what jobs answer, in turn; their last answer stays
        self.reason = None

    def fault(self, place):
        queue = self.faults.get(place)
        if queue and (error := queue.popleft()) is not None:
            raise error

    def plan(self, place, *errors):
        self.faults[place] = deque(errors)


class CloudJob:
    def __init__(self, cloud, job, tag):
        self.cloud, self._job, self.tag, self.cancelled = cloud, job, tag, False
        self._states = deque(cloud.states or ["DONE"])

    def job_id(self):
        return self._job.job_id()

    def status(self):
        self.cloud.fault("status")
        if self.cancelled:
            return "CANCELLED"
        return self._states.popleft() if len(self._states) > 1 else self._states[0]

    def result(self):
        self.cloud.fault("result")
        return self._job.result()

    def error_message(self):
        return self.cloud.reason

    def cancel(self):
        self.cloud.fault("cancel")
        self.cancelled = True


class StandIn(LocalService):
    local = False
    poll_seconds = 0.001

    def __init__(self, options, cloud, backend=NOISELESS):
        super().__init__(backend, options)
        self.cloud, self.calibration, self.seen = cloud, cloud.calibration, []

    def submit(self, pub, options):
        self.cloud.fault("submit")
        (tag,) = options["environment"]["job_tags"]
        for _ in range(self.cloud.faults.pop("copies", 1)):
            self.cloud.jobs.append(CloudJob(self.cloud, super().submit(pub, options), tag))
        self.cloud.options.append(options)
        self.cloud.fault("submitted")
        return self.cloud.jobs[-1]

    def job(self, job_id):
        self.cloud.fault("job")
        return next((job for job in self.cloud.jobs if job.job_id() == job_id), None)

    def find(self, tag):
        self.cloud.fault("find")
        return [job for job in self.cloud.jobs if job.tag == tag]

    def usage(self, job):
        self.cloud.fault("usage")
        return self.cloud.seconds

    def queue_position(self, job):
        return 7


def hurry(monkeypatch):
    """Wait for nothing between attempts."""
    monkeypatch.setattr(service, "BACKOFF_SECONDS", 1e-4)


def points(runner, tokens=2, seed=0):
    return runner.isa.gates.points(*angles_and_inputs(runner.ansatz, tokens, seed))


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
