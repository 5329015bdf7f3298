"""The estimate: against what a step really submits, and as a person sees it."""

import dataclasses
import re

import pytest
import torch
from click.testing import CliRunner
from qiskit.providers.fake_provider import GenericBackendV2

from axolotl_qtha import QTHAConfig
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.shifts import GateAngles, shift_circuits
from axolotl_qtha.cli.ibm import estimate as command
from axolotl_qtha.ibm import engine
from axolotl_qtha.ibm.circuits import ISACircuit
from axolotl_qtha.ibm.cost import rate
from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.runner import Runner
from axolotl_qtha.ibm.service import LocalService
from axolotl_qtha.planner.qpu import estimate

from ..ibm.test_cost import MANILA, independent, options
from ..ibm.test_journal import JOB
from .bases import CONFIGS, write_run

pytestmark = pytest.mark.filterwarnings("ignore:.*no QubitProperties")


LINE = GenericBackendV2(7, coupling_map=[(i, i + 1) for i in range(6)], noise_info=False, seed=0)


@pytest.mark.parametrize("quantum", ["qtha", "frozen"])
@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({}, 2),
        ({"gradient": "spsa"}, 2),
        ({"gradient": "none"}, 2),
        ({"tokens_per_step": 100}, 2),
        ({}, 6),
        ({"pack": 3}, 2),
        ({"pack": 3, "gradient": "spsa"}, 8),
    ],
    ids=str,
)
def test_a_step_submits_what_was_estimated(tmp_path, monkeypatch, changes, rank, quantum):
    block = {"backend": "fake:torino", "shots": 10, "tokens_per_step": 3, "journal": str(tmp_path), **changes}
    config = QTHAConfig(rank=rank, qubits=2, circuit_layers=1, quantum=quantum, quantum_backend="ibm", ibm=block)
    ansatz = Ansatz(2, 1)
    runner = Runner(ansatz, config.ibm, LocalService(LINE, config.ibm), Journal(tmp_path))
    runner.rate = dataclasses.replace(runner.rate, circuits_per_job=25)  # a gradient takes several jobs
    monkeypatch.setattr(engine, "runner", lambda *_: runner)
    sizes = {"tokens": 5, "micro_batches": 1, "steps": 10, "used": 0.0, "evaluated": 5, "asked": 4}
    expected = estimate(config, 1, runner.isa, LINE, "none", **sizes)
    expected = dataclasses.replace(expected, rate=runner.rate)
    some = min(5, config.ibm.tokens_per_step) * rank // 2
    step = runner.rate.cost(some) + runner.rate.cost(some * expected.gradient_circuits)
    z = torch.randn(5, rank, generator=torch.Generator().manual_seed(0), requires_grad=True)
    angles = torch.randn(ansatz.rows, rank, requires_grad=quantum != "frozen")
    result = engine.expectation_values(z, angles, ansatz, config.simulation)
    if config.ibm.gradient == "none":
        with pytest.raises(ValueError, match=r"ibm.gradient: 'none' trains nothing"):
            result.sum().backward()
    else:
        (result + 2).square().sum().backward()  # no gradient is zero
    entries = runner.journal.entries.values()
    assert (sum(entry.circuits for entry in entries), len(entries)) == (step.circuits, step.jobs)
    assert sum(entry.estimate for entry in entries) == pytest.approx(step.qpu_seconds)
    assert expected.step.circuits == step.circuits
    assert expected.run.circuits == 10 * step.circuits
    if not changes and quantum == "qtha":
        assert expected.gradient_circuits == shift_circuits(GateAngles(ansatz)) == 28


FAKE = {"rank": 2, "circuit_layers": 1, "param_budget": 0.5, "quantum_backend": "ibm"}


def run(tmp_path, *arguments, ibm=None, **changes):
    ibm = {"backend": "fake:manila", "shots": 1000, "resilience_level": 0, "journal": str(tmp_path / "journal"), **(ibm or {})}
    path = write_run(tmp_path, CONFIGS["llama"], **{"qtha": {**FAKE, "ibm": ibm}, **changes})
    return CliRunner().invoke(command, [str(path), *map(str, arguments)])


