"""Adapters around circuits of the user's own: sizes, gradients, saving, and what does not go together."""

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from qiskit.quantum_info import Pauli, Statevector

from axolotl_qtha.circuit import recognised
from axolotl_qtha.circuit.aer import Engine
from axolotl_qtha.circuit.circuit_file import FILE
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.trained.adapter_folder import refuse_other_circuits
from axolotl_qtha.tuner.config import QTHAConfig
from axolotl_qtha.tuner.described import describe
from axolotl_qtha.tuner.layer import adapted_sizes
from axolotl_qtha.tuner.sizes import ansatz, count_parameters

from ..models import adapted, adapters, config, llama, logits, train, trainable

LADDER, PAIRS = "axolotl_qtha.circuit.examples:cz_ladder", "axolotl_qtha.circuit.examples:zz_observables"
MODULE = """
from qiskit.circuit import ParameterVector, QuantumCircuit

def mine(qubits, layers):
    z, theta = ParameterVector("z", qubits), ParameterVector("theta", layers * (qubits + 1))
    circuit, angles = QuantumCircuit(qubits + 1), iter(theta)
    for _ in range(layers):
        for i in range(qubits):
            circuit.{gate}(z[i], i)
        for i in range(qubits + 1):
            circuit.crx(next(angles), i, (i + 1) % (qubits + 1))
    return {{"circuit": circuit, "observables": [("ZY", [i, i + 1]) for i in range(qubits)]}}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's, importable until `sys.path` is set back; its circuit has a qubit more than it takes numbers."""
    folder = tmp_path / "importable"
    folder.mkdir()
    name = f"circuits_of_{tmp_path.name.replace('-', '_')}"
    (folder / f"{name}.py").write_text(MODULE.format(gate="rx"))
    monkeypatch.syspath_prepend(str(folder))
    yield f"{name}:mine"
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "variant", [{}, {"quantum": "frozen"}, {"quantum": "product"}, {"mpo": "none"}, {"angle_scale": "learned"}]
)
@pytest.mark.parametrize("circuit", [LADDER, PAIRS, "reuploading"])
def test_what_is_counted_is_what_is_made_and_trains_and_loads(circuit, variant, tmp_path):
    model = adapted(llama(), circuit=circuit, qubits=2, rank_pattern={"k_proj": 6}, **variant)
    made, settings = trainable(model), model.peft_config["default"]
    assert count_parameters(settings, adapted_sizes(model)) == sum(tensor.numel() for tensor in made.values())
    before = {name: tensor.detach().clone() for name, tensor in made.items()}
    train(model)
    assert not any(torch.equal(before[name], tensor) for name, tensor in made.items())
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / FILE).is_file()
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_it_loads_without_the_module_it_came_from(module, tmp_path, monkeypatch):
    model = train(adapted(llama(), circuit=module, qubits=2))
    model.save_pretrained(str(tmp_path / "saved"))
    monkeypatch.undo()
    sys.modules.pop(module.partition(":")[0])
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "saved"), is_trainable=True).eval()
    assert torch.equal(logits(loaded), logits(model))
    train(loaded, steps=1).save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / FILE).is_file()
    with pytest.raises(ValueError, match="cannot be imported"):
        ansatz(config(circuit=module))


def test_the_circuit_of_a_layer_is_the_one_of_qiskit(module):
    """From z to q of one layer, against Aer with the layer's own angles: float32, 1e-5."""
    model = train(adapted(llama(), circuit=module, qubits=2))
    adapter = adapters(model)["model.layers.0.self_attn.q_proj"]
    branch, z = adapter.bottleneck().branch, torch.randn(5, 4)
    aer = Engine(branch.ansatz, Simulation("aer"), None)
    with torch.no_grad():
        points = aer.gates.points(branch.encode(z).double().numpy(), branch.angles.double().numpy())
        assert np.abs(aer.expectations(points).reshape(5, 4) - branch(z).numpy()).max() <= 1e-5


def test_a_layer_in_qiskit(module):
    """Two blocks of three qubits, each with observables of its own: float32, 1e-5."""
    adapter = adapters(train(adapted(llama(), circuit=module, qubits=2)))["model.layers.0.self_attn.q_proj"]
    z = torch.randn(4)
    states = [Statevector(circuit) for circuit in adapter.to_qiskit(z)]
    labels = ansatz(adapter.config).described().observables
    found = [state.expectation_value(Pauli(label)).real for state in states for label in labels]
    with torch.no_grad():
        assert np.abs(adapter.bottleneck().branch(z).numpy() - found).max() <= 1e-5


