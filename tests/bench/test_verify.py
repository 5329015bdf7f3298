"""`axolotl qtha-verify`: it passes on what is right, and finds what is wrong."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from qiskit_aer.noise.device import basic_device_readout_errors

from axolotl_qtha.bench.verify import compare, table, verdict
from axolotl_qtha.circuit import native, noise, torch_engine
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.recognised import ansatz_of, circuit_of
from axolotl_qtha.circuit.simulation import Simulation, Strengths
from axolotl_qtha.cli.circuit import verify
from axolotl_qtha.terminal import console

from ..e2e.commands import write_config


def rows(simulation=Simulation()):  # noqa: B008 (frozen)
    return {row.engine: row for row in compare(Ansatz(3, 2), simulation, tokens=3, tolerance=1e-5, seed=0)}


def test_every_engine_of_this_machine_passes():
    found = rows()
    expected = {"torch, cpu, float32, PyTorch", "torch, cpu, float64, PyTorch", "aer, double", "aer, single"}
    if native.library() is not None:
        expected |= {"torch, cpu, float32, compiled", "torch, cpu, float64, compiled"}
    assert {name for name in found if "cuda" not in name and "gpu" not in name} == expected
    assert all(row.passed for row in found.values())
    for name, row in found.items():
        limit = 1e-12 if "float64" in name or "double" in name else 1e-5
        assert row.values <= limit
        assert row.gradients is None or row.gradients <= limit


@pytest.mark.parametrize("simulation", [Simulation(), Simulation("aer", shots=300)], ids=["exact", "shots"])
def test_circuits_side_by_side(simulation):
    for row in compare(Ansatz(2, 1), simulation, tokens=2, tolerance=1e-5, seed=0, blocks=3):
        assert row.passed
        assert row.gradients is None or row.gradients <= 1e-5


OWN = "tests.circuit.own_models"
DEVICES = [f"fake:manila: the device's own 100,000 shots{what}" for what in ("", ", all angles 0")]
NOISES = ["none", "depolarizing", "readout", "fake:manila", f"{OWN}:by_rx", f"{OWN}:DEVICE"]


@pytest.mark.parametrize("noise_model", NOISES)
def test_shots_and_noise_are_compared_in_standard_errors(noise_model):
    simulation = Simulation("aer", shots=500, noise_model=noise_model, strengths=Strengths(readout=(0.01, 0.06)))
    found = rows(simulation)
    names = [f"aer, noise_model {noise_model}, 500 shots: Aer by hand", *(DEVICES if noise_model == "fake:manila" else [])]
    assert list(found)[-len(names) :] == names
    for row in map(found.get, names):
        assert row.unit == "standard errors"
        assert row.passed
        assert 0 < row.values <= 5


@pytest.mark.parametrize("noise_model", NOISES[1:])
def test_noise_without_shots_is_aers_own_to_rounding(noise_model):
    simulation = Simulation("aer", noise_model=noise_model, strengths=Strengths(0.02, 0.05, (0.01, 0.06)))
    row = rows(simulation)[f"aer, noise_model {noise_model}, no shots: Aer by hand"]
    assert row.passed
    assert row.values <= 1e-10


OWN_CIRCUITS = [("cz_ladder", "depolarizing"), ("cz_ladder", "fake:manila"), ("xy", "fake:manila")]


@pytest.mark.parametrize(("example", "noise_model"), [*OWN_CIRCUITS, ("zz_observables", f"{OWN}:by_rx")])
def test_noise_of_own_circuits_and_observables(example, noise_model):
    module = OWN if example == "xy" else "axolotl_qtha.circuit.examples"
    ansatz = ansatz_of(circuit_of(f"{module}:{example}", 3, 2))
    simulation = Simulation("aer", noise_model=noise_model, strengths=Strengths(0.02, 0.05))
    found = [row for row in compare(ansatz, simulation, tokens=2, tolerance=1e-5, seed=0) if noise_model in row.engine]
    assert len(found) == (3 if noise_model.startswith("fake:") else 1)
    assert all(row.passed for row in found)


def test_a_readout_error_that_is_not_the_devices_is_found(monkeypatch):
    """The mean of the two flips, which is all a device's target knows, in the place of what its properties say."""

    def mean(backend):
        return {qubit: error for (qubit,), error in basic_device_readout_errors(target=backend.target)}

    monkeypatch.setattr(noise, "readout_errors", mean)
    found = rows(Simulation("aer", noise_model="fake:manila"))
    off = {name for name, row in found.items() if not row.passed}
    assert off >= {"aer, noise_model fake:manila, no shots: Aer by hand", DEVICES[1]}
    assert found["aer, noise_model fake:manila, no shots: Aer by hand"].values > 1e-3
    assert found[DEVICES[1]].values > 10
    assert "OFF" in drawn(list(found.values()))
    assert verdict(list(found.values()), 1e-5).startswith(
        "Off by more than chance or rounding explain: aer, noise_model fake:man"
    )


