"""Runs circuits through the journal: nothing above the cap, nothing twice, nothing lost.

Before a job is submitted its intent is in the journal. A submission that fails is repeated only after IBM has been asked for the
job's tag. IBM itself stops a job at its share of what is left of `max_qpu_seconds` (`max_execution_time`), however wrong the
estimate.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import click
import numpy as np

from ..circuit.ansatz import Ansatz
from ..errors import refusal
from .circuits import ISACircuit, estimator_options
from .cost import Cost, rate
from .journal import Entry, Journal
from .options import IBMOptions
from .progress import progress
from .service import ATTEMPTS, FINAL, LocalService, backoff, is_refused, is_transient, retry, state

LOG = logging.getLogger(__name__)
LONGEST_JOB = 10_800  # seconds, IBM's own limit: https://quantum.cloud.ibm.com/docs/guides/max-execution-time


class JobFailed(RuntimeError):
    """Jobs failed, were cancelled, or did not end in time."""


class Runner:
    """One circuit on one device."""

    def __init__(self, ansatz: Ansatz, options: IBMOptions, service: LocalService, journal: Journal) -> None:
        """Transpile the circuit, and pick up the jobs of an earlier run.

        Args:
            ansatz: the circuit.
            options: how to run it.
            service: the device.
            journal: where jobs and results are kept.
        """
        self.ansatz, self.options, self.service, self.journal = ansatz, options, service, journal
        self.isa = ISACircuit(ansatz, service.backend, options)
        self.rate = rate(self.isa, options, service.backend)
        # What makes a result, besides the angles. Not the transpiled circuit: it changes with the calibration.
        context = {"circuit": repr(ansatz), "backend": service.name, "local": service.local, **options.measurement()}
        if self.isa.pack > 1:  # on other qubits, with neighbours: another measurement
            context["pack"] = self.isa.pack
        self._key = hashlib.blake2b(json.dumps(context, sort_keys=True).encode(), digest_size=32).digest()
        self._recover()
        self._settle()

    def expectations(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return <Z_i> and their standard errors, (circuits, n), of circuits with these gate angles (circuits, gates) in radians.

        Circuits that were run before are answered from the journal, those under way are waited for, the others are submitted.

        Raises:
            ValueError: if they cost more than is left of max_qpu_seconds; nothing was submitted then.
            JobFailed: if a job failed, with IBM's reason.
        """
        points = np.ascontiguousarray(points, dtype=np.float64)
        keys = self._keys(points)
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
        results = [self.journal.result(calibration, key) for key in keys]
        values = np.array([result[0] for result in results if result is not None]).reshape(len(points), self.ansatz.width)
        errors = np.array([result[1] for result in results if result is not None]).reshape(values.shape)
        return values, errors

    def places(self, points: np.ndarray) -> np.ndarray:
        """Return which of `isa.places` each of these circuits was run in, (circuits)."""
        return np.array([self.journal.place(self.service.calibration, key) for key in self._keys(points)], dtype=int)

    def _keys(self, points: np.ndarray) -> list[bytes]:
        return [hashlib.blake2b(row.tobytes(), digest_size=16, key=self._key).digest() for row in points]

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
            session=session if session in journal.sessions else None,
        )
        options = estimator_options(self.options, tag, share)
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

    def _adopt_job(self, tag: str, job: Any) -> None:
        self.journal.record("submitted", tag=tag, job_id=str(job.job_id()))
        self.journal.jobs[tag] = job

    def _find(self, tag: str, attempt: int) -> list[Any]:
        """Return the jobs with a tag, asked for twice: a list may lag behind."""
        for wait in (1, 2):
            time.sleep(wait * backoff(attempt) / 3)
            if found := retry(self.service.find, tag):
                return found
        return []

    def _cancel_copies(self, tag: str, job: Any) -> None:
        """Cancel other jobs of the same tag: the runtime itself repeats a request that got no answer."""
        try:
            copies = [other for other in retry(self.service.find, tag) if other.job_id() != job.job_id()]
        except Exception as error:
            if not is_transient(error):
                raise
            return
        for copy in copies:
            LOG.warning(f"job {copy.job_id()} was submitted twice, as {job.job_id()}: it is cancelled.")
            with contextlib.suppress(Exception):
                copy.cancel()

    # Waiting.

    def _recover(self) -> None:
        """Find the jobs that an earlier process, or a call that failed, left under way."""
        job: Any
        for entry in self.journal.open(self.service.local):
            if entry.tag in self.journal.jobs:
                continue
            if entry.job_id is not None:
                job = retry(self.service.job, entry.job_id)
            else:
                recent = time.time() - entry.time < 60
                found = [] if self.service.local else self._find(entry.tag, 3 if recent else 0)
                job = found[0] if found else None
            if job is None:
                seconds = 0.0 if entry.local or entry.job_id is None else entry.estimate
                self.journal.record("lost", tag=entry.tag, qpu_seconds=seconds, reason="not found")
                continue
            LOG.info(f"job {job.job_id()} is under way and picked up: {entry.circuits:,} circuits on {entry.backend}.")
            self._adopt_job(entry.tag, job)
            if entry.job_id is None:
                self._cancel_copies(entry.tag, job)

    def _settle(self) -> None:
        """Ask for the usage that was not known when jobs ended."""
        for entry in self.journal.unsettled() if not self.service.local else []:
            job = retry(self.service.job, entry.job_id) if entry.job_id else None
            if job is not None and (settled := retry(self.service.usage, job)) is not None:
                self.journal.record(entry.state, tag=entry.tag, qpu_seconds=settled)

    def _wait(self, tags: set[str]) -> None:
        """Wait until jobs have ended, and keep their results; those that are done are kept whatever becomes of the others."""
        failures, start, left = list[str](), time.monotonic(), set(tags)
        with progress(self.service, self.journal.jobs) as show:
            while left:
                states = {tag: retry(state, self.journal.jobs[tag]) for tag in left}
                for tag, now in states.items():
                    if now in FINAL:
                        left.discard(tag)
                        failures += self._finish(tag, now)
                if not left:
                    break
                elapsed = time.monotonic() - start
                if elapsed > self.options.timeout_seconds:
                    self._cancel(left)
                    failures.append(f"{len(left)} jobs had not ended after timeout_seconds: {self.options.timeout_seconds:g}")
                    break
                show(states, elapsed)
                time.sleep(min(self.service.poll_seconds, self.options.timeout_seconds))
        if failures:
            raise JobFailed(f"{self.service.name}: {'; '.join(failures)}. What was done is kept in {self.journal.folder}.")

    def _finish(self, tag: str, now: str) -> list[str]:
        """Keep what a job that has ended left behind, and return what went wrong."""
        entry, job = self.journal.entries[tag], self.journal.jobs[tag]
        if now == "DONE":
            try:
                self._keep(entry, retry(job.result)[0].data)
                event, reason = "done", None
            except (ValueError, TypeError) as error:
                event, reason = "failed", f"its results are of no use: {error}"
        else:
            event, reason = ("failed" if now == "ERROR" else "cancelled"), self._reason(job)
        seconds = retry(self.service.usage, job)
        self.journal.record(event, tag=tag, qpu_seconds=seconds, reason=reason)
        return [] if event == "done" else [f"job {entry.job_id} {'failed' if event == 'failed' else 'was cancelled'} ({reason})"]

    def _keep(self, entry: Entry, data: Any) -> None:
        asked, shape = len(self.journal.asked(entry.tag)["hashes"]), (entry.circuits * entry.pack, -1)
        values, errors = (np.asarray(array, dtype=np.float64).reshape(shape)[:asked] for array in (data.evs, data.stds))
        if not np.isfinite(values).all():
            raise ValueError("<Z> is not finite")
        self.journal.answer(entry.tag, values, errors)

    def _reason(self, job: Any) -> str:
        try:
            if reason := job.error_message():
                return str(reason).strip()
            job.result()
        except Exception as error:  # a local job says it only so
            return f"{type(error).__name__}: {error}"
        return "no reason given"

    def _cancel(self, tags: set[str]) -> None:
        """Cancel jobs; one that has ended meanwhile keeps its results."""
        for tag in tags:
            job = self.journal.jobs[tag]
            try:
                retry(job.cancel)
            except Exception as error:
                LOG.warning(f"job {job.job_id()} could not be cancelled: {error}")
            now = retry(state, job)
            if now in FINAL:
                self._finish(tag, now)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C raises the first; in a training its own handler the second
            for entry in self.journal.open(self.service.local):  # stopped between the submission and its record
                if entry.job_id is None and (found := self._find(entry.tag, 0)):
                    self._adopt_job(entry.tag, found[0])
            tags = {entry.tag for entry in self.journal.open(self.service.local) if entry.tag in self.journal.jobs}
            question = f"Cancel {len(tags)} jobs under way on {self.service.name}? If not, the next start picks them up."
            with contextlib.suppress(click.Abort):  # Ctrl-C again: they are left
                if tags and (not sys.stdin.isatty() or click.confirm(question, default=True)):
                    self._cancel(tags)
            raise
