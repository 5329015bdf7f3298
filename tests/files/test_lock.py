"""A lock has one owner, tells who it is, and goes with its process; where locks cannot be seen, a sign of life decides."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from axolotl_qtha.files import durable, lock
from axolotl_qtha.files.durable import flush, why_unsafe
from axolotl_qtha.files.lock import InUse, Lock

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "in-use"


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "WATCH", 1.0)


def hold(path, ready, seconds=600):
    """Hold it in a process of its own."""
    Lock(path, "a training")
    ready.set()
    time.sleep(seconds)


@pytest.fixture
def other(path):
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(path, ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def owned_by(path, host="elsewhere", **changes):
    """Write a lock as a process on another machine does whose flock is not seen here."""
    path.write_text(
        json.dumps({"process": 7, "host": host, "since": "2031-01-01T00:00:00+00:00", "purpose": "a test", **changes})
    )


def test_a_second_one_is_told_whose_it_is(path, other):
    before = path.read_bytes()
    with pytest.raises(
        InUse, match=rf"in use by process {other.pid} on {socket.gethostname()} since 20.* \(by its clock\), for a training"
    ):
        Lock(path, "mine")
    assert path.read_bytes() == before


def test_it_is_gone_with_its_process_and_its_release(path, other, caplog):
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    mine = Lock(path, "mine")
    assert f"by process {other.pid} on" in caplog.text
    assert "which has ended: it is taken over" in caplog.text
    assert json.loads(path.read_text())["process"] == os.getpid()
    mine.release()
    assert not path.exists()
    mine.release()  # twice does no harm
    Lock(path, "again").release()


def test_a_fork_does_not_keep_its_parents(path):
    """As the processes that load data do, which outlive a parent that was killed."""

    def parent(path, ready):
        Lock(path, "a training")
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
        ready.put(child)
        time.sleep(600)

    ready = FORK.Queue()
    process = FORK.Process(target=parent, args=(path, ready))
    process.start()
    child = ready.get(timeout=30)
    process.kill()
    process.join()
    os.kill(child, 0)  # alive
    Lock(path, "mine").release()
    os.kill(child, signal.SIGKILL)


def test_another_machines_owner_that_lives(path, hurry, caplog):
    owned_by(path)

    def beat(path):
        while True:
            os.utime(path, (1, time.time() % 1000))  # by a clock that is decades behind
            time.sleep(0.05)

    process = FORK.Process(target=beat, args=(path,))
    process.start()
    try:
        with pytest.raises(InUse, match="in use by process 7 on elsewhere since 2031"):
            Lock(path, "mine")
    finally:
        process.kill()
        process.join()
    assert "waiting 1 s for a sign of life" in caplog.text


def test_another_machines_owner_that_is_gone(path, hurry, caplog):
    owned_by(path)
    Lock(path, "mine").release()
    assert "process 7 on elsewhere" in caplog.text
    assert "it is taken over" in caplog.text


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"process": {}}', "\udcff" * 10], ids=repr)
def test_what_is_no_owner_is_none(path, hurry, text):
    path.write_bytes(text.encode(errors="surrogateescape"))
    Lock(path, "mine").release()


def test_its_owner_shows_that_it_lives(path, hurry):
    mine = Lock(path, "mine")
    before = path.stat().st_mtime_ns
    time.sleep(0.3)
    assert path.stat().st_mtime_ns > before
    mine.release()


def test_a_file_system_without_locks(path, hurry, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", flock)
    first = Lock(path, "mine")
    assert "two starts within seconds could miss each other here" in caplog.text
    with pytest.raises(InUse, match=f"in use by process {os.getpid()}"):  # by its sign of life alone
        Lock(path, "another")
    first.release()
    Lock(path, "another").release()


@pytest.mark.parametrize(("number", "said"), [(errno.EINVAL, "cannot flush files and folders"), (errno.ENOSPC, None)])
def test_a_file_system_that_cannot_flush_is_said_and_not_guessed(tmp_path, monkeypatch, number, said):
    assert why_unsafe(tmp_path) is None

    def fsync(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable.os, "fsync", fsync)
    if said is None:
        with pytest.raises(OSError, match="No space left"):
            flush(tmp_path)
        return
    assert flush(tmp_path) is False
    assert said in why_unsafe(tmp_path)
    assert list(tmp_path.iterdir()) == []
