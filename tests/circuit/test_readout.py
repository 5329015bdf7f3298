"""Ensembles with angles of their own: values and derivatives, against Qiskit."""

import numpy as np
import torch

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.readout import expectations, jacobians

from . import reference

EXACT = 1e-12  # float64 simulations of some dozens of gates


def test_expectations_of_every_draw_and_token():
    ansatz = Ansatz(3, 1)
    z, angles = reference.angles_and_inputs(ansatz, 4, blocks=2)
    stacked = np.stack([z[:, :3], z[:, 3:]]), np.stack([angles[:, :3], angles[:, 3:]])
    found = expectations(*map(torch.tensor, stacked), ansatz).numpy()
    assert found.shape == (2, 4, 3)
    for draw in range(2):
        assert np.abs(found[draw] - reference.expectations(ansatz, stacked[0][draw], stacked[1][draw])).max() < EXACT


def test_jacobians_are_those_of_the_parameter_shift(monkeypatch):
    ansatz = Ansatz(2, 2)
    z, angles = reference.angles_and_inputs(ansatz, 1, blocks=3)
    own = np.stack([angles[:, 2 * b : 2 * b + 2] for b in range(3)])
    found = jacobians(torch.tensor(z.reshape(3, 2)), torch.tensor(own), ansatz)
    assert found.shape == (3, 2, 8, 2)
    for b in range(3):
        for i in range(2):
            _, expected = reference.shift_gradients(ansatz, z[0, 2 * b : 2 * b + 2], own[b], np.eye(2)[i])
            assert np.abs(found[b, i].numpy() - expected).max() < EXACT
    monkeypatch.setattr("axolotl_qtha.circuit.readout.COLUMNS", 4)  # one at a time
    assert torch.allclose(jacobians(torch.tensor(z.reshape(3, 2)), torch.tensor(own), ansatz), found, atol=EXACT)
