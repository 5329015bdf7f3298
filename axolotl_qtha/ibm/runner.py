"""Runs circuits through the journal: nothing above the cap, nothing twice, nothing lost.

Before a job is submitted its intent is in the journal. A submission that fails is repeated only after IBM has been asked for the
job's tag. IBM itself stops a job at its share of what is left of `max_qpu_seconds` (`max_execution_time`), however wrong the
estimate.
"""

from __future__ import annotations

import hashlib
import logging
import math
import uuid
from functools import cached_property
from typing import Any

import numpy as np

from ..circuit.ansatz import Ansatz
from ..errors import refusal
from .circuits import ISACircuit, estimator_options
from .cost import Cost, rate
from .draws import Draws, job_seed
from .jobs import JobFailed, Jobs
from .journal import Journal
from .options import IBMOptions
from .provenance import name_of, provenance
from .service import ATTEMPTS, LocalService, is_refused, is_transient, retry

LOG = logging.getLogger(__name__)
LONGEST_JOB = 10_800  # seconds, IBM's own limit: https://quantum.cloud.ibm.com/docs/guides/max-execution-time


class Runner(Jobs):
    """One circuit on one device."""

    def __init__(self, ansatz: Ansatz, options: IBMOptions, service: LocalService, journal: Journal, seed: int = 0) -> None:
        """Transpile the circuit, and pick up the jobs of an earlier run.

        Args:
            ansatz: the circuit.
            options: how to run it.
            service: the device.
            journal: where jobs and results are kept.
            seed: of the shots of a simulated device.
        """
        super().__init__(options, service, journal)
        self.ansatz, self.seed = ansatz, seed
        self.adapter: str | None = None  # SHA-256 of the weights whose circuits these are, where that is known
        self.answered: set[str] = set()  # tags of the jobs that results were from
        self.isa = ISACircuit(ansatz, service.backend, options)
        self.rate = rate(self.isa, options, service.backend)
        # What makes a result, besides the angles. Not the transpiled circuit: it changes with the calibration.
        context = {"circuit": repr(ansatz), "backend": service.name, "local": service.local, **options.measurement()}
        if self.isa.pack > 1:  # on other qubits, with neighbours: another measurement
            context["pack"] = self.isa.pack
        if service.local:
            context["seed"] = seed
        self.draws = Draws(context)
        self._recover()
        self._settle()

    def expectations(self, points: np.ndarray, keys: list[bytes] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return <Z_i> and their standard errors, (circuits, n).

        Circuits that were run before are answered from the journal, those under way are waited for, the others are submitted.

        Args:
            points: gate angles (circuits, gates) in radians.
            keys: which draws they are, of `draws`; None: those of a call by itself.

        Raises:
            ValueError: if they cost more than is left of max_qpu_seconds; nothing was submitted then.
            JobFailed: if a job failed, with IBM's reason.
        """
        points = np.ascontiguousarray(points, dtype=np.float64)
        keys = self.draws.keys(points) if keys is None else keys
        calibration = self.service.calibration
        new = {key: row for key, row in zip(keys, points, strict=True) if self.journal.result(calibration, key) is None}
        with self._interruptible():
            self._recover()
            under_way = set()
            for entry in self.journal.open(self.service.local) if new else []:
                found = {key.tobytes() for key in self.journal.asked(entry.tag)["hashes"]} & new.keys()
                if found:
                    under_way.add(entry.tag)
                    new = {key: row for key, row in new.items() if key not in found}
            try:
                self._wait(under_way | set(self._submit_all(list(new), list(new.values()))))
            finally:
                if self.options.mode == "batch":  # IBM closes one that idles
                    self.close()
        for tag in under_way:
            self.journal.adopt(tag, calibration)
        self.answered |= {tag for tag in (self.journal.source(calibration, key) for key in keys) if tag}
        results = [self.journal.result(calibration, key) for key in keys]
        values = np.array([result[0] for result in results if result is not None]).reshape(len(points), self.ansatz.width)
        errors = np.array([result[1] for result in results if result is not None]).reshape(values.shape)
        return values, errors

    def places(self, points: np.ndarray, keys: list[bytes] | None = None) -> np.ndarray:
        """Return which of `isa.places` each of these circuits was run in, (circuits)."""
        keys = self.draws.keys(points) if keys is None else keys
        return np.array([self.journal.place(self.service.calibration, key) for key in keys], dtype=int)

    @cached_property
    def made(self) -> dict[str, Any]:
        """How results come about, see `provenance`."""
        return provenance(self.isa, self.service, self.options)

    def cost(self, blocks: int) -> Cost:
        """Return what this many circuits cost, `pack` of them in one of the device's."""
        return self.rate.cost(blocks)

    def remaining(self) -> float:
        """Return the QPU seconds that are left: the cap, less what ended jobs used, less the estimates of those under way."""
        cap = self.options.max_qpu_seconds
        if cap is None:
            return math.inf
        return cap - self.used() - self.journal.under_way(self.service.local)

    def used(self) -> float:
        """Return the QPU seconds that ended jobs were billed, estimated as long as that is not known."""
        return self.journal.used(self.service.local, getattr(self.service.session, "session_id", None))

    def close(self) -> None:
        """Close the batch or session."""
        session, seconds = self.service.session, self.service.stop()
        opened = getattr(session, "session_id", None)
        if opened in self.journal.sessions:
            self.journal.record("session_closed", session=opened, qpu_seconds=seconds)

    # Submitting.

    def _submit_all(self, keys: list[bytes], rows: list[np.ndarray]) -> list[str]:
        """Submit circuits in as few jobs as the limits allow, and return their tags."""
        size = self.rate.circuits_per_job * self.isa.pack
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        costs = [self.rate.cost(len(rows[part])) for part in parts]  # a job each
        shares = self._check_cap(costs) if parts else []
        if len(parts) > 1 or (parts and self.options.mode == "session"):
            self._open(sum(share or 0 for share in shares))
        return [
            self._submit(keys[part], np.stack(rows[part]), cost, share)
            for part, cost, share in zip(parts, costs, shares, strict=True)
        ]

    def _check_cap(self, costs: list[Cost]) -> list[int | None]:
        """Return for each job the QPU seconds after which IBM is to stop it."""
        cap, needed = self.options.max_qpu_seconds, sum(cost.qpu_seconds for cost in costs)
        if cap is None:
            return [None] * len(costs)
        if needed > (left := self.remaining()):
            used, waiting = self.used(), len(self.journal.open(self.service.local))
            circuits = sum(cost.circuits for cost in costs)
            raise refusal(
                "ibm.max_qpu_seconds",
                cap,
                f"leaves {max(left, 0):,.1f} s ({used:,.1f} s are used, {cap - used - left:,.1f} s go to {waiting} jobs under "
                f"way), and {circuits:,} circuits need about {needed:,.1f} s: {needed - left:,.1f} s too many",
                f"`max_qpu_seconds: {math.ceil(cap + needed - left)}` for these alone; `axolotl qtha-estimate` counts the run's",
            )
        # IBM may let each job run up to its reserve, so the cap is shared out by reserves, not by estimates.
        entries = self.journal.open(self.service.local)
        free = cap - self.used() - sum(entry.reserved for entry in entries)
        if free < needed:
            self._wait({entry.tag for entry in entries})
            return self._check_cap(costs)
        return [max(1, min(LONGEST_JOB, int(free * cost.qpu_seconds / needed))) for cost in costs]

    def _submit(self, keys: list[bytes], points: np.ndarray, cost: Cost, share: int | None) -> str:
        service, journal, tag = self.service, self.journal, f"qtha-{uuid.uuid4().hex}"
        journal.ask(tag, np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16), points)
        session = getattr(service.session, "session_id", None)
        made, seed = name_of(self.made), job_seed(self.seed, keys) if service.local else None
        journal.keep(made, self.made)
        journal.record(
            "intent",
            tag=tag,
            local=service.local,
            backend=service.name,
            calibration=service.calibration,
            circuit=self.isa.digest,
            angles=hashlib.blake2b(points.tobytes(), digest_size=16).hexdigest(),
            circuits=cost.circuits,
            pack=self.isa.pack,
            estimate=cost.qpu_seconds,
            reserved=cost.qpu_seconds if share is None else share,
            options=self.options.measurement(),
            made=made,
            seed=seed,
            adapter=self.adapter,
            session=session if session in journal.sessions else None,
        )
        options = estimator_options(self.options, tag, share)
        if seed is not None:
            options["simulator"] = {"seed_simulator": seed}
        for attempt in range(ATTEMPTS):
            try:
                job = service.submit(self.isa.pub(points), options)
                break
            except Exception as error:
                if is_refused(error):
                    journal.record("failed", tag=tag, qpu_seconds=0.0, reason=str(error))
                    advice = " What works on every plan: `mode: batch`." if self.options.mode == "session" else ""
                    raise JobFailed(f"{service.name} takes no job: {error}{advice}") from error
                if not is_transient(error):
                    raise  # whether it was submitted is not known: the next start looks
                LOG.warning(f"submitting to {service.name} failed ({error}); is the job there?")
                if found := self._find(tag, attempt):
                    job = found[0]
                    break
        else:
            raise JobFailed(
                f"{service.name} does not answer: a job of {cost.circuits:,} circuits may be submitted or not. Start again."
            )
        self._adopt_job(tag, job)
        if not service.local:
            self._cancel_copies(tag, job)
        return tag

    def _open(self, seconds: int) -> None:
        """Open the batch or session, if it is not. IBM ends a session after what is left of the cap."""
        if self.service.session is not None:
            return
        left = self.remaining()
        reserved = None if math.isinf(left) else max(1, int(left))
        if (opened := retry(self.service.start, reserved)) is not None:
            self.journal.record("session_opened", session=opened, reserved=reserved or seconds)
