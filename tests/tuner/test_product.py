"""`quantum: product`, the circuit without its two-qubit gates: against Qiskit's circuit with those taken out, and its formula."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from qiskit import QuantumCircuit

from axolotl_qtha import QTHAConfig
from axolotl_qtha.circuit import torch_engine
from axolotl_qtha.circuit.ansatz import GATE_ORDERS, Ansatz
from axolotl_qtha.ibm import engine
from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.runner import Runner
from axolotl_qtha.ibm.service import LocalService
from axolotl_qtha.planner.flops import gate_counts
from axolotl_qtha.tuner.adapter import QTHAAdapter
from axolotl_qtha.tuner.backends import expectation_values
from axolotl_qtha.tuner.described import branch
from axolotl_qtha.tuner.sizes import adapter_shape, ansatz

from ..circuit.reference import z_expectations
from ..ibm.boundary import NOISELESS
from ..models import adapted, gradients, llama, logits, train

ENGINES = {"in PyTorch": torch_engine.in_pytorch, "as it chooses": contextlib.nullcontext}
ROTATES = {order: [k for k, kind in enumerate(kinds[1:]) if kind == "rotate"] for order, kinds in GATE_ORDERS.items()}


def without_entangling(circuit):
    """Return a circuit without its gates of several qubits."""
    left = QuantumCircuit(circuit.num_qubits)
    for gate in circuit.data:
        if len(gate.qubits) == 1:
            left.append(gate)
    return left


def qiskit(rank, layers, order, z, theta):
    """Return <Z> (rank) of the circuit without CRZ, and d sum(weights <Z>) / dz and / dtheta by parameter shift.

    Args:
        rank: qubits.
        layers: of the circuit.
        order: of its gates.
        z: inputs (rank).
        theta: angles of the RY alone (2 * layers, rank), in radians.
    """
    full = Ansatz(rank, layers, order)
    rows = [4 * layer + k for layer in range(layers) for k in ROTATES[order]]  # of the RY among all angles
    circuit = without_entangling(full.circuit())
    assert set(circuit.count_ops()) == {"ry"}
    weights = np.arange(1, rank + 1)
    places = [(gate.operation.params[0], circuit.find_bit(gate.qubits[0]).index) for gate in circuit.data]

    def values(shift=0.0, at=-1):
        bound = QuantumCircuit(rank)
        for k, (parameter, qubit) in enumerate(places):
            row, column = divmod(parameter.index, rank)
            angle = z[column] if parameter.vector.name == "z" else theta[rows.index(row), column]
            bound.ry(angle + (shift if k == at else 0.0), qubit)
        return z_expectations(bound)

    of_z, of_theta = np.zeros(rank), np.zeros_like(theta)
    for k, (parameter, _) in enumerate(places):
        slope = weights @ (values(math.pi / 2, k) - values(-math.pi / 2, k)) / 2
        row, column = divmod(parameter.index, rank)
        if parameter.vector.name == "z":
            of_z[column] += slope
        else:
            of_theta[rows.index(row), column] += slope
    return values(), of_z, of_theta


@pytest.mark.parametrize("order", GATE_ORDERS)
@pytest.mark.parametrize("how", ENGINES)
def test_values_and_gradients_are_those_of_qiskits_circuit_without_its_two_qubit_gates(how, order):
    rank, layers = 4, 2
    made = ansatz(QTHAConfig(rank=rank, circuit_layers=layers, quantum="product"))
    assert (made.qubits, made.rows) == (1, 2 * layers)
    random = np.random.default_rng(0)
    z, theta = random.uniform(-4, 4, rank), random.uniform(-4, 4, (2 * layers, rank))
    ours = [torch.tensor(array, requires_grad=True) for array in (z[None], theta)]
    with ENGINES[how]():
        found = torch_engine.expectation_values(*ours, made)
        slopes = torch.autograd.grad((found * torch.arange(1, rank + 1)).sum(), ours)
    expected, of_z, of_theta = qiskit(rank, layers, order, z, theta)
    # float64 rounding of a dozen gates
    assert np.abs(found[0].detach().numpy() - expected).max() <= 1e-12
    assert np.abs(slopes[0][0].numpy() - of_z).max() <= 1e-12
    assert np.abs(slopes[1].numpy() - of_theta).max() <= 1e-12
    # all turn about one axis, so that their angles add up
    assert np.abs(expected - np.cos(layers * z + theta.sum(0))).max() <= 1e-12


@pytest.mark.parametrize("scale", ["raw", "tanh", "learned"])
def test_the_adapter(scale):
    settings = QTHAConfig(rank=3, bond_dim=2, mid_dim=4, circuit_layers=2, quantum="product", angle_scale=scale)
    adapter = QTHAAdapter(settings, adapter_shape(settings, 10, 12), 0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter.state_names().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(5, 10, generator=generator, dtype=torch.float64)
    z = x @ adapter.fold_a().T
    turned = {"raw": z, "tanh": math.pi * torch.tanh(z / math.pi)}.get(scale, z)
    turned = turned * adapter.effective("scale") if scale == "learned" else turned
    q = np.stack(
        [qiskit(3, 2, "2025-06", row, adapter.effective("angles").detach().numpy())[0] for row in turned.detach().numpy()]
    )
    h = z @ adapter.effective("w_c").T + torch.tensor(q) @ adapter.effective("w_q").T
    expected = h @ adapter.fold_b().T
    assert (adapter(x) - expected).abs().max() <= 1e-10 * expected.abs().max()  # float64 rounding
    adapter.eval()
    with torch.no_grad():  # the path of `generate()`
        assert (adapter(x[:1]) - expected[:1]).abs().max() <= 1e-10 * expected.abs().max()


def test_parameters():
    """It has 2 r L angles, half those of the circuit; any rank will do."""
    for rank, layers in ((1, 1), (4, 2), (8, 3), (13, 2), (64, 1)):
        settings = QTHAConfig(rank=rank, bond_dim=1, mid_dim=rank, circuit_layers=layers, quantum="product")
        parts = adapter_shape(settings, 24, 40).parts
        assert parts["branch"] == 2 * rank * layers
        assert parts["w_q"] == rank**2
    assert branch(settings) == "quantum: product (64 circuits of 1 qubit)"
    assert gate_counts(settings) == {"ry": 3}
    with_gates = QTHAConfig(rank=8, bond_dim=1, mid_dim=8, circuit_layers=3)
    assert adapter_shape(with_gates, 24, 40).parts["branch"] == 2 * 2 * 8 * 3


@pytest.mark.parametrize(("key", "value"), [("qubits", 1), ("qubits", 4), ("gate_order", "2025-05")])
def test_what_asks_for_entangling_gates_is_refused(key, value):
    words = rf"qtha.{key}: {value!r} has no effect with `quantum: product`. What works: leave {key} out"
    with pytest.raises(ValueError, match=words):
        QTHAConfig(rank=8, quantum="product", **{key: value})


def test_it_trains_and_comes_back_from_disk(tmp_path):
    model = train(adapted(llama(), quantum="product", rank=3))
    slopes = gradients(model)
    angles = [slopes[name] for name in slopes if name.endswith("angles.default") or "angles" in name]
    assert angles
    assert all(slope.abs().max() > 0 for slope in angles)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["qubits"] is None
    again = PeftModel.from_pretrained(llama(), str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    assert again.peft_config["default"].quantum == "product"


@pytest.mark.parametrize("settings", [{}, {"noise_model": "fake:manila", "shots": 1000}], ids=["exact", "noisy"])
def test_on_aer(settings):
    """As any circuit; a device of five qubits has room for it whatever the rank."""
    small = {"quantum": "product", "rank": 7, "circuit_layers": 1, "target_modules": ["q_proj"], "mpo": "none"}
    exact = train(adapted(llama(), **small), steps=1)
    aer = adapted(llama(), **small, quantum_backend="aer", **settings)
    aer.load_state_dict(exact.state_dict())
    off = (logits(aer) - logits(exact)).abs().max()
    assert 0 < off < 1 if settings else off <= 1e-5  # float32


@pytest.mark.filterwarnings("ignore:.*no QubitProperties")
def test_on_a_noiseless_device(tmp_path, monkeypatch):
    """Values and gradients of circuits of one qubit, side by side, within five standard errors of their shots."""
    shots, rank = 2000, 2
    ibm = {"backend": "fake:manila", "shots": shots, "tokens_per_step": 3, "resilience_level": 0, "journal": str(tmp_path)}
    settings = QTHAConfig(rank=rank, circuit_layers=1, quantum="product", quantum_backend="ibm", ibm=ibm)
    made, how = ansatz(settings), settings.simulation
    journal = Journal(tmp_path)
    runner = Runner(made, settings.ibm, LocalService(NOISELESS, settings.ibm), journal)
    monkeypatch.setattr(engine, "runner", lambda *_: runner)
    random = np.random.default_rng(1)
    inputs = [torch.tensor(random.uniform(-2, 2, shape), requires_grad=True) for shape in ((3, rank), (made.rows, rank))]
    try:
        found, exact = expectation_values(*inputs, made, how), torch_engine.expectation_values(*inputs, made)
        off = (found - exact).abs().max()
        assert 0 < off <= 5 / shots**0.5
        slopes = [torch.autograd.grad(values.sum(), inputs) for values in (found, exact)]
        for ours, expected in zip(*slopes, strict=True):  # halves of differences of two circuits, of up to 3 tokens and 2 gates
            assert (ours - expected).abs().max() <= 5 * (3 * 2 / (2 * shots)) ** 0.5
    finally:
        engine.CALLS.take()
        journal.close()
