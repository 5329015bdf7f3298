"""The circuit's benchmark: small runs of it, its fits and counts, and engines it must not time."""

import json
import sys

import pytest
import torch
from PIL import Image

from axolotl_qtha.bench import circuit, circuit_peers
from axolotl_qtha.bench.circuit_peers import ENGINES, Engine
from axolotl_qtha.circuit.ansatz import Ansatz

CPU = torch.device("cpu")
OWN = ["ours", "ours, float64", "ours, PyTorch", "Aer"]


def bench(*engines, limit=60.0):
    return circuit.Bench(engines, repeats=1, limit=limit, device=CPU)


@pytest.mark.slow
def test_a_small_run(monkeypatch, capsys, tmp_path):
    plot, figures = tmp_path / "plot.png", tmp_path / "figures.json"
    sizes = ["--qubits", "2", "3", "--layers", "1", "--tokens", "8", "32", "--repeats", "1", "--quick"]
    monkeypatch.setattr(sys, "argv", ["bench", *sizes, "--engines", *OWN, "--plot", str(plot), "--json", str(figures)])
    circuit.main()
    printed = capsys.readouterr().out
    saved = json.loads(figures.read_text())
    assert [(row["qubits"], row["tokens"], row["engine"]) for row in saved["rows"]] == [
        (q, t, name) for q in (2, 3) for t in (8, 32) for name in OWN
    ]
    assert all(row["milliseconds"] > 0 and row["to_ours"] > 0 for row in saved["rows"])
    assert {row["engine"] for row in saved["rows"] if row["peak_mib"] is None} == {"Aer"}  # 16 tokens scaled to 32
    assert saved["kept_bytes"] == {"1": 2048 * 8 * 4, "16": 2048 * 8 * 4}  # z itself, whatever the number of layers
    for words in ("time grows with tokens to the power", "x ours", "64.0 KiB with 16 layers", "GFLOP/s"):
        assert words in printed
    with Image.open(plot) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(2**24)) > 20


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_fit_finds_a_known_exponent(power):
    sizes = [10, 30, 100, 1000]
    assert circuit.exponent(sizes, [3e-6 * size**power for size in sizes]) == pytest.approx(power)


def test_operations_are_those_of_the_smallest_circuit():
    # one qubit, one layer: RY(z), then RY, RY folded into the same wall: one rotation of |0>, and nothing between
    assert circuit.operations(Ansatz(1, 1)) == 2 * (2 + 7 + 2 + 4 + 4)
    # per layer two more walls and diagonals; twice the layers is twice the work, but for the ends
    few, many = circuit.operations(Ansatz(8, 8)), circuit.operations(Ansatz(8, 16))
    assert many / few == pytest.approx(2, rel=0.02)


def test_a_wrong_gradient_is_not_timed():
    def build(ansatz):
        run = ENGINES["ours"].build(ansatz)

        def wrong(z, angles, weights):
            values, grad_z, grad_angles = run(z, angles, weights)
            return values, grad_z, grad_angles + 1e-3

        return wrong

    measured = bench(ENGINES["ours"], Engine("off", build))
    assert [row["engine"] for row in measured.cell(Ansatz(2, 1), 4)] == ["ours"]
    assert "wrong by 1.0e-03" in measured.skipped["off"]


def test_what_is_left_out_is_named(monkeypatch):
    measured = bench(ENGINES["ours"], limit=1e-9)
    assert measured.cell(Ansatz(2, 1), 4)
    assert not measured.cell(Ansatz(4, 1), 4)
    (where,) = measured.skipped
    assert where == "ours, 4 qubits, 1 layers, 4 tokens"
    assert "--limit is 1e-09" in measured.skipped[where]
    large = bench(Engine("hoarder", ENGINES["ours"].build, keeps=10**9))
    assert not large.cell(Ansatz(4, 1), 4)
    assert "GiB for backward" in next(iter(large.skipped.values()))
    monkeypatch.setitem(sys.modules, "pennylane", None)
    monkeypatch.setitem(sys.modules, "tensorcircuit", None)
    peers = bench(ENGINES["PennyLane backprop"], ENGINES["TensorCircuit"])
    assert not peers.cell(Ansatz(2, 1), 4)
    assert set(peers.skipped) == {"PennyLane backprop", "TensorCircuit"}
    assert all('pip install "axolotl-qtha[bench]"' in reason for reason in peers.skipped.values())


PACKAGES = {
    "PennyLane backprop": "pennylane",
    "PennyLane lightning": "pennylane_lightning",
    "TensorCircuit": "tensorcircuit",
    "Qiskit ML": "qiskit_machine_learning",
}


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_runs_our_circuit(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    for ansatz in (Ansatz(1, 2), Ansatz(3, 2), Ansatz(2, 1, "2025-05")):
        # float32 or better, gradients of size 1
        assert circuit.difference(circuit_peers.ENGINES[name].build(ansatz), ansatz, CPU) <= 1e-5
