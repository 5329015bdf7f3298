"""Other simulators running our circuit, for `bench/circuit.py`: forward and gradients of sum(weights * <Z>).

Each is built from the moments of `Ansatz`, in the way its documentation recommends for batches and gradients with PyTorch. Inputs
are float32; PennyLane's `default.qubit` computes in complex128 all the same, so `ours, float64` stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.circuit.torch_engine import in_pytorch
from axolotl_qtha.tuner.backends import expectation_values

Gradients = tuple[Tensor, Tensor, Tensor]  # <Z> (tokens, n), gradients of z (tokens, n) and of the angles (rows, n)
GradientFunction = Callable[[Tensor, Tensor, Tensor], Gradients]


@dataclass(frozen=True)
class Engine:
    """A way to run the circuit. `build` raises ImportError where a package is missing."""

    name: str
    build: Callable[[Ansatz], GradientFunction]
    most_tokens: int | None = None  # measured with at most so many, and scaled: its time is linear in them
    keeps: int = 0  # states of 8 bytes per amplitude, token and gate that it keeps for backward


def _autograd(function: Callable[[Tensor, Tensor], Tensor]) -> GradientFunction:
    def run(z: Tensor, angles: Tensor, weights: Tensor) -> Gradients:
        z, angles = z.detach().requires_grad_(), angles.detach().requires_grad_()
        values = function(z, angles)
        grad_z, grad_angles = torch.autograd.grad((values * weights.to(values.dtype)).sum(), (z, angles))
        return values.detach(), grad_z, grad_angles

    return run


def _ours(ansatz: Ansatz) -> GradientFunction:
    return _autograd(lambda z, angles: expectation_values(z, angles, ansatz))


def _ours_in_float64(ansatz: Ansatz) -> GradientFunction:
    run = _ours(ansatz)
    return lambda z, angles, weights: run(z.double(), angles.double(), weights)


def _ours_in_pytorch(ansatz: Ansatz) -> GradientFunction:
    run = _ours(ansatz)

    def plain(z: Tensor, angles: Tensor, weights: Tensor) -> Gradients:
        with in_pytorch():
            return run(z, angles, weights)

    return plain


def _aer(ansatz: Ansatz) -> GradientFunction:
    return _autograd(lambda z, angles: expectation_values(z, angles, ansatz, Simulation("aer", precision="single")))


def _walk(ansatz: Ansatz, ry: Callable[[Any, int], Any], crz: Callable[[Any, int, int], Any], z: Any, angles: Any) -> None:
    """Call `ry(angle, qubit)` and `crz(angle, control, target)` gate by gate; z is indexed by qubit."""
    for moment in ansatz.moments():
        if moment.row is None or moment.kind == "rotate":
            row = z if moment.row is None else angles[moment.row]
            for i in range(ansatz.qubits):
                ry(row[i], i)
        else:
            for control, target in ansatz.pairs(moment.kind):
                crz(angles[moment.row][control], control, target)


def _pennylane(device: str, method: str) -> Callable[[Ansatz], GradientFunction]:
    def build(ansatz: Ansatz) -> GradientFunction:
        import pennylane as qml

        @qml.qnode(qml.device(device, wires=ansatz.qubits), interface="torch", diff_method=method)
        def circuit(z: Tensor, angles: Tensor) -> Any:
            _walk(ansatz, lambda a, i: qml.RY(a, i), lambda a, c, t: qml.CRZ(a, [c, t]), z.T if z.dim() > 1 else z, angles)
            return [qml.expval(qml.PauliZ(i)) for i in range(ansatz.qubits)]

        if method == "backprop":  # a batch of tokens at once
            return _autograd(lambda z, angles: torch.stack(circuit(z, angles), dim=-1))
        return _autograd(lambda z, angles: torch.stack([torch.stack(circuit(token, angles)) for token in z]))

    return build


def _tensorcircuit(ansatz: Ansatz) -> GradientFunction:
    import tensorcircuit as tc

    backend = tc.set_backend("pytorch")

    def one(z: Tensor, angles: Tensor) -> Tensor:
        circuit = tc.Circuit(ansatz.qubits)
        _walk(ansatz, lambda a, i: circuit.ry(i, theta=a), lambda a, c, t: circuit.crz(c, t, theta=a), z, angles)
        return torch.stack([backend.real(circuit.expectation_ps(z=[i])) for i in range(ansatz.qubits)])

    return _autograd(torch.func.vmap(one, in_dims=(0, None)))


def _qiskit_ml(ansatz: Ansatz) -> GradientFunction:
    from qiskit.primitives import StatevectorEstimator
    from qiskit.quantum_info import SparsePauliOp
    from qiskit_machine_learning.connectors import TorchConnector
    from qiskit_machine_learning.neural_networks import EstimatorQNN

    circuit = ansatz.circuit()
    of_z = [p for p in circuit.parameters if p.vector.name == "z"]
    of_angles = [p for p in circuit.parameters if p.vector.name == "theta"]
    observables = [SparsePauliOp.from_sparse_list([("Z", [i], 1.0)], ansatz.qubits) for i in range(ansatz.qubits)]
    network = EstimatorQNN(
        circuit=circuit,
        estimator=StatevectorEstimator(),
        observables=observables,
        input_params=of_z,
        weight_params=of_angles,
        input_gradients=True,
        default_precision=0.0,
    )
    module = TorchConnector(network)

    def run(z: Tensor, angles: Tensor, weights: Tensor) -> Gradients:
        with torch.no_grad():
            module.weight.copy_(angles.flatten())
        module.zero_grad()
        z = z.detach().requires_grad_()
        values = module(z)
        (values * weights.to(values.dtype)).sum().backward()
        assert z.grad is not None
        assert module.weight.grad is not None
        return values.detach(), z.grad, module.weight.grad.reshape(angles.shape)

    return run


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("ours", _ours),
        Engine("ours, float64", _ours_in_float64),
        Engine("ours, PyTorch", _ours_in_pytorch),
        Engine("PennyLane backprop", _pennylane("default.qubit", "backprop"), keeps=2),
        Engine("PennyLane lightning", _pennylane("lightning.qubit", "adjoint"), most_tokens=16),
        Engine("TensorCircuit", _tensorcircuit, keeps=2),
        Engine("Aer", _aer, most_tokens=16),
        Engine("Qiskit ML", _qiskit_ml, most_tokens=2),
    )
}
