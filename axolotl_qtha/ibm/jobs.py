"""Jobs under way: found again by their tags, waited for, and what they left behind kept in the journal."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import click
import numpy as np

from .entries import Entry
from .journal import Journal
from .options import IBMOptions
from .progress import progress
from .provenance import told
from .service import FINAL, LocalService, backoff, is_transient, retry, state

LOG = logging.getLogger(__name__)


class JobFailed(RuntimeError):
    """Jobs failed, were cancelled, or did not end in time."""


class Jobs:
    """The jobs of a journal on one device."""

    def __init__(self, options: IBMOptions, service: LocalService, journal: Journal) -> None:
        self.options, self.service, self.journal = options, service, journal

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
        entry, job, found = self.journal.entries[tag], self.journal.jobs[tag], None
        if now == "DONE":
            try:
                result = retry(job.result)
                self._keep(entry, result[0].data)
                event, reason = "done", None
                found = told({"job": getattr(result, "metadata", None), "pub": getattr(result[0], "metadata", None)})
            except (ValueError, TypeError) as error:
                event, reason = "failed", f"its results are of no use: {error}"
        else:
            event, reason = ("failed" if now == "ERROR" else "cancelled"), self._reason(job)
        seconds = retry(self.service.usage, job)
        self.journal.record(event, tag=tag, qpu_seconds=seconds, reason=reason, metadata=found)
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
