"""The journal's files: whole or absent, one process at a time."""

import json
import math
import multiprocessing
import os
import socket

import numpy as np
import pytest
from safetensors.numpy import save_file

from axolotl_qtha.ibm.journal import Journal, Ledger

JOB = {
    "local": False,
    "backend": "ibm_x",
    "calibration": "today",
    "circuit": "c",
    "angles": "a",
    "circuits": 2,
    "estimate": 4.0,
    "reserved": 10.0,
    "options": {},
}


def hashes(first):
    return np.arange(first, first + 32, dtype=np.uint8).reshape(2, 16)


def finished(journal, tag="t", first=0):
    journal.ask(tag, hashes(first), np.zeros((2, 5)))
    journal.record("intent", tag=tag, **JOB)
    journal.record("submitted", tag=tag, job_id=f"id-{tag}")
    journal.answer(tag, np.full((2, 3), 0.5), np.full((2, 3), 0.1))
    journal.record("done", tag=tag, qpu_seconds=3.0)


def test_it_is_the_same_after_reading(tmp_path):
    journal = Journal(tmp_path)
    finished(journal)
    journal.ask("u", hashes(99), np.zeros((2, 5)))
    journal.record("intent", tag="u", **JOB, session=None)
    entries = dict(journal.entries)
    journal.close()
    again = Journal(tmp_path)
    assert again.entries == entries
    assert [entry.tag for entry in again.open(local=False)] == ["u"]
    assert again.open(local=True) == []
    assert again.used(local=False) == 3.0
    values, errors = again.result("today", hashes(0)[1].tobytes())
    assert (values.tolist(), errors.tolist()) == ([0.5] * 3, [0.1] * 3)
    assert again.result("yesterday", hashes(0)[1].tobytes()) is None
    again.adopt("t", "yesterday")
    assert again.result("yesterday", hashes(0)[1].tobytes()) is not None
    assert again.last_backend() == "ibm_x"


def test_a_torn_last_line_has_not_happened_wherever_it_is_torn(tmp_path, caplog):
    journal = Journal(tmp_path)
    finished(journal)
    journal.close()
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last + 1, len(whole)):
        path.write_bytes(whole[:cut])
        caplog.clear()
        journal = Journal(tmp_path)
        assert journal.entries["t"].state == "submitted"
        assert "not complete" in caplog.text
        journal.record("done", tag="t", qpu_seconds=3.0)
        journal.close()
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["intent", "submitted", "done"]


@pytest.mark.parametrize("line", [b"garbage", b'{"event": "fired", "tag": "t"}', b'{"event": "done", "tag": "other"}', b"[]"])
def test_damage_elsewhere_is_refused(tmp_path, line):
    journal = Journal(tmp_path)
    finished(journal)
    journal.close()
    path = tmp_path / "events.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + b"".join(rest))
    with pytest.raises(ValueError, match=r"qtha.ibm.journal: .*is damaged in line 2.*What works"):
        Journal(tmp_path)


INTENT = {"event": "intent", "tag": "u", **JOB}
CRAFTED = [
    {"event": "done", "tag": "t", "qpu_seconds": -1e6},  # would give back what was spent
    {"event": "done", "tag": "t", "qpu_seconds": math.nan},  # no cap is below it
    {"event": "done", "tag": "t", "qpu_seconds": math.inf},
    {"event": "done", "tag": "t", "qpu_seconds": "3"},
    {"event": "done", "tag": "t", "qpu_secs": 3.0},
    {**INTENT, "estimate": -5.0},
    {**INTENT, "reserved": math.nan},
    {**INTENT, "reserved": None},
    {**INTENT, "circuits": "2"},
    {**INTENT, "circuits": 0},
    {**INTENT, "pack": -1},
    {**INTENT, "local": "no"},
    {**INTENT, "tag": "../../victim"},
    {key: value for key, value in INTENT.items() if key != "estimate"},
    {"event": "session_opened", "session": "s"},
    {"event": "session_opened", "session": "s", "reserved": -1.0},
    {"event": "session_closed", "session": "never opened", "qpu_seconds": 1.0},
    {"event": ["done"], "tag": "t"},
    {"tag": "t"},
]


@pytest.mark.parametrize("row", CRAFTED, ids=str)
def test_a_crafted_event_is_refused(tmp_path, row):
    journal = Journal(tmp_path)
    finished(journal)
    journal.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    for read in (Journal, Ledger.read):
        with pytest.raises(ValueError, match=r"qtha.ibm.journal: .*is damaged in line 4 of events.jsonl \(.*What works"):
            read(tmp_path)


def test_a_line_nested_without_end_is_refused(tmp_path):
    (tmp_path / "events.jsonl").write_text("[" * 200_000 + "\n")
    with pytest.raises(ValueError, match="is damaged in line 1"):
        Ledger.read(tmp_path)


