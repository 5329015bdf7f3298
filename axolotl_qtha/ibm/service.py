"""The door to IBM Quantum: the device, submitting and finding jobs. A fake device takes the same, in the runtime's local mode.

Credentials come from the account that qiskit-ibm-runtime has saved, or from QISKIT_IBM_TOKEN, and are never touched here.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..circuit.noise import device
from ..errors import Hidden, alternatives, refusal
from .cost import MAX_EXECUTIONS
from .options import IBMOptions

if TYPE_CHECKING:
    from qiskit.providers import BackendV2

LOG = logging.getLogger(__name__)
T = TypeVar("T")
ATTEMPTS = 6
BACKOFF_SECONDS = 2.0  # doubles with each attempt: a minute in all
FINAL = ("DONE", "ERROR", "CANCELLED")
UNCHECKED = (
    "%s is simulated here, in qiskit-ibm-runtime's local mode. What this does not exercise: the queue, QPU usage, batches and "
    "sessions, resilience_level, dynamical_decoupling and twirling."
)
ACCOUNT = (
    "`QiskitRuntimeService.save_account(token=..., instance=...)` once, in Python, or the environment variable QISKIT_IBM_TOKEN; "
    "`backend: fake:manila` needs none"
)
FAKES = "`least_busy`, the name of a device, or `fake:` and one, e.g. `fake:manila`"


class LocalService:
    """A simulated device. Jobs live as long as this process."""

    local = True
    poll_seconds = 0.02

    def __init__(self, backend: BackendV2, options: IBMOptions) -> None:
        self.backend, self.options = backend, options
        self.name = str(backend.name)
        self.calibration = _calibration(backend)
        self.session: Any = None

    def start(self, seconds: int | None) -> str | None:
        """Open what `mode` says, if it is not; return the id of a session that was opened and is billed as one."""
        return None

    def stop(self) -> float | None:
        """Close it; return the seconds a session was billed, None if that is not known."""
        return None

    def submit(self, pub: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Submit one PUB with EstimatorV2 and return the job."""
        from qiskit_ibm_runtime import EstimatorV2

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no effect in local testing mode")  # said once, see UNCHECKED
            return EstimatorV2(mode=self.session or self.backend, options=options).run([pub])

    def job(self, job_id: str) -> Any:
        """Return a job by its id, None if there is none."""
        return None

    def find(self, tag: str) -> list[Any]:
        """Return the jobs that carry a tag, the first submitted first."""
        return []

    def usage(self, job: Any) -> float | None:
        """Return the QPU seconds a job was billed, None as long as that is not known."""
        return float(job.usage())

    def queue_position(self, job: Any) -> int | None:
        """Return a job's place in the queue, None if that is not known."""
        return None


class RuntimeService(LocalService):
    """A device of IBM Quantum."""

    local = False
    poll_seconds = 5.0

    def __init__(self, service: Any, backend: Any, options: IBMOptions) -> None:
        super().__init__(backend, options)
        self.service = service

    def start(self, seconds: int | None) -> str | None:
        """Open the batch or session, if it is not open; return the id of a session that was opened."""
        from qiskit_ibm_runtime import Batch, Session
        from qiskit_ibm_runtime.exceptions import IBMError

        if self.session is not None or self.options.mode == "job":
            return None
        if self.options.mode == "batch":
            self.session = Batch(self.backend)
            return None
        try:
            self.session = Session(self.backend, max_time=seconds)
        except IBMError as error:
            if is_transient(error):
                raise
            raise refusal("ibm.mode", "session", f"is refused by IBM: {error}", "`mode: batch`, which any plan has") from error
        return str(self.session.session_id)

    def stop(self) -> float | None:
        """Close it; return the seconds a session was billed."""
        session, self.session = self.session, None
        if session is None:
            return None
        session.close()
        return None if (seconds := session.usage()) is None else float(seconds)

    def job(self, job_id: str) -> Any:
        """Return a job by its id, None if there is none."""
        from qiskit_ibm_runtime.exceptions import RuntimeJobNotFound

        try:
            return self.service.job(job_id)
        except RuntimeJobNotFound:
            return None

    def find(self, tag: str) -> list[Any]:
        """Return the jobs that carry a tag, the first submitted first."""
        return list(self.service.jobs(limit=None, job_tags=[tag], descending=False))

    def usage(self, job: Any) -> float | None:
        """Return the QPU seconds a job was billed, None as long as IBM has not settled them."""
        usage = job.metrics().get("usage") or {}
        if usage.get("status", "pending") == "pending":
            return None
        seconds = usage.get("qpu_charge_time_seconds", usage.get("quantum_seconds"))
        return None if seconds is None else float(seconds)

    def queue_position(self, job: Any) -> int | None:
        """Return a job's place in the queue, None if IBM does not say."""
        position = job.metrics().get("position_in_queue")
        return None if position is None else int(position)


def state(job: Any) -> str:
    """Return a job's state: QUEUED, RUNNING, DONE, ERROR, CANCELLED, ... Local jobs have an enumeration of the same names."""
    status = job.status()
    return str(getattr(status, "name", status))


