"""The journal: what was submitted and what came back, so that a run that was stopped pays for nothing twice.

```
folder/lock                       held by the one process that uses the journal
folder/events.jsonl               one event a line, appended and synced: intent -> submitted -> done | failed | cancelled | lost
folder/circuits/TAG.safetensors   what a job was asked: angles (circuits, gates) in radians, and their hashes
folder/results/TAG.safetensors    what it answered: <Z> and standard errors, (circuits, n)
folder/made/NAME.json             how: transpiled circuit, layout, calibration, versions (see `provenance`); intents name it

Circuits that one circuit of the device held side by side (`pack`) are answered one by one.
```

An intent is on disk before its job is submitted, with the unique tag that the job carries: whenever the process dies, the job can
be found. Files are written beside their place and renamed, so they are whole or absent.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..errors import refusal
from ..files.durable import flush, put_in_place
from ..files.lock import InUse, Lock
from .entries import ENDED, OPEN, Entry, Session

LOG = logging.getLogger(__name__)
EVENTS = "events.jsonl"


class NotKept(OSError):
    """The journal cannot be written. What was submitted is found at the next start all the same.

    No ValueError, which the runner takes for results that are of no use.
    """


class Ledger:
    """What the events of a journal add up to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.sessions: dict[str, Session] = {}

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """Return that of a folder, which another process may be using and which need not exist; nothing is written.

        Raises:
            ValueError: if its events cannot be read.
        """
        ledger = cls(folder)
        ledger._replay(_lines(folder)[0])
        return ledger

    def open(self, local: bool) -> list[Entry]:
        """Return the jobs that have not ended, on simulated devices or on real ones."""
        return [entry for entry in self.entries.values() if entry.state in OPEN and entry.local == local]

    def under_way(self, local: bool) -> float:
        """Return the QPU seconds that the jobs which have not ended are estimated to use."""
        return sum(entry.estimate for entry in self.open(local))

    def unsettled(self) -> list[Entry]:
        """Return the jobs that have ended but whose usage is not known."""
        return [entry for entry in self.entries.values() if entry.state in ENDED and entry.qpu_seconds is None]

    def used(self, local: bool, session: str | None = None) -> float:
        """Return the QPU seconds charged so far: of ended jobs (estimates where IBM has not reported), and of sessions.

        Args:
            local: on simulated devices or on real ones.
            session: the one that is open now: it is counted by its jobs, not by its own bill. Other sessions whose bill is not
                known count with their whole reservation.
        """
        jobs = [entry for entry in self.entries.values() if entry.state in ENDED and entry.local == local]
        seconds = sum(
            entry.estimate if entry.qpu_seconds is None else entry.qpu_seconds
            for entry in jobs
            if entry.session in (None, session)  # else the session is billed
        )
        if not local:
            others = [row for name, row in self.sessions.items() if name != session]
            seconds += sum(row.reserved if row.qpu_seconds is None else row.qpu_seconds for row in others)
        return seconds

    def last_backend(self) -> str | None:
        """Return the real device that the last job was sent to."""
        names = [entry.backend for entry in self.entries.values() if not entry.local]
        return names[-1] if names else None

    def _replay(self, lines: list[bytes]) -> None:
        for number, line in enumerate(lines, 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                why = f"is damaged in line {number} of {EVENTS} ({_told(error)})"
                raise refusal("ibm.journal", str(self.folder), why, "that file as it was, or a new folder") from error

    def _apply(self, row: dict[str, Any]) -> None:
        row = dict(row)
        event = row.pop("event")
        if event == "session_opened":
            self.sessions[row["session"]] = Session(**row)
        elif event == "session_closed":
            self.sessions[row["session"]] = dataclasses.replace(self.sessions[row["session"]], **row)
        elif event == "intent":
            self.entries[row["tag"]] = Entry(state=event, **row)
        elif event in OPEN + ENDED:
            self.entries[row["tag"]] = dataclasses.replace(self.entries[row["tag"]], state=event, **row)
        else:
            raise ValueError(event)


class Journal(Ledger):
    """A journal, locked for this process.

    Raises:
        ValueError: if another process uses it, or its events cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._events = folder / EVENTS
        for part in ("circuits", "results", "made"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        try:
            self._lock = Lock(folder / "lock", "jobs on IBM Quantum")
        except InUse as error:
            why = f"is {error}; it may be submitting the same circuits"
            raise refusal("ibm.journal", str(folder), why, "wait for it to end, or another folder") from None
        self.jobs: dict[str, Any] = {}  # those of this process, by tag
        self._results: dict[tuple[str, bytes], tuple[np.ndarray, np.ndarray, int, str]] = {}  # <Z>, errors, place, tag
        try:
            self._begin(folder)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, folder: Path) -> None:
        for beside in folder.glob("*/*.tmp"):  # of a process that was stopped while it wrote
            beside.unlink()
        lines, rest = _lines(folder)
        if rest:
            LOG.warning(f"{self._events}: its last line is not complete and is left out.")
            with self._events.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines))
        self._replay(lines)
        self._file = os.open(self._events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        flush(folder)
        for entry in self.entries.values():
            if entry.state == "done" and not self._load(entry):
                entry.state = "submitted"  # to be fetched again

    def close(self) -> None:
        """Let another process use it."""
        os.close(self._file)
        self._lock.release()

    def record(self, event: str, **fields: Any) -> None:
        """Append an event; it is on disk when this returns."""
        row = {"event": event, "time": time.time(), **fields}
        line = json.dumps(row, sort_keys=True).encode() + b"\n"
        end = os.fstat(self._file).st_size
        with self._writing():
            try:
                if os.write(self._file, line) != len(line):
                    raise OSError("only a part of an event was written. Is the disk full?")
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, end)
                raise
        self._apply(row)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tell what a full disk costs: nothing, once there is room.

        Raises:
            NotKept: naming the journal.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise NotKept(
                f"qtha.ibm.journal: {str(self.folder)!r} cannot be written ({error}). Jobs that were submitted are kept in it, "
                "and fetched at the next start; nothing is paid twice. What works: room on that disk, then the same line again."
            ) from error

    def keep(self, name: str, made: dict[str, Any]) -> None:
        """Keep how circuits are made, once."""
        path = self.folder / "made" / f"{name}.json"
        if not path.is_file():
            text = json.dumps(made, sort_keys=True, indent=1)
            with self._writing():
                _put(path, lambda beside: beside.write_text(text))

    def ask(self, tag: str, hashes: np.ndarray, points: np.ndarray) -> None:
        """Keep what a job is asked: hashes (circuits, 16) and angles (circuits, gates)."""
        with self._writing():
            _write(self._path("circuits", tag), {"hashes": hashes, "points": points})

    def asked(self, tag: str) -> dict[str, np.ndarray]:
        """Return what a job was asked, `hashes` and `points`."""
        return load_file(self._path("circuits", tag))

    def answer(self, tag: str, values: np.ndarray, errors: np.ndarray) -> None:
        """Keep a job's results, (circuits, n)."""
        with self._writing():
            _write(self._path("results", tag), {"values": values, "errors": errors})
        self._load(self.entries[tag])

    def result(self, calibration: str, key: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        """Return <Z> (n) and standard errors (n) of a circuit by its hash, None if it has not been run."""
        found = self._results.get((calibration, key))
        return None if found is None else found[:2]

    def place(self, calibration: str, key: bytes) -> int:
        """Return which of the places of the device's circuit a circuit was run in; 0 where there is one, or it was not run."""
        found = self._results.get((calibration, key))
        return 0 if found is None else found[2]

    def source(self, calibration: str, key: bytes) -> str | None:
        """Return the tag of the job that a circuit's result is from."""
        found = self._results.get((calibration, key))
        return None if found is None else found[3]

    def adopt(self, tag: str, calibration: str) -> None:
        """Let a job's results answer for another calibration too: the device was calibrated while the job was under way."""
        self._load(self.entries[tag], calibration)

    def _path(self, part: str, tag: str) -> Path:
        return self.folder / part / f"{tag}.safetensors"

    def _load(self, entry: Entry, calibration: str | None = None) -> bool:
        try:
            hashes, result = self.asked(entry.tag)["hashes"], load_file(self._path("results", entry.tag))
        except (OSError, SafetensorError, KeyError):
            return False
        if not _fit(hashes, result, entry):
            return False
        where = entry.calibration if calibration is None else calibration
        for i, (key, values, errors) in enumerate(zip(hashes, result["values"], result["errors"], strict=True)):
            self._results[where, key.tobytes()] = values, errors, i % entry.pack, entry.tag
        return True


# The journals this process holds the locks of, for as long as it lives: circuits of several adapters share a folder and its cap.
_journals: dict[Path, Journal] = {}


def open_journal(folder: Path) -> Journal:
    """Return the journal of a folder; within a process there is one for each."""
    path = folder.resolve()
    if path not in _journals:
        _journals[path] = Journal(path)
    return _journals[path]


def _lines(folder: Path) -> tuple[list[bytes], bytes]:
    """Return a journal's events, and the part of one that was being written when its process was stopped: it has not happened."""
    path = folder / EVENTS
    *lines, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    return lines, rest


def _told(error: Exception) -> str:
    """Return what is wrong with a line, without its values."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    return type(error).__name__


def _fit(hashes: np.ndarray, result: dict[str, np.ndarray], entry: Entry) -> bool:
    """Return whether a file of results can be those of a job."""
    values, errors = (result.get(name, np.empty(0)) for name in ("values", "errors"))
    whole = values.ndim == 2 and values.shape == errors.shape and len(values) == len(hashes) <= entry.circuits * entry.pack
    return whole and all(part.dtype.kind == "f" and bool(np.isfinite(part).all()) for part in (values, errors))


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    _put(path, lambda beside: save_file(arrays, beside))


def _put(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file be written as a whole or not at all."""
    beside = path.with_suffix(".tmp")
    try:
        write(beside)
        put_in_place(beside, path)
    except (OSError, SafetensorError):
        beside.unlink(missing_ok=True)
        raise
    flush(path.parent)
