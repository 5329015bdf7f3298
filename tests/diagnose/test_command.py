"""`axolotl qtha-diagnose`: what it refuses, and its files; with a trained adapter its z are the data's own."""

import json

import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM

from axolotl_qtha import QTHAConfig
from axolotl_qtha.circuit.simulation import EXACT
from axolotl_qtha.cli.diagnose import diagnose
from axolotl_qtha.diagnose import command
from axolotl_qtha.diagnose.trained import trained_circuit

from ..e2e.commands import QUICKSTART, write_config
from ..models import adapters

LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.v_proj"]
FEW = ("--initialisations", "10", "--pairs", "100")


def invoke(config, *arguments):
    done = CliRunner().invoke(diagnose, [str(config), *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.slow
def test_at_initialisation(tmp_path):
    config = write_config(tmp_path, base_model=str(tmp_path / "no-base"))  # no model is loaded
    code, text = invoke(config, *FEW, "--qubits", "2,3,4", "--circuit-layers", 1)
    assert code == 0, text
    assert "1 layer, global: log2 Var changes by -" in text
    assert "* 4" in text  # the configuration's own, of two layers, beside those that were asked for
    found = json.loads((tmp_path / "out" / "diagnose" / "diagnose.json").read_text())
    assert [(each["qubits"], each["layers"]) for each in found["studies"]] == [(2, 1), (3, 1), (4, 1), (4, 2)]
    assert found["circuit"]["gate_order"] == "2025-06"
    options = {"initialisations": 10, "pairs": 100, "seed": 0, "qubits": [2, 3, 4], "circuit_layers": [1]}
    assert options.items() <= found["options"].items()
    assert found["trained"] == []
    with Image.open(tmp_path / "out" / "diagnose" / "diagnose.png") as image:
        assert image.format == "PNG"
    assert (tmp_path / "out" / "diagnose" / "diagnose.pdf").is_file()
    code, text = invoke(config, *FEW)
    assert code == 1
    assert "holds a diagnose.json. What works: another folder, or `--overwrite` to replace it" in text
    code, text = invoke(config, *FEW, "--qubits", 2, "--circuit-layers", 1, "--overwrite")
    assert code == 0, text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--qubits", "4,13"], "--qubits: '4,13' is not between 1 and 12. What works: `--qubits 4,6,8,10`"),
        (["--qubits", "four"], "--qubits: 'four' is no list of whole numbers"),
        (["--circuit-layers", "0"], "--circuit-layers: '0' is not between 1 and 64"),
        (["--initialisations", "1"], "--initialisations: 1 is below 2. What works: `--initialisations 200`"),
        (["--pairs", "10"], "--pairs: 10 is below 100. What works: `--pairs 2000`"),
        (["--tokens", "2"], "--tokens: 2 is below 8"),
        (["--modules", "0"], "--modules: 0 is below 1"),
        (["--seed", "-1"], "--seed: -1 is below 0"),
        (["--lora-model-dir", "nowhere"], "--lora-model-dir: 'nowhere' holds no trained adapter"),
    ],
)
def test_options_that_are_refused(tmp_path, arguments, words):
    code, text = invoke(write_config(tmp_path), *arguments)
    assert code == 1
    assert words in text


def test_a_yaml_or_folder_that_is_refused(tmp_path):
    assert "qtha.quantum: 'silu' runs no circuit" in invoke(write_config(tmp_path, qtha={"quantum": "silu"}))[1]
    (tmp_path / "file").touch()
    assert "is a file. What works: a folder" in invoke(write_config(tmp_path), "--out", tmp_path / "file")[1]
    assert "cannot be written" in invoke(write_config(tmp_path), "--out", "/proc/diagnose")[1]


BLOCK = {"rank": 8, "qubits": 4, "target_modules": ["q_proj", "v_proj"], "angle_scale": "learned", "bond_dim": 2, "mid_dim": 8}


def adapter(folder, change):
    """Write an adapter whose scale is 1.5, and whose cores are changed by a number, in which a no-op's last core is zero."""
    base = AutoModelForCausalLM.from_pretrained(QUICKSTART / "base")
    model = get_peft_model(base, QTHAConfig(task_type="CAUSAL_LM", alpha=8, **BLOCK))
    with torch.no_grad():
        for module in adapters(model).values():
            module.scale.fill_(1.5)
            module.cores.add_(change)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_trained_adapter(tmp_path, monkeypatch):
    """Files and names; and each z is 1.5 times A x of an x that the layer was given."""
    seen, used, loaded_adapters, real = [], [], [], command.load_model_and_tokenizer

    def load(**options):
        loaded = real(**options)
        layer = loaded[0].get_submodule(f"base_model.model.{LAYERS[0]}")
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().flatten(0, -2)))
        used.append(layer.qtha_adapter["default"].fold_a().detach())
        loaded_adapters.append(layer.qtha_adapter["default"])
        return loaded

    monkeypatch.setattr(command, "load_model_and_tokenizer", load)
    monkeypatch.setattr(command, "trained_circuit", lambda *given: used.append(given[2]) or trained_circuit(*given))
    config = write_config(tmp_path, qtha={**BLOCK, "param_budget": None, "quantum_backend": "aer", "shots": 16})
    fixed = (*FEW, "--qubits", 2, "--circuit-layers", 1, "--overwrite", "--lora-model-dir")
    code, text = invoke(config, *fixed, adapter(tmp_path / "adapter", 0.05), "--modules", 3, "--tokens", 32)
    assert code == 0, text[-2000:]
    found = json.loads((tmp_path / "out" / "diagnose" / "diagnose.json").read_text())
    names = [(each["layer"], each["block"]) for each in found["trained"]]
    assert names == [(layer, block) for layer in LAYERS for block in (0, 1)]
    assert found["text"] == "the evaluation data"
    assert all(each["tokens"] == 32 and len(each["random"]) == 20 for each in found["trained"])
    assert "trained, on z of the evaluation data" in text
    whole, encoded = 1.5 * torch.cat(seen) @ used[0].T, torch.cat(used[1:3], dim=1)
    assert float(torch.cdist(encoded.double(), whole.double()).amin(1).max()) < 1e-5  # float32
    assert loaded_adapters[0].config.simulation == EXACT  # whatever the YAML says
    code, text = invoke(config, *fixed, tmp_path / "adapter", "--tokens", 1_000_000)
    assert code == 1
    assert "--tokens: 1000000 is more than the evaluation data has" in text
    assert "is an untrained adapter" in invoke(config, *fixed, adapter(tmp_path / "untrained", 0))[1]