def drawn(rows):
    out = console(200)
    with out.capture() as captured:
        out.print(table(rows, Ansatz(3, 2)))
    return captured.get()


def test_a_wrong_value_is_found(monkeypatch):
    right = torch_engine.StateVector.expectations
    monkeypatch.setattr(torch_engine.StateVector, "expectations", lambda self, state: right(self, state) + 2e-5)
    off = [name for name, row in rows().items() if not row.passed]
    assert off == ["torch, cpu, float32, PyTorch", "torch, cpu, float64, PyTorch"]


def test_a_wrong_gradient_is_found(monkeypatch):
    right = torch_engine.StateVector.gradients

    def wrong(self, psi, grad):
        values, grad_z, grad_angles = right(self, psi, grad)
        return values, grad_z, grad_angles * torch.tensor([1.0, 1.0, 1.001]).to(grad_angles)

    monkeypatch.setattr(torch_engine.StateVector, "gradients", wrong)
    off = {name: row for name, row in rows().items() if not row.passed}
    assert set(off) == {"torch, cpu, float32, PyTorch", "torch, cpu, float64, PyTorch"}
    assert all(row.values <= 1e-5 < row.gradients for row in off.values())


def test_biased_shots_are_found(monkeypatch):
    from axolotl_qtha.circuit.aer import Engine

    right = Engine.expectations

    def biased(self, angles):
        return right(self, angles) + (0.2 if self.simulation.shots else 0.0)

    monkeypatch.setattr(Engine, "expectations", biased)
    found = rows(Simulation("aer", shots=1000))
    assert [name for name, row in found.items() if not row.passed] == ["aer, noise_model none, 1000 shots: Aer by hand"]


def test_command(tmp_path, monkeypatch):
    config = str(write_config(tmp_path, qtha={"quantum_backend": "aer", "shots": 200, "rank": 2}))
    done = CliRunner().invoke(verify, [config, "--tokens", "2"])
    assert done.exit_code == 0, done.output
    assert "All within 1e-05." in done.output
    assert "standard errors" in done.output
    done = CliRunner().invoke(verify, [config, "--tolerance", "1e-18"])
    assert done.exit_code == 1
    assert "Off by more than 1e-18: torch, cpu, float32, " in done.output
    done = CliRunner().invoke(verify, [str(write_config(tmp_path, qtha={"rank": 16})), "--tokens", "1"])
    assert done.exit_code == 0, done.output
    assert "4 qubits, 2 layers, 4 side by side" in done.output
    done = CliRunner().invoke(verify, [str(write_config(tmp_path, qtha={"quantum": "silu"}))])
    assert done.exit_code == 1
    assert "runs no circuit" in done.output


def test_random_angles_follow_the_seed():
    def values(seed):
        return [row.values for row in compare(Ansatz(2, 1), Simulation(), tokens=2, tolerance=1e-5, seed=seed)]

    assert np.array_equal(values(0), values(0))
    assert not np.array_equal(values(0), values(1))