def test_the_command_counts_and_submits_nothing(tmp_path):
    done = run(tmp_path, "--steps", 5, "--tokens", 20)
    assert done.exit_code == 0, done.output
    # In each of 3 blocks 4 circuits (q, k, v share one, and gate, up), 2 micro-batches, 8 of 512 tokens: a job for the forward
    # and one for the gradient's 28 circuits a token
    step = 12 * 2 * 8 * 29
    price = rate(ISACircuit(Ansatz(2, 1), MANILA), options(), MANILA)
    seconds = 24 * (price.job(8).qpu_seconds + price.job(8 * 28).qpu_seconds)
    rows = {cells[0]: cells[1:] for line in done.output.splitlines() if len(cells := [c.strip() for c in line.split("│")[1:-1]])}
    assert rows["a training step"] == [f"{step:,}", "48", f"{1000 * step:,}", f"{seconds:,.1f}"]
    assert rows["the run, 5 steps"] == [f"{5 * step:,}", "240", f"{5000 * step:,}", f"{5 * seconds:,.1f}"]
    # the evaluations while training are exact; those of `axolotl evaluate` have no gradient
    assert rows["a batch of `axolotl evaluate`"][:2] == [f"{12 * 8}", "12"]
    assert rows["reading 20 tokens in one pass"][:2] == [f"{12 * 8}", "12"]
    assert rows["writing 20 tokens, one after the other"][:2] == [f"{12 * 20}", f"{12 * 20}"]
    text = " ".join(done.output.split())
    assert "nothing was submitted" in text
    assert "https://quantum.cloud.ibm.com/docs/guides/estimate-job-run-time" in text
    for name, count in independent(Ansatz(2, 1), MANILA).count_ops().items():
        assert f"{count} {name}" in text
    assert not (tmp_path / "journal").exists()


def test_the_command_says_what_packing_saves(tmp_path):
    torino = {"backend": "fake:torino"}
    text = " ".join(run(tmp_path, ibm=torino).output.split())
    found = re.search(r"With `ibm: \{pack: auto\}` a circuit would hold 4, and a step take ([\d,.]+) QPU seconds", text)
    packed = run(tmp_path, ibm={**torino, "pack": "auto"})
    assert f"│ {found[1]} │" in " ".join(packed.output.split())
    assert "One circuit: 4 blocks of 2 qubits side by side" in " ".join(packed.output.split())
    assert "pack: auto" not in packed.output


def test_a_layout_of_ones_own_is_estimated_where_it_is(tmp_path):
    done = run(tmp_path, ibm={"transpiler": {"initial_layout": [4, 3], "optimization_level": 1}})
    assert done.exit_code == 0, done.output
    assert "pack: auto" not in done.output, "which would place it otherwise"
    done = run(tmp_path, ibm={"transpiler": {"initial_layout": [4, 5]}})
    assert done.exit_code == 1
    assert "qtha.ibm.transpiler.initial_layout: [4, 5] has 2 of a device's 5 qubits" in " ".join(done.output.split())


def test_the_command_says_by_how_much_the_cap_is_exceeded(tmp_path):
    done = run(tmp_path, ibm={"max_qpu_seconds": 100}, max_steps=2)
    assert done.exit_code == 1
    seconds = float(re.findall(r"the run, 2 steps.*│ +([\d,.]+) │", done.output)[0].replace(",", ""))
    over = float(re.findall(r"([\d,.]+) too few for the run", done.output)[0].replace(",", ""))
    assert over == pytest.approx(seconds - 100, abs=0.2)
    assert run(tmp_path, ibm={"max_qpu_seconds": seconds + 1}, max_steps=2).exit_code == 0
    assert "give `max_steps`" in run(tmp_path).output


def test_the_command_counts_what_the_journal_has_used(tmp_path):
    journal = Journal(tmp_path / "journal")  # in use by this process, as by a training
    job = {**JOB, "local": True, "estimate": 4.0}
    for tag in "ab":
        journal.record("intent", tag=tag, **job)
    journal.record("done", tag="a", qpu_seconds=30.0)
    journal.record("intent", tag="real", **JOB)  # on a real device: another purse
    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("journal/*") if path.is_file())
    seconds = 2 * 24 * (2 * 2 + 232 * 1000 * rate(ISACircuit(Ansatz(2, 1), MANILA), options(), MANILA).seconds)
    for short in (1, 0):
        cap = round(seconds + 34 - short, 1) + 0.1
        done = run(tmp_path, ibm={"max_qpu_seconds": cap}, max_steps=2)
        assert done.exit_code == short
        text = " ".join(done.output.split())
        assert f"max_qpu_seconds: {cap:g}, 34.0 used by the journal, {cap - 34:,.1f} left: " in text
        assert ("0.9 too few for the run" if short else "left: enough for the run") in text
    assert sorted((path, path.read_bytes()) for path in tmp_path.rglob("journal/*") if path.is_file()) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qtha": {"rank": 2}}, ["qtha.quantum_backend: 'torch'", "costs no QPU time"]),
        ({"ibm": {"backend": "fake:manilla"}}, ["qtha.ibm.backend", "`fake:manila`"]),
        ({"ibm": {"shots": 6_000_000}}, ["qtha.ibm.shots: 6000000", "5,000,000 at most"]),
        ({"base_model": "nobody/nothing"}, ["base_model: 'nobody/nothing'"]),
    ],
    ids=str,
)
def test_errors_are_one_line_and_no_traceback(tmp_path, changes, words):
    done = run(tmp_path, **changes)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), done.exception
    for word in words:
        assert word in done.output
    assert "Traceback" not in done.output
