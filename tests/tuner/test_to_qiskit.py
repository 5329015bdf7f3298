"""From one layer's adapter to Qiskit: what its bound circuits read out is the adapter's own q."""

import numpy as np
import pytest
import torch

from ..circuit.reference import z_expectations
from ..models import adapted, adapters, llama, logits, train
from .test_adapter import adapter, features

# Of an adapter in float32 its angles and z are rounded alike for both; the engine adds up to some 1e-7 a gate. In float64: 1e-15.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
CASES = [
    {"angle_scale": "tanh"},
    {"angle_scale": "raw", "gate_order": "2025-05"},
    {"angle_scale": "learned", "rank": 12, "qubits": 4},
    {"quantum": "frozen"},
    {"quantum": "qwthn", "rank": 1},
]


def of_qiskit(module, z):
    """Return q (tokens, r)."""
    return np.stack([np.concatenate([z_expectations(circuit) for circuit in module.to_qiskit(row)]) for row in z])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_its_q(settings, dtype):
    module = adapter(mid_dim=12, **settings).to(dtype)
    if module.shape.learns_scale:
        torch.nn.init.uniform_(module.scale, 0.5, 2)
    z = 3 * features().to(dtype) @ module.fold_a().detach().T  # beyond pi, so that tanh bends it
    circuits = module.to_qiskit(z[0])
    assert len(circuits) == module.config.blocks
    assert {circuit.num_parameters for circuit in circuits} == {0}
    assert {circuit.num_qubits for circuit in circuits} == {module.config.circuit_qubits}
    q = module.bottleneck().branch(z).detach().numpy()
    assert np.abs(of_qiskit(module, z) - q).max() < TOLERANCE[dtype]
    assert np.allclose(of_qiskit(module, z[:1].detach().numpy()), q[:1], atol=TOLERANCE[dtype])  # an array as well


@pytest.mark.parametrize("share", [None, {"inputs": True}], ids=str)
def test_a_trained_layer(share):
    model = train(adapted(llama(), share=share))
    seen = {}
    for name, module in adapters(model).items():
        module.seen = lambda z, name=name: seen.setdefault(name, z.flatten(0, -2))
    logits(model)
    layer = "model.layers.1.self_attn.v_proj"
    module, z = adapters(model)[layer], seen[layer][:3]
    assert np.abs(of_qiskit(module, z) - module.bottleneck().branch(z).detach().numpy()).max() < TOLERANCE[torch.float32]


def test_what_has_no_circuit():
    with pytest.raises(ValueError, match=r"qtha.quantum: 'silu' runs no circuit. What works: `quantum: qtha`"):
        adapter(quantum="silu").to_qiskit(torch.zeros(3))
    with pytest.raises(ValueError, match=r"z has shape \(4, 3\). What works: the 3 numbers of one token"):
        adapter().to_qiskit(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="z holds NaN"):
        adapter().to_qiskit([0, torch.nan, 0])
