"""`axolotl train` with `quantum_backend: ibm`: five steps on a simulated device, beside credentials that must get nowhere."""

import hashlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import get_peft_model
from qiskit_ibm_runtime import QiskitRuntimeService
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from axolotl_qtha import QTHAConfig
from axolotl_qtha.circuit.aer import Engine
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.shifts import RULES, SHIFTS, GateAngles, Slopes
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.cli.ibm import estimate, hardware_eval
from axolotl_qtha.ibm.journal import Journal, Ledger

from ..models import adapters
from .commands import QUICKSTART, run, write_config

pytestmark = pytest.mark.e2e

PLANTED = "Zq83PlantedCredential"  # what all of them begin with
KEYS = ("qpu_bias", "qpu_variance", "qpu_standard_error", "qpu_tokens", "qpu_seconds")
IBM = yaml.safe_load((QUICKSTART / "ibm.yml").read_text())["qtha"]["ibm"]
STEPS, LAYERS, TOKENS, QUBITS = 5, 2, IBM["tokens_per_step"], 2
ANSATZ = Ansatz(QUBITS, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train with a token in the environment and another one in a saved account."""
    folder, home = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("home")
    account = home / ".qiskit" / "qiskit-ibm.json"
    QiskitRuntimeService.save_account(
        channel="ibm_quantum_platform", token=f"{PLANTED}Saved", instance=f"{PLANTED}Instance", filename=str(account)
    )
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # of the compiled engine
    env = {"HOME": str(home), "XDG_CACHE_HOME": cache, "QISKIT_IBM_TOKEN": f"{PLANTED}Environment"}
    yml = write_config(folder, "ibm.yml", use_tensorboard=True, qtha={"ibm": {**IBM, "journal": str(folder / "journal")}})
    done = run(["axolotl", "train", str(yml), "--launcher", "python"], folder, **env)
    assert done.returncode == 0, done.stdout[-4000:]
    state = json.loads((folder / "out" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return SimpleNamespace(
        folder=folder, home=home, account=account, env=env, yml=yml, output=done.stdout, log=state["log_history"]
    )


@pytest.fixture(scope="module")
def journal(trained):
    journal = Journal(trained.folder / "journal")  # what it holds no result of would be open again
    yield journal
    journal.close()


def test_the_log_has_the_differences(trained):
    rows = [row for row in trained.log if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert all(np.isfinite(row[key]) for key in ("loss", "grad_norm", *KEYS))
        assert row["qpu_tokens"] == TOKENS * LAYERS
        assert 0 < row["qpu_standard_error"] <= IBM["shots"] ** -0.5
        assert row["qpu_standard_error"] ** 2 / 3 < row["qpu_variance"] < 0.05
        assert 0 < abs(row["qpu_bias"]) < 0.1
    evaluations = [row for row in trained.log if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, STEPS]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert not any("qpu" in key for row in evaluations for key in row)
    for place in ("console", "TensorBoard"):
        assert not missing(trained, rows, place), place


def missing(trained, rows, place):
    """Return the keys that are not where a user looks for them."""
    if place == "console":
        return [key for key in KEYS if trained.output.count(f"'{key}': ") < STEPS]
    (file,) = trained.folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    return [
        key
        for key in KEYS
        if [event.value for event in events.Scalars(f"train/{key}")] != pytest.approx([row[key] for row in rows], rel=1e-5)
    ]


def test_the_adapter_has_learnt(trained):
    saved = load_file(trained.folder / "out" / "adapter_model.safetensors")
    settings = QTHAConfig.from_pretrained(str(trained.folder / "out"))
    assert settings.quantum_backend == "torch", "it loads without an account"
    new = get_peft_model(AutoModelForCausalLM.from_pretrained(QUICKSTART / "base"), settings)
    before = {f"{layer}.{name}": p for layer, adapter in adapters(new).items() for name, p in adapter.named_parameters()}
    assert len(saved) == len(before) > 0
    for name, value in before.items():
        layer, _, leaf = name.rpartition(".")
        (after,) = [tensor for key, tensor in saved.items() if layer in key and key.endswith(f".{leaf}")]
        assert after.isfinite().all()
        assert not torch.equal(after, value.detach()), name


def test_the_journal_is_complete_and_the_estimate_holds(trained, journal):
    """Nothing but the steps' circuits, and no more of them than estimated."""
    entries = list(journal.entries.values())
    assert {entry.state for entry in entries} == {"done"}
    events = [json.loads(line)["event"] for line in (journal.folder / "events.jsonl").read_text().splitlines()]
    assert events == ["intent", "submitted", "done"] * len(entries)
    forward, gradient = by_kind(journal)
    assert len(forward) == STEPS * LAYERS
    assert len(gradient) <= (STEPS - 1) * LAYERS, "at the first step the adapter is a no-op"
    done = CliRunner().invoke(estimate, [str(trained.yml)])
    assert done.exit_code == 0, done.output
    assert PLANTED not in done.output
    circuits, jobs = (
        int(text.replace(",", "")) for text in re.findall(r"the run, 5 steps +│ +([\d,]+) │ +([\d,]+) │", done.output)[0]
    )
    each = 1 + sum(2 * len(RULES[kind]) for kind in GateAngles(ANSATZ).kinds)
    assert (circuits, jobs) == (STEPS * LAYERS * TOKENS * each, STEPS * LAYERS * 2)
    assert sum(entry.circuits for entry in entries) <= circuits
    assert len(entries) <= jobs


def by_kind(journal):
    """Return the jobs of forward passes and those of gradients.

    A gradient takes more for a single token than a forward pass for all.
    """
    entries = list(journal.entries.values())
    return [e for e in entries if e.circuits <= TOKENS], [e for e in entries if e.circuits > TOKENS]


def test_gradients_are_within_the_statistical_error_of_the_exact_ones(journal):
    """Of every token and qubit that the run asked a gradient of, against the same noise computed exactly.

    The gradient of each <Z_i> by itself, since then the variance of shots is known: (1 - <Z_i>^2) / shots for each circuit.
    """
    measured = {}
    for entry in journal.entries.values():
        asked = journal.asked(entry.tag)
        for point, key in zip(asked["points"], asked["hashes"], strict=True):
            measured[point.tobytes()] = journal.result(entry.calibration, key.tobytes())[0]
    gates = GateAngles(ANSATZ)
    aer, noiseless = (Engine(ANSATZ, Simulation("aer", noise_model=name), None) for name in (IBM["backend"], "none"))
    off, biases, circuits = [], [], 0
    for entry in by_kind(journal)[0]:
        for point in journal.asked(entry.tag)["points"]:
            z, theta = angles_of(gates, point)
            try:
                shifted = gradient(gates, lambda points: np.array([measured[row.tobytes()] for row in points]), z, theta)
            except KeyError:
                continue  # nothing depended on it
            circuits += sum(2 * len(RULES[kind]) for kind in gates.kinds)
            noisy = gradient(gates, aer.expectations, z, theta)
            off.append((shifted - noisy) / spread(gates, aer.expectations, point))
            biases.append(noisy - gradient(gates, noiseless.expectations, z, theta))
    assert circuits == sum(entry.circuits for entry in by_kind(journal)[1]), "each circuit of a gradient job is accounted for"
    assert len(off) >= 5
    assert np.abs(off).max() < 5
    assert np.square(off).mean() == pytest.approx(1, abs=0.3), "neither more than shots, nor less"
    assert 0.001 < np.sqrt(np.square(biases).mean()) < 0.1, "the device's own, which no shots take away"


def angles_of(gates, point):
    """Return z (1, n) and the trainable angles (rows, n) of a circuit's gate angles."""
    z, theta = np.zeros(QUBITS), np.zeros(ANSATZ.rows * QUBITS)
    from_z, source = sources(gates)
    z[source[from_z]] = point[from_z]
    theta[source[~from_z]] = point[~from_z]
    return z[None], theta.reshape(ANSATZ.rows, QUBITS)


def sources(gates):
    """Return for each gate whether its angle is an input, and which one; else which of the trained angles it is."""
    of_z, of_trained = gates.map.of_z.numpy(), gates.map.of_trained.numpy()
    return gates.map.from_z, np.where(gates.map.from_z, of_z.argmax(axis=0), of_trained.argmax(axis=0))


def gradient(gates, run, z, theta):
    """Return the slopes of each <Z_i>, (n, n + angles)."""
    rows = [Slopes(gates, run, weights, z, theta).by_parameter_shift() for weights in np.eye(QUBITS)[:, None]]
    return np.stack([np.concatenate([by_z.ravel(), by_theta.ravel()]) for by_z, by_theta in rows])


def spread(gates, run, point):
    """Return the standard errors of the same slopes: each angle belongs to one gate."""
    variances = np.zeros((QUBITS, QUBITS + ANSATZ.rows * QUBITS))
    from_z, found = sources(gates)
    for k, (kind, source) in enumerate(zip(gates.kinds, found, strict=True)):
        for weight, shift in zip(RULES[kind], SHIFTS, strict=False):
            both = run(point + np.outer([shift, -shift], np.eye(len(point))[k]))
            variances[:, source + (0 if from_z[k] else QUBITS)] += weight**2 * ((1 - both**2) / IBM["shots"]).sum(axis=0)
    return np.sqrt(variances)


SAMPLES, LAST = 3, 8


@pytest.fixture(scope="module")
def evaluated(trained):
    """Evaluate the adapter on the device it was trained on, twice, with the token still in the environment."""
    out, journal = trained.folder / "out", trained.folder / "evaluation-journal"
    yml = write_config(trained.folder, "ibm.yml", qtha={"ibm": {**IBM, "journal": str(journal)}})
    arguments = [str(yml), "--samples", str(SAMPLES), "--tokens", str(LAST)]
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QISKIT_IBM_TOKEN", trained.env["QISKIT_IBM_TOKEN"])
        for more in ([], ["--overwrite"]):
            done = CliRunner().invoke(hardware_eval, arguments + more)
            assert done.exit_code == 0, done.output[-4000:]
            result = json.loads((out / "hardware-eval" / "hardware_eval.json").read_text())
            circuits = [entry.circuits for entry in Ledger.read(journal).entries.values()]
            runs.append(SimpleNamespace(output=done.output, result=result, circuits=circuits))
    return runs


def test_an_evaluation_on_the_device(trained, evaluated):
    found = evaluated[0].result
    exact, *others = found["ways"]
    assert found["facts"]["device"] == "fake_manila"
    assert found["circuits"] == sum(evaluated[0].circuits) == SAMPLES * LAST * LAYERS
    assert f"{found['circuits']} circuits in" in evaluated[0].output, "the estimate counts what is run"
    assert evaluated[0].output.index("ESTIMATED") < evaluated[0].output.index("<Z> less the exact <Z>")
    for way in others:
        assert way["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05)
        assert len(way["deviation"]["bias"]) == QUBITS
        assert 0.3 < way["token_agreement"] <= 1
    folder = trained.folder / "out" / "hardware-eval"
    assert {path.name for path in folder.iterdir()} == {"hardware_eval.json", "hardware_eval.png"}


def test_what_the_evaluation_is_from_is_in_its_file(trained, evaluated):
    kept = evaluated[0].result["provenance"]
    weights = (trained.folder / "out" / "adapter_model.safetensors").read_bytes()
    assert kept["adapter_sha256"] == hashlib.sha256(weights).hexdigest()
    entries = Ledger.read(trained.folder / "evaluation-journal").entries
    assert {job["tag"] for job in kept["jobs"]} == set(entries)
    assert {entry.adapter for entry in entries.values()} == {kept["adapter_sha256"]}
    assert set(kept["calibration"]["qubits"]) == {str(qubit) for qubit in kept["layout"]}
    assert evaluated[1].result["provenance"]["jobs"] == kept["jobs"], "those of the first time answered"


def test_the_same_evaluation_again_costs_nothing(evaluated):
    first, second = evaluated
    assert second.circuits == first.circuits, "no other jobs"
    assert second.result["qpu_seconds"] == 0
    assert second.result["ways"][-1]["perplexity"] == first.result["ways"][-1]["perplexity"]


def test_no_credential_is_in_anything_it_wrote(trained, evaluated):
    files = [path for folder in (trained.folder, trained.home) for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"trainer_state.json", "README.md", "adapter_config.json", "debug.log", "events.jsonl", "qiskit-ibm.json"} <= names
    assert any("tfevents" in name for name in names)
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == [trained.account]
    assert PLANTED not in trained.output
    assert not any(PLANTED in each.output for each in evaluated)


def test_a_token_in_the_yaml_is_refused_unseen(trained, tmp_path):
    yml = write_config(tmp_path, "ibm.yml", qtha={"ibm": {**IBM, "token": f"{PLANTED}Yaml"}})
    done = run(["axolotl", "train", str(yml), "--launcher", "python"], tmp_path, **trained.env)
    assert done.returncode != 0
    assert "qtha.ibm.token (value not shown)" in done.stdout
    assert "Traceback" in done.stdout, "the whole of what Axolotl prints of an error"
    assert PLANTED not in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file() and PLANTED.encode() in path.read_bytes()] == [yml]
