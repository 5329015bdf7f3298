"""What the journal keeps of how results came about, against the device's own properties; and nothing of an account."""

import base64
import datetime
import io
import json
import re
from importlib import metadata

import numpy as np
import pytest
from qiskit import qpy
from qiskit_ibm_runtime.fake_provider import FakeManilaV2

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.ibm.circuits import ISACircuit
from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.ibm.provenance import calibration_of, told
from axolotl_qtha.ibm.runner import Runner
from axolotl_qtha.ibm.service import LocalService

from .boundary import ANSATZ, NOISELESS, PAID, Cloud, StandIn, events, points

pytestmark = pytest.mark.filterwarnings("ignore:.*no QubitProperties")

PLANTED = "Zq83planted_here_0F9e8d7c6b5a493827160f9e8"
MANILA = FakeManilaV2()
FAKE = IBMOptions(backend="fake:manila", shots=100, transpiler={"seed_transpiler": 5})


@pytest.fixture
def made(tmp_path):
    """Return a journal's one job, as its events have it, and what it says of how; the folder is read by nobody else."""
    journal = Journal(tmp_path)
    runner = Runner(ANSATZ, FAKE, LocalService(MANILA, FAKE), journal, seed=3)
    runner.adapter = "ab" * 32
    runner.expectations(points(runner))
    journal.close()
    (entry,) = Journal(tmp_path).entries.values()
    return runner, entry, json.loads((tmp_path / "made" / f"{entry.made}.json").read_text())


def test_the_journal_says_how(made):
    runner, entry, how = made
    (circuit,) = qpy.load(io.BytesIO(base64.b64decode(how["circuit_qpy"])))
    assert circuit == runner.isa.circuit
    assert (how["circuit"], how["layout"]) == (entry.circuit, runner.isa.qubits)
    assert how["options"]["transpiler"] == {"seed_transpiler": 5}
    assert how["transpiler"] == {"optimization_level": 3, "seed_transpiler": 5}
    for name in ("qiskit", "qiskit-aer", "qiskit-ibm-runtime"):
        assert how["versions"][name] == metadata.version(name)
    assert (entry.seed > 0, entry.adapter) == (True, "ab" * 32)
    assert entry.metadata["pub"]["shots"] == 100
    assert how["calibrated"] == MANILA.properties().last_update_date.isoformat()


def test_the_calibration_is_the_devices(made):
    runner, _, how = made
    properties = MANILA.properties()
    assert set(how["calibration"]["qubits"]) >= {str(qubit) for qubit in runner.isa.qubits}
    for qubit, values in how["calibration"]["qubits"].items():
        for name in ("T1", "T2", "readout_error", "prob_meas1_prep0", "prob_meas0_prep1"):
            value, date = values[name]
            expected, when = properties.qubit_property(int(qubit), name)
            assert value == pytest.approx(expected, rel=1e-12)  # in seconds, where it is a time
            assert datetime.datetime.fromisoformat(date) == when
    two = [gate for gate in how["calibration"]["gates"] if gate.startswith("cx ")]
    assert two
    for gate in two:
        where = [int(qubit) for qubit in gate.split()[1:]]
        assert how["calibration"]["gates"][gate]["gate_error"][0] == properties.gate_error("cx", where)
        assert how["calibration"]["gates"][gate]["gate_length"][0] == pytest.approx(properties.gate_length("cx", where))


def test_a_device_without_properties_has_its_targets_values():
    isa = ISACircuit(Ansatz(2, 1), NOISELESS)
    found = calibration_of(isa.circuit, isa.qubits, NOISELESS)
    assert set(found["qubits"]) == {str(qubit) for qubit in isa.qubits}
    json.dumps(found, allow_nan=False)


def test_a_real_device_has_no_seed_and_equal_circuits_one_file(start, cloud, tmp_path):
    runner = start()
    runner.expectations(points(runner))
    runner.expectations(points(runner, seed=1))
    assert {entry.seed for entry in runner.journal.entries.values()} == {None}
    assert len(list((tmp_path / "made").iterdir())) == 1
    assert not any("simulator" in options for options in cloud.options)


class Talkative(StandIn):
    """A device whose results name an account."""

    def submit(self, pub, options):
        job = super().submit(pub, options)
        result = job._job.result()
        result.metadata.update(
            {"instance": f"crn:{PLANTED}", "note": f"https://{PLANTED}@host", "account_id": "me", "t": PLANTED}
        )
        job.result = lambda: result
        return job


def test_no_account_is_in_what_is_kept(tmp_path):
    options = IBMOptions.model_validate({**PAID.model_dump(), "instance": PLANTED})
    journal = Journal(tmp_path)
    runner = Runner(ANSATZ, options, Talkative(options, Cloud()), journal)
    runner.expectations(points(runner))
    journal.close()
    text = "".join(path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert PLANTED not in text
    assert "account_id" not in text
    done = events(tmp_path)[-1]
    assert done["metadata"]["job"] | {"version": 2} == {"note": "(str, not kept)", "t": "(str, not kept)", "version": 2}


def test_what_is_told_is_json():
    value = {"a": np.float64(0.5), "b": np.arange(2), "c": float("nan"), "d": object(), "when": datetime.datetime(2026, 1, 2)}
    expected = {"a": 0.5, "b": [0, 1], "c": "nan", "d": "(object, not kept)", "when": "2026-01-02T00:00:00"}
    assert json.loads(json.dumps(told(value), allow_nan=False)) == expected


def test_a_journal_of_an_earlier_version_is_read(tmp_path):
    runner = Runner(ANSATZ, PAID, StandIn(PAID, cloud := Cloud()), Journal(tmp_path))
    values, _ = runner.expectations(points(runner))
    runner.journal.close()
    new = re.compile("made|seed|adapter|metadata")
    rows = [{key: value for key, value in row.items() if not new.fullmatch(key)} for row in events(tmp_path)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = Runner(ANSATZ, PAID, StandIn(PAID, cloud), Journal(tmp_path))
    assert np.array_equal(again.expectations(points(again))[0], values)
    assert len(cloud.jobs) == 1
    assert len(again.answered) == 1
    again.journal.close()
