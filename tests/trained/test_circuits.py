"""A trained layer's circuit from the adapter's folder alone: that of the loaded adapter; written, and read back."""

import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from qiskit import qpy
from qiskit.quantum_info import Statevector

from axolotl_qtha.cli.circuit import draw
from axolotl_qtha.trained.circuits import trained_angles, trained_circuit

from ..circuit.reference import z_expectations
from ..e2e.commands import write_config
from ..models import adapted, adapters, llama, train

EXACT = 1e-12  # two float64 state vectors of the same gates
Q, K = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def saved(folder, **settings):
    """Return a trained model, which lies in the folder as well."""
    model = train(adapted(llama(), **settings), steps=1)
    model.save_pretrained(folder)
    return model


def bound(circuit, z):
    """Return the circuit with the encoded inputs z (n), found by their places."""
    return circuit.assign_parameters({parameter: z[parameter.index] for parameter in circuit.parameters})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quantum": "frozen", "gate_order": "2025-05", "mpo": "none"},
        {"rank": 8, "qubits": 4},
        {"rank_pattern": {"k_proj": 2}},
        {"share": {"inputs": True}},
    ],
    ids=str,
)
def test_it_is_that_of_the_loaded_adapter(tmp_path, settings):
    model = saved(tmp_path, **settings)
    for layer in (Q, K):
        module = adapters(model)[layer]
        n, z = module.config.circuit_qubits, torch.linspace(-2, 2, module.config.rank).double()
        encoded = module.bottleneck().branch.encode(z)
        for block in range(module.config.blocks):
            circuit, blocks = trained_circuit(tmp_path, layer, block)
            assert blocks == module.config.blocks
            assert circuit.metadata == {"layer": layer, "block": block}
            found = z_expectations(bound(circuit, encoded[block * n : (block + 1) * n].tolist()))
            with torch.no_grad():
                q = module.double().bottleneck().branch(z)
            assert np.abs(found - q[block * n : (block + 1) * n].numpy()).max() < EXACT


@pytest.mark.parametrize("share", [{"layers": 2}, {"layers": 3, "inputs": True}], ids=str)
def test_each_layer_has_the_angles_that_it_shares(tmp_path, share):
    """With more than ten layers, whose names in order of their letters are not those in order of their numbers."""
    model = adapted(llama(12), share=share, circuit_layers=1)
    with torch.no_grad():
        for number, angles in enumerate({id(own.angles): own.angles for own in adapters(model).values()}.values()):
            angles.fill_(number / 50)
    model.save_pretrained(tmp_path)
    for name, module in adapters(model).items():
        assert torch.equal(trained_angles(tmp_path, name)[2], module.effective("angles").double()), name


def test_names(tmp_path):
    saved(tmp_path)
    assert trained_circuit(tmp_path, "1.self_attn.q_proj")[0].name == Q
    for layer, words in {
        "layers.1.self_attn.q_prj": rf"is no layer of the adapter. What works: `--layer {Q}`",
        "q_proj": r"is the end of 2 names. What works: `--layer model.layers.0.self_attn.q_proj`, `--layer model.layers.1",
        "elf_attn.q_proj": "is no layer of the adapter",
        None: r"--layer: None names no layer. What works: .* and \d+ others",
    }.items():
        with pytest.raises(ValueError, match=words):
            trained_circuit(tmp_path, layer)
    with pytest.raises(ValueError, match=r"--block: 1 is none of the 1 circuits of .*What works: `--block 0`"):
        trained_circuit(tmp_path, Q, 1)


def test_without_a_circuit(tmp_path):
    saved(tmp_path, quantum="none")
    with pytest.raises(ValueError, match=r"has `quantum: none`, without a circuit"):
        trained_circuit(tmp_path, Q)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    saved(folder, rank=8, qubits=4)
    return folder


def invoke(folder, tmp_path, *arguments):
    config = write_config(tmp_path, qtha={"rank": 8, "qubits": 4})
    done = CliRunner().invoke(draw, [str(config), "--lora-model-dir", str(folder), *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("format", ["qasm3", "qpy", "png", "pdf"])
def test_formats(folder, tmp_path, format, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = invoke(folder, tmp_path, "--layer", Q, "--block", 1, "--format", format)
    assert code == 0, text
    path = tmp_path / f"{Q}-1.{'qasm' if format == 'qasm3' else format}"
    assert f"{path.name} written" in text
    assert f"{Q}-1: block 1 of 2. z stays free: the encoded inputs, in radians" in text
    expected, _ = trained_circuit(folder, Q, 1)
    z = [0.1, -0.2, 0.3, 0.4]
    if format == "qpy":
        (circuit,) = qpy.load(path.open("rb"))
        assert [gate.name for gate in circuit.data] == [gate.name for gate in expected.data]
        assert circuit.name == expected.name
        assert circuit.metadata == {"layer": Q, "block": 1}
        assert np.abs(Statevector(bound(circuit, z)).data - Statevector(bound(expected, z)).data).max() < EXACT
    elif format == "qasm3":
        written = path.read_text()
        assert re.findall(r"^input (\S+) (\w+);$", written, flags=re.MULTILINE) == [("float[64]", f"_z_{i}_") for i in range(4)]
        numbers = [float(angle) for angle in re.findall(r"^c?r[yz]\((-?[\d.e-]+)\)", written, flags=re.MULTILINE)]
        assert numbers == [gate.operation.params[0] for gate in expected.data if isinstance(gate.operation.params[0], float)]
        assert len(numbers) == 32
    elif format == "png":
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(image.convert("L").getcolors()) > 2
    else:
        assert path.read_bytes().startswith(b"%PDF")


def test_qasm_is_read_back(folder, tmp_path):
    """By Qiskit's own reader, where its package is installed, with numbers in the place of the inputs."""
    pytest.importorskip("qiskit_qasm3_import")
    from qiskit import qasm3

    path, z = tmp_path / "circuit.qasm", [0.1, -0.2, 0.3, 0.4]
    assert invoke(folder, tmp_path, "--layer", Q, "--output", path)[0] == 0
    text = re.sub(r"^input .*\n", "", path.read_text(), flags=re.MULTILINE)
    for i, number in enumerate(z):
        text = text.replace(f"_z_{i}_", str(number))
    expected = Statevector(bound(trained_circuit(folder, Q, 0)[0], z)).data
    assert np.abs(Statevector(qasm3.loads(text)).data - expected).max() < EXACT


def test_command_errors(folder, tmp_path):
    for arguments, words in {
        (): "--layer: None names no layer",
        ("--layer", Q, "--block", 2): "--block: 2 is none of the 2 circuits",
        ("--layer", Q, "--output", tmp_path / "circuit.txt"): "has an ending of no known format. What works: .qasm, .qpy",
        ("--layer", Q, "--output", tmp_path): "is a directory",
        ("--layer", Q, "--output", tmp_path / "adapter.yml" / "x.qpy"): "cannot be written",
    }.items():
        (tmp_path / "adapter.yml").touch()
        code, text = invoke(folder, tmp_path, *arguments)
        assert code != 0
        assert words in text, text
    code, text = invoke(tmp_path / "none", tmp_path, "--layer", Q)
    assert "holds no trained adapter" in text