def test_an_adapter_without_its_circuit_is_refused(tmp_path):
    train(adapted(llama(), circuit=LADDER)).save_pretrained(str(tmp_path))
    (tmp_path / FILE).unlink()
    with pytest.raises(ValueError, match=r"holds no circuit.qpy.*copied whole"):
        PeftModel.from_pretrained(llama(), str(tmp_path))


def test_nothing_is_imported_for_a_strangers_adapter(tmp_path):
    """The name in its adapter_config.json may be anything."""
    train(adapted(llama(), circuit=LADDER)).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"circuit": "antigravity:fly"}))
    before = set(sys.modules)
    PeftModel.from_pretrained(llama(), str(tmp_path))
    assert "antigravity" not in set(sys.modules) - before


def test_a_circuit_that_has_changed_is_no_continuation(module, tmp_path, monkeypatch):
    model = train(adapted(llama(), circuit=module, qubits=2))
    model.save_pretrained(str(tmp_path / "saved"))
    refuse_other_circuits("resume_from_checkpoint", tmp_path / "saved", model.peft_config["default"])
    name = module.partition(":")[0]
    path = sys.modules.pop(name).__file__
    with open(path, "w") as file:
        file.write(MODULE.format(gate="ry"))
    recognised._called.cache_clear()  # as in another process
    importlib.invalidate_caches()
    changed = config(circuit=module, qubits=2)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*another circuit than .* gives now"):
        refuse_other_circuits("resume_from_checkpoint", tmp_path / "saved", changed)


def test_fast_circuits_of_the_users_own_equal_the_built_in_one(tmp_path, monkeypatch):
    (tmp_path / "as_built_in.py").write_text(
        "from axolotl_qtha.circuit.ansatz import Ansatz\n\n"
        "def same(qubits, layers):\n    return Ansatz(qubits, layers).circuit()\n"
    )
    monkeypatch.chdir(tmp_path)
    built_in, mine = adapted(llama()), adapted(llama(), circuit="as_built_in:same")
    mine.load_state_dict(train(built_in).state_dict())
    assert torch.equal(logits(mine), logits(built_in))
    assert not ansatz(mine.peft_config["default"]).is_own


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"circuit": "a b"}, "qtha.circuit: 'a b' is neither an import path nor a name"),
        ({"circuit": LADDER, "quantum": "none"}, "qtha.circuit: .* has no effect with `quantum: none`"),
        ({"circuit": LADDER, "quantum": "silu"}, "qtha.circuit: .* has no effect with `quantum: silu`"),
        ({"circuit": LADDER, "gate_order": "2025-05"}, "qtha.gate_order: '2025-05' is the built-in circuit's"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        QTHAConfig(**settings)


def test_it_is_described(module):
    model = adapted(llama(), circuit=module, qubits=2)
    text = " ".join(describe(model.active_peft_config, adapted_sizes(model)))
    assert f"2 circuits of 3 qubits by {module}" in text


def test_a_copy_of_the_configuration_keeps_its_circuits(tmp_path):
    train(adapted(llama(), circuit=LADDER)).save_pretrained(str(tmp_path))
    read = QTHAConfig.from_pretrained(str(tmp_path))
    assert ansatz(copy.deepcopy(read)) == ansatz(read)
    assert ansatz(read.of_layer("model.layers.0.self_attn.q_proj")) == ansatz(read)


RANK = """
import sys
import torch.distributed as dist
from axolotl_qtha.tuner.model import agree_on_circuits
from tests.models import adapted, llama

rank, store, circuit = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
agree_on_circuits(adapted(llama(1), circuit=circuit, qubits=2, target_modules=["q_proj"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("agree", [True, False])
def test_ranks_have_one_circuit(agree, tmp_path):
    """Two real processes; a function that draws random numbers without a seed would train a different circuit on each."""
    angle = "0.3" if agree else "float(os.getpid())"
    body = MODULE.format(gate="rx").replace("return {", f"circuit.rx({angle}, 0)\n    return {{")
    (tmp_path / "ranked_circuits.py").write_text("import os\n" + body)
    (tmp_path / "rank.py").write_text(RANK)
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"}
    command = [sys.executable, str(tmp_path / "rank.py")]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), "ranked_circuits:mine"], env=env, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    words = [rank.communicate(timeout=200)[1].decode() for rank in ranks]
    assert ranks[0].returncode == 0, words[0]
    assert (ranks[1].returncode == 0) is agree, words[1]
    assert ("'ranked_circuits:mine' gives another circuit on rank 1 than on rank 0" in words[1]) is not agree