@pytest.mark.parametrize("row", range(300))
def test_fuzz(tmp_path_factory, row):
    """Seeded: a value, a key or a byte of an event is another; it is refused, or costs no less than before."""
    random = np.random.default_rng(row)
    folder = fuzzed_journal(tmp_path_factory)
    lines = (folder / "events.jsonl").read_bytes().splitlines()
    index = int(random.integers(len(lines)))
    kind = random.choice(["value", "key", "byte"])
    if kind == "byte":
        place = int(random.integers(len(lines[index])))
        lines[index] = lines[index][:place] + bytes([int(random.integers(32, 127))]) + lines[index][place + 1 :]
    else:
        event = json.loads(lines[index])
        key = str(random.choice(sorted(event)))
        value = event.pop(key)
        if kind == "value":
            event[key] = [None, -1, "x", [], {}, math.nan, 1e300, True, f"{value}"][random.integers(9)]
        lines[index] = json.dumps(event).encode()
    target = folder.parent / f"mutated-{row}"
    target.mkdir()
    (target / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    try:
        ledger = Ledger.read(target)
        assert 0 <= ledger.used(local=False) < math.inf
        assert 0 <= ledger.under_way(local=False) < math.inf
    except ValueError as error:
        if "is damaged in line" not in str(error):
            raise


_fuzzed = {}


def fuzzed_journal(tmp_path_factory):
    """Return the folder of a journal with a session and two jobs, made once."""
    if not _fuzzed:
        folder = tmp_path_factory.mktemp("fuzz") / "journal"
        journal = Journal(folder)
        journal.record("session_opened", session="s", reserved=100)
        finished(journal)
        journal.record("intent", tag="v", **JOB, session="s")
        journal.close()
        _fuzzed["folder"] = folder
    return _fuzzed["folder"]


def test_a_full_disk_leaves_no_part_of_an_event(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    finished(journal)
    before = (tmp_path / "events.jsonl").read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, line: write(file, line[:10]))
        with pytest.raises(OSError, match="Is the disk full"):
            journal.record("lost", tag="t", qpu_seconds=0.0)
    assert (tmp_path / "events.jsonl").read_bytes() == before
    assert journal.entries["t"].state == "done"


@pytest.mark.parametrize("damage", ["cut", "gone", "rows", "nan", "names"])
def test_a_lost_result_is_fetched_again(tmp_path, damage):
    journal = Journal(tmp_path)
    finished(journal)
    journal.close()
    path = tmp_path / "results" / "t.safetensors"
    if damage in ("cut", "gone"):
        path.write_bytes(path.read_bytes()[:-1]) if damage == "cut" else path.unlink()
    else:
        values = np.full((1 if damage == "rows" else 2, 3), math.nan if damage == "nan" else 0.5)
        save_file({"values": values, "errors" if damage != "names" else "error": np.ones((2, 3))}, path)
    journal = Journal(tmp_path)
    assert [(entry.state, entry.job_id) for entry in journal.open(local=False)] == [("submitted", "id-t")]


def _open(path, answers):
    try:
        Journal(path)
        answers.put("opened")
    except ValueError as error:
        answers.put(str(error))


def test_two_processes_cannot_share_it(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def another():
        process = context.Process(target=_open, args=(tmp_path, answers))
        process.start()
        process.join()
        return answers.get(timeout=10)

    journal = Journal(tmp_path)
    assert f"is in use by process {os.getpid()} on {socket.gethostname()} since " in another()
    journal.close()
    assert another() == "opened"


def test_it_can_be_read_while_another_process_writes(tmp_path):
    assert not (empty := Ledger.read(tmp_path / "none")).entries
    assert (empty.used(local=False), empty.under_way(local=False), empty.last_backend()) == (0, 0, None)
    assert not (tmp_path / "none").exists()
    journal = Journal(tmp_path)
    finished(journal)
    journal.record("intent", tag="u", **JOB)
    path = tmp_path / "events.jsonl"
    with path.open("ab") as file:
        file.write(b'{"event": "subm')
    before = path.read_bytes()
    ledger = Ledger.read(tmp_path)
    assert ledger.entries == journal.entries
    assert (ledger.used(local=False), ledger.under_way(local=False), ledger.last_backend()) == (3.0, 4.0, "ibm_x")
    assert (ledger.used(local=True), ledger.under_way(local=True)) == (0, 0)
    assert path.read_bytes() == before


def test_sessions_are_billed_instead_of_their_jobs(tmp_path):
    journal = Journal(tmp_path)
    journal.record("session_opened", session="s", reserved=100)
    journal.record("intent", tag="t", **JOB, session="s")
    journal.record("done", tag="t", qpu_seconds=3.0)
    assert journal.used(local=False, session="s") == 3.0
    assert journal.used(local=False) == 100, "not known to be closed: it may use all it was given"
    journal.record("session_closed", session="s", qpu_seconds=42.0)
    assert journal.used(local=False) == 42
    assert journal.used(local=True) == 0