def status_code(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, -1 for no answer at all, None if it has nothing to do with a request."""
    from qiskit_ibm_runtime.api.exceptions import RequestsApiError

    while error is not None:
        if isinstance(error, RequestsApiError):
            return error.status_code  # also -1 for 503, maintenance
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may work later: no answer, a time-out, too many requests, or a fault of the server."""
    from qiskit_ibm_runtime.exceptions import RuntimeJobTimeoutError
    from requests.exceptions import ConnectionError, RequestException, Timeout

    if isinstance(error, (RuntimeJobTimeoutError, ConnectionError, Timeout)):
        return True
    code = status_code(error)
    if code is None and isinstance(error, RequestException) and error.response is not None:
        code = error.response.status_code
    return code is not None and (code in (-1, 408, 425, 429) or code >= 500)


def unanswered(error: BaseException | None) -> bool:
    """Whether what is behind an error is a request without an answer, or with a fault of the server as its answer."""
    from requests.exceptions import ConnectionError, Timeout

    while error is not None:
        code = getattr(error, "status_code", None)
        if isinstance(error, (ConnectionError, Timeout)) or (isinstance(code, int) and code >= 500):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_refused(error: BaseException) -> bool:
    """Whether the server has said no, so that nothing was submitted."""
    code = status_code(error)
    return code is not None and 400 <= code < 500 and not is_transient(error)


def backoff(attempt: int) -> float:
    """Return how many seconds to wait after a failed attempt, the first being 0."""
    return BACKOFF_SECONDS * 2.0**attempt


def retry(call: Callable[..., T], *arguments: Any) -> T:
    """Return what a request returns that may safely be repeated, asking again while the network or IBM fails."""
    for attempt in range(ATTEMPTS):
        try:
            return call(*arguments)
        except Exception as error:
            if not is_transient(error) or attempt + 1 == ATTEMPTS:
                raise
            LOG.warning(f"IBM Quantum does not answer ({error}); asking again in {backoff(attempt):g} s.")
            time.sleep(backoff(attempt))
    raise AssertionError


def connect(options: IBMOptions, qubits: int, preferred: str | None = None) -> LocalService:
    """Return the device that the options name.

    Args:
        options: the `ibm:` block.
        qubits: how many it needs.
        preferred: what `least_busy` stands for, if that was settled before.

    Raises:
        ValueError: naming the key, if there is no account, instance or device, or it is too small.
    """
    if options.is_fake:
        LOG.info(UNCHECKED, options.backend)
        backend = device(options.backend, qubits, "ibm.backend", FAKES)
        service = LocalService(backend, options)
    else:
        runtime = _account(options)
        backend = _backend(runtime, options, qubits, preferred)
        service = RuntimeService(runtime, backend, options)
    most = min(MAX_EXECUTIONS, getattr(backend, "max_shots", None) or MAX_EXECUTIONS)
    if options.executions > most:
        key = "shots" if options.precision is None else "precision"
        works = f"`{key}: {most}`" if key == "shots" else f"`precision: {most**-0.5:.1g}` or more"
        value = getattr(options, key)
        raise refusal(f"ibm.{key}", value, f"is {options.executions:,} shots, {service.name} takes {most:,} at most", works)
    return service


def _account(options: IBMOptions) -> Any:
    """Return the runtime's service. What IBM's errors say is not passed on where it may hold the token."""
    try:
        from qiskit_ibm_runtime import QiskitRuntimeService
        from qiskit_ibm_runtime.accounts.exceptions import AccountsError
        from qiskit_ibm_runtime.exceptions import IBMInputValueError, IBMNotAuthorizedError
    except ImportError as error:
        raise refusal("quantum_backend", "ibm", "needs qiskit-ibm-runtime", '`pip install "axolotl-qtha[ibm]"`') from error
    instance = None if options.instance is None else options.instance.get_secret_value()
    try:
        return QiskitRuntimeService(instance=instance)
    except AccountsError as error:
        if unanswered(error):
            works = "start again when the network and https://quantum.cloud.ibm.com work; nothing was submitted"
            raise refusal("quantum_backend", "ibm", "gets no answer from IBM's servers to sign in", works) from None
        why = f"finds no account of IBM Quantum that works ({type(error).__name__})"
        raise refusal("quantum_backend", "ibm", why, ACCOUNT) from None
    except IBMNotAuthorizedError:
        raise refusal("quantum_backend", "ibm", "is not authorised: IBM does not take the token", ACCOUNT) from None
    except IBMInputValueError:
        why = "is not an instance of the account" if instance else "finds no instance saved with the account that it may use"
        works = "an instance's name or CRN from https://quantum.cloud.ibm.com/instances"
        raise refusal("ibm.instance", "(not shown)" if instance else None, why, works) from None


def _backend(runtime: Any, options: IBMOptions, qubits: int, preferred: str | None) -> Any:
    from qiskit.providers.exceptions import QiskitBackendNotFoundError

    name = options.backend
    if name == "least_busy":
        if preferred is None:
            try:
                return retry(partial(runtime.least_busy, min_num_qubits=qubits, operational=True, simulator=False))
            except QiskitBackendNotFoundError:
                why = f"finds no device of {qubits} qubits in operation in this instance"
                raise refusal("ibm.backend", name, why, "another instance, or `backend: fake:torino`") from None
        name = preferred
    try:
        backend = retry(runtime.backend, name)
    except QiskitBackendNotFoundError:
        backend = None
    if backend is None:
        names = [str(other.name) for other in retry(runtime.backends)]
        works = alternatives(name, names) or "another instance, since this one has none"
        raise refusal("ibm.backend", Hidden(name), "is no device of this instance", works)
    if backend.num_qubits < qubits:
        why = f"has {backend.num_qubits} qubits, the circuit {qubits}"
        works = f"`qubits:` a divisor of the rank up to {backend.num_qubits}, or `backend: least_busy`"
        raise refusal("ibm.backend", name, why, works)
    if not retry(backend.status).operational:
        works = "wait, or `backend: least_busy` with a new journal" if preferred else "wait, or `backend: least_busy`"
        raise refusal("ibm.backend", name, "is not in operation now", works)
    return backend


def _calibration(backend: BackendV2) -> str:
    """Return the date of a device's last calibration, `none` if it has none."""
    properties = getattr(backend, "properties", None)
    found = properties() if callable(properties) else None
    return found.last_update_date.isoformat() if found is not None else "none"
