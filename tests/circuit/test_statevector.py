"""States in Qiskit's order, and circuits with their numbers bound, against `qiskit.quantum_info.Statevector`."""

import numpy as np
import pytest
import torch
from qiskit.quantum_info import Statevector

from axolotl_qtha.circuit.ansatz import GATE_ORDERS, Ansatz
from axolotl_qtha.circuit.statevector import statevector, statevectors

from .reference import angles_and_inputs, values

# Two float64 simulations of some hundred gates, whose rounding adds up to some 1e-15 an amplitude.
EXACT = 1e-12


def by_qiskit(ansatz, z, angles):
    """Return the states (tokens, 2**n) of angles (rows, n)."""
    circuit = ansatz.circuit()
    return np.stack([Statevector(circuit.assign_parameters(values(circuit, row, angles))).data for row in z])


@pytest.mark.parametrize("gate_order", GATE_ORDERS)
@pytest.mark.parametrize("qubits", [1, 2, 3, 5, 8])
def test_it_is_qiskits(qubits, gate_order):
    ansatz = Ansatz(qubits, 2, gate_order)
    z, angles = angles_and_inputs(ansatz, 3)
    found = statevector(torch.tensor(z), torch.tensor(angles), ansatz)
    assert found.dtype == torch.complex128
    assert found.shape == (3, 2**qubits)
    assert np.abs(found.numpy() - by_qiskit(ansatz, z, angles)).max() < EXACT  # amplitudes, so their phases as well


def test_shapes_and_dtypes():
    ansatz = Ansatz(3, 1)
    z, angles = (torch.tensor(array) for array in angles_and_inputs(ansatz, 6))
    whole = statevector(z.view(2, 3, 3), angles, ansatz)
    assert torch.equal(whole.view(6, 8), statevector(z, angles, ansatz))
    assert torch.allclose(statevector(z[0], angles, ansatz), whole[0, 0], atol=EXACT)
    single = statevector(z.float(), angles.float(), ansatz)
    assert single.dtype == torch.complex64
    assert float((single - whole.view(6, 8)).abs().max()) < 2e-6  # float32 angles of up to 4 radians


def test_angles_of_their_own():
    ansatz = Ansatz(4, 2, "2025-05")
    z, angles = angles_and_inputs(ansatz, 3, blocks=3)
    parts = [slice(4 * b, 4 * b + 4) for b in range(3)]
    own = np.stack([angles[:, part] for part in parts])
    found = statevectors(torch.tensor(z[0].reshape(3, 4)), torch.tensor(own), ansatz)
    expected = np.concatenate([by_qiskit(ansatz, z[:1, part], angles[:, part]) for part in parts])
    assert np.abs(found.numpy() - expected).max() < EXACT


def test_gradients():
    ansatz = Ansatz(3, 2)
    z, angles = (torch.tensor(array, requires_grad=True) for array in angles_and_inputs(ansatz, 2))
    assert torch.autograd.gradcheck(lambda z, angles: torch.view_as_real(statevector(z, angles, ansatz)), (z, angles))


def test_several_side_by_side_are_refused():
    ansatz = Ansatz(2, 1)
    z, angles = (torch.tensor(array) for array in angles_and_inputs(ansatz, 3, blocks=2))
    with pytest.raises(
        ValueError, match=r"2 circuits side by side.*What works: one of them, z\[\.\.\., 2 \* b : 2 \* \(b \+ 1\)\]"
    ):
        statevector(z, angles, ansatz)
    with pytest.raises(ValueError, match="do not fit"):
        statevector(z[:, :3], angles, ansatz)
    with pytest.raises(ValueError, match="encoded input"):
        statevector(z[:, :2] * torch.nan, angles[:, :2], ansatz)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda values: torch.tensor(values, requires_grad=True)])
def test_a_bound_circuit(kind):
    ansatz = Ansatz(3, 2)
    z, angles = angles_and_inputs(ansatz, 1)
    circuit = ansatz.bound(kind(z[0]), kind(angles))
    assert circuit.num_parameters == 0
    assert np.abs(Statevector(circuit).data - by_qiskit(ansatz, z, angles)[0]).max() < EXACT
    free = ansatz.bound(None, kind(angles))
    assert [parameter.name for parameter in free.parameters] == ["z[0]", "z[1]", "z[2]"]


@pytest.mark.parametrize(
    ("z", "angles", "words"),
    [
        (np.zeros(3), np.zeros((4, 2)), r"z has shape \(3,\). What works: \(2,\) for a circuit of 2 qubits"),
        (np.zeros(2), np.zeros((2, 4)), r"angles has shape \(2, 4\). What works: \(4, 2\)"),
        (np.zeros(2), np.full((4, 2), np.nan), "angles holds NaN"),
    ],
)
def test_what_does_not_fit_is_not_bound(z, angles, words):
    with pytest.raises(ValueError, match=words):
        Ansatz(2, 1).bound(z, angles)
