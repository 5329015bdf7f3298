"""One owner of a folder: a file that is locked by the process that uses the folder, and that tells which one it is.

The lock is the operating system's (`flock`): it is gone when its process is, however that ended, and machines that share a disk
by NFS see each other's. Where a file system does not do so, the owner's sign of life decides: it touches the file every `BEAT`
seconds, and who comes second looks for `WATCH` seconds whether that goes on. Clocks of two machines are never compared.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import socket
import threading
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path

LOG = logging.getLogger(__name__)
BEAT, WATCH = 10.0, 35.0  # seconds


class InUse(RuntimeError):
    """Another process uses the folder; its text says which, where and since when."""


class Lock:
    """A lock that this process holds until `release`, or until it ends."""

    def __init__(self, path: Path, purpose: str) -> None:
        """Take it, at once or not at all; of an owner on another machine whose lock cannot be seen, after `WATCH` seconds.

        Args:
            path: the file; its folder is there.
            purpose: what the folder is used for, as others are to read it.

        Raises:
            InUse: naming the owner.
            OSError: if the file cannot be written.
        """
        self.path = path
        self._file = self._locked(path)
        try:
            self._look_for_others()
            self._write(purpose)
        except BaseException:
            os.close(self._file)
            raise
        _held.add(self)
        self._ended = threading.Event()
        threading.Thread(target=_beat, args=(self._file, self._ended), daemon=True, name=f"owner of {path}").start()

    def release(self) -> None:
        """Let others use the folder. The file goes first: who has opened it by then finds another one, or none, in its place."""
        if self in _held:
            _held.discard(self)
            self._ended.set()
            self.path.unlink(missing_ok=True)
            os.close(self._file)

    def forget(self) -> None:
        """Have a forked process not hold on to its parent's lock, which it would do after the parent's death."""
        os.close(self._file)

    def _locked(self, path: Path) -> int:
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._seen = True
            except BlockingIOError:
                text = _read(file)
                os.close(file)
                raise InUse(_told(text)) from None
            except OSError as error:  # no locks on this file system
                LOG.warning(f"{path}: {error.strerror}: two starts within seconds could miss each other here.")
                self._seen = False
            if _is_at(file, path):
                return file
            os.close(file)  # its owner released it in between

    def _look_for_others(self) -> None:
        """Wait for a sign of life of an owner whose lock would not be seen from here."""
        text = _read(self._file)
        if not text:
            return
        here = _owner(text).get("host") == socket.gethostname()
        if not (here and self._seen):
            LOG.warning(f"{self.path} is {_told(text)}. Its lock is not seen from here: waiting {WATCH:g} s for a sign of life.")
            before, end = self._touched(), time.monotonic() + WATCH
            while time.monotonic() < end:
                time.sleep(min(1.0, WATCH / 5))
                if self._touched() != before:
                    raise InUse(_told(text))
        LOG.warning(f"{self.path} was left {_told(text)}, which has ended: it is taken over.")

    def _touched(self) -> int:
        """Return when the file was touched, in ns by its owner's clock; opened anew, as NFS asks the server then only."""
        file = os.open(self.path, os.O_RDONLY)
        try:
            return os.fstat(file).st_mtime_ns
        finally:
            os.close(file)

    def _write(self, purpose: str) -> None:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": since, "purpose": purpose}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(owner).encode(), 0)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()
    _held.clear()


def _release_all() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_release_all)


def _beat(file: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        try:
            os.utime(file)
        except OSError:  # released, or a disk that is gone: its own errors tell
            return


def _read(file: int) -> str:
    return os.pread(file, 4096, 0).decode(errors="replace")


def _owner(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _told(text: str) -> str:
    """Return whose a lock is, in words."""
    owner = _owner(text)
    if not {"process", "host", "since", "purpose"} <= owner.keys():
        return "in use by a process that does not say who it is"
    return "in use by process {process} on {host} since {since} (by its clock), for {purpose}".format_map(owner)


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
