"""A circuit of the user's own, from the YAML to a device: trained, saved, and used without the module it came from."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from axolotl_qtha.circuit import circuit_file, recognised
from axolotl_qtha.cli.circuit import draw, verify
from axolotl_qtha.cli.export import export
from axolotl_qtha.cli.ibm import hardware_eval
from axolotl_qtha.cli.plan import plan

from .commands import QUICKSTART, losses, train_here, write_config

pytestmark = pytest.mark.e2e

MODULE = '''
from qiskit.circuit import ParameterVector, QuantumCircuit

def mine(qubits, layers):
    """RX encoding, a ladder of CZ, and ZX of neighbouring qubits."""
    z, theta = ParameterVector("z", qubits), ParameterVector("theta", 2 * layers * qubits)
    circuit, angles = QuantumCircuit(qubits), iter(theta)
    for _ in range(layers):
        for i in range(qubits):
            circuit.rx(z[i], i)
            circuit.ry(next(angles), i)
        for i in range(qubits - 1):
            circuit.cz(i, i + 1)
        for i in range(qubits):
            circuit.rz(next(angles) + z[i] / 2, i)
            circuit.rx(0.3, i)
    return {"circuit": circuit, "observables": [("ZX", [i, (i + 1) % qubits]) for i in range(qubits)]}
'''
STEPS = 5
# of ibm.yml, whose adapter has two layers: the same on the exact simulator
SMALL = {"rank": 2, "circuit": "circuits_of_mine:mine", "quantum_backend": "torch", "ibm": None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five steps with a module that lies in the current directory, which is left and forgotten afterwards."""
    folder, here = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("here")
    (here / "circuits_of_mine.py").write_text(MODULE)
    yml = write_config(folder, "ibm.yml", max_steps=STEPS, save_steps=STEPS, qtha=SMALL)
    outputs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        _, _, trainer = train_here(yml)
        for command in (plan, draw, verify):
            done = CliRunner().invoke(command, [str(yml)])
            assert done.exit_code == 0, done.output[-4000:]
            outputs[command.name] = done.output
    sys.modules.pop("circuits_of_mine")
    recognised._called.cache_clear()
    return SimpleNamespace(folder=folder, yml=yml, out=folder / "out", log=losses(trainer), outputs=outputs)


def test_it_trains(trained):
    assert sorted(trained.log) == list(range(1, STEPS + 1))
    tensors = load_file(trained.out / "adapter_model.safetensors")
    angles = [tensor for name, tensor in tensors.items() if name.endswith("angles")]
    assert [len(tensor) for tensor in angles] == 2 * [4], "2 * layers * qubits, of two layers of the model"
    assert all(bool(tensor.isfinite().all()) for tensor in angles)


def test_the_circuit_lies_beside_it(trained):
    for folder in (trained.out, trained.out / f"checkpoint-{STEPS}"):
        found = circuit_file.read(folder / "circuit.qpy", "mine")[2]
        assert found.observables == ("XZ", "ZX")
        assert len(found.trained) == 4
    assert json.loads((trained.out / "adapter_config.json").read_text())["circuit"] == "circuits_of_mine:mine"
    card = (trained.out / "README.md").read_text()
    assert "Given by `circuits_of_mine:mine` and kept as `circuit.qpy`, on 2 qubits" in card
    assert "`XZ`, `ZX` are read out" in card


def test_plan_draw_and_verify_are_of_this_circuit(trained):
    assert "run one by one in PyTorch" in " ".join(trained.outputs["qtha-plan"].split())
    assert "Rx(z[0])" in trained.outputs["qtha-draw"]
    assert "All within 1e-05" in trained.outputs["qtha-verify"]


def test_training_on_with_another_circuit_is_refused(trained, tmp_path, monkeypatch):
    (tmp_path / "circuits_of_mine.py").write_text(MODULE.replace("circuit.rx(0.3, i)", "circuit.rx(0.4, i)"))
    monkeypatch.chdir(tmp_path)
    yml = write_config(tmp_path, "ibm.yml", lora_model_dir=str(trained.out), qtha=SMALL)
    with pytest.raises(ValueError, match=r"lora_model_dir: .* was trained with another circuit than"):
        train_here(yml)
    sys.modules.pop("circuits_of_mine")
    recognised._called.cache_clear()


def test_a_device_without_the_module(trained, tmp_path):
    ibm = yaml.safe_load((QUICKSTART / "ibm.yml").read_text())["qtha"]["ibm"]
    on_device = {"circuit": SMALL["circuit"], "ibm": {**ibm, "journal": str(tmp_path / "journal")}}
    yml = write_config(tmp_path, "ibm.yml", qtha=on_device)
    arguments = [str(yml), "--lora-model-dir", str(trained.out), "--samples", "2", "--tokens", "4"]
    done = CliRunner().invoke(hardware_eval, arguments)
    assert done.exit_code == 0, done.output[-4000:]
    found = json.loads((tmp_path / "out" / "hardware-eval" / "hardware_eval.json").read_text())
    exact, *others = found["ways"]
    for way in others:
        assert len(way["deviation"]["bias"]) == 2
        assert np.abs(way["deviation"]["bias"]).max() < 0.2
        assert way["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05)
    assert "XZ" in done.output


def test_an_export_without_the_module(trained, tmp_path):
    arguments = [str(trained.yml), "--out", str(tmp_path / "lora"), "--tokens", "512"]
    done = CliRunner().invoke(export, arguments)
    assert done.exit_code == 0, done.output[-4000:]
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_five_steps_on_aer_go_the_same_way(trained, tmp_path, monkeypatch):
    """Aer's gradients by parameter shift, in double precision: losses as the exact engine's, to single precision's 1e-4."""
    (tmp_path / "circuits_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yml = write_config(
        tmp_path, "ibm.yml", max_steps=2, save_steps=None, eval_steps=None, qtha=SMALL | {"quantum_backend": "aer"}
    )
    _, _, trainer = train_here(yml)
    found = losses(trainer)
    assert found == pytest.approx({step: trained.log[step] for step in found}, abs=1e-4)
    assert torch.isfinite(torch.tensor(list(found.values()))).all()


def test_exponential_scales_train_in_the_quickstart(tmp_path):
    """By name, on the general engine, from small angles: the saved ones are within some steps of where they started."""
    block = {"rank": 4, "circuit": "reuploading", "init_angles": 0.05}
    short = {"max_steps": 2, "save_steps": 2, "eval_steps": 2, "overrides_of_model_config": {"num_hidden_layers": 1}}
    _, _, trainer = train_here(write_config(tmp_path, qtha=block, **short))
    assert np.isfinite(list(losses(trainer).values())).all()
    out = tmp_path / "out"
    assert (out / circuit_file.FILE).is_file()
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["circuit"], saved["init_angles"]) == ("reuploading", 0.05)
    tensors = load_file(out / "adapter_model.safetensors")
    angles = torch.cat([tensor for name, tensor in tensors.items() if name.endswith("angles")])
    assert 0.03 < float(angles.abs().max()) < 0.3
