"""Circuits side by side, at the ranks people use: every engine of a CPU against Qiskit. On GPUs: test_triton_kernel.py."""

import numpy as np
import pytest
import torch

from axolotl_qtha.circuit import aer, native
from axolotl_qtha.circuit.ansatz import GATE_ORDERS, Ansatz
from axolotl_qtha.circuit.shifts import GateAngles, Slopes
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.circuit.torch_engine import NonFiniteAngle, in_pytorch
from axolotl_qtha.tuner.backends import expectation_values

from .reference import angles_and_inputs, columns, expectations, shift_gradients_side_by_side

compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
RANKS = [(rank, qubits) for rank in (16, 32, 64) for qubits in (4, 8)]
# As in test_torch_engine.py: rounding of some hundred gates. A gradient of an angle sums over the tokens.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def case(rank, qubits, tokens=2, layers=2, gate_order="2025-06"):
    """Return the circuit, z (tokens, rank), its angles, and weights of the <Z_i>."""
    ansatz = Ansatz(qubits, layers, gate_order)
    z, theta = angles_and_inputs(ansatz, tokens, seed=rank, blocks=rank // qubits)
    return ansatz, z, theta, np.random.default_rng(1).normal(size=z.shape)


def value_and_gradients(ansatz, z, theta, weights, simulation=None, dtype=torch.float64):
    inputs = [torch.tensor(array, dtype=dtype, requires_grad=True) for array in (z, theta)]
    result = expectation_values(*inputs, ansatz, simulation or Simulation())
    return result.detach(), *torch.autograd.grad((result * torch.tensor(weights, dtype=dtype)).sum(), inputs)


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rank", "qubits"), RANKS)
def test_values_are_qiskits(rank, qubits, dtype):
    ansatz, z, theta, weights = case(rank, qubits)
    expected = expectations(ansatz, z, theta)
    assert np.abs(value_and_gradients(ansatz, z, theta, weights, dtype=dtype)[0].numpy() - expected).max() <= TOLERANCE[dtype]
    with in_pytorch():
        plain = value_and_gradients(ansatz, z, theta, weights, dtype=dtype)[0]
    assert np.abs(plain.numpy() - expected).max() <= TOLERANCE[dtype]


@compiled
@pytest.mark.parametrize(
    ("rank", "qubits", "tokens"),
    [(16, 4, 2), (12, 3, 2), (6, 1, 2), *(pytest.param(*cut, 1, marks=pytest.mark.slow) for cut in RANKS[1:])],
)
def test_gradients_are_the_parameter_shifts(rank, qubits, tokens):
    ansatz, z, theta, weights = case(rank, qubits, tokens, layers=1)
    expected = shift_gradients_side_by_side(ansatz, z, theta, weights)
    with in_pytorch():
        plain = value_and_gradients(ansatz, z, theta, weights)
    for run in (value_and_gradients(ansatz, z, theta, weights), plain):
        for mine, other in zip(run[1:], expected, strict=True):
            assert np.abs(mine.numpy() - other).max() <= 1e-10


@pytest.mark.parametrize("gate_order", GATE_ORDERS)
def test_side_by_side_is_one_by_one(gate_order):
    """Not to the last bit: the phases of all circuits come from one matmul."""
    ansatz, z, theta, weights = case(40, 5, tokens=37, layers=3, gate_order=gate_order)
    whole = value_and_gradients(ansatz, z, theta, weights)
    for own in columns(ansatz, z):
        alone = value_and_gradients(ansatz, z[:, own], theta[:, own], weights[:, own])
        for mine, other in zip(whole, alone, strict=True):
            assert (mine[:, own] - other).abs().max() <= 1e-13


@pytest.mark.parametrize(("rank", "qubits"), [(16, 4), (8, 2)])
def test_aer_runs_them_as_one_batch(monkeypatch, rank, qubits):
    ansatz, z, theta, weights = case(rank, qubits, tokens=3, layers=1)
    jobs, job = [], aer._Measurement.run
    monkeypatch.setattr(aer._Measurement, "run", lambda self, angles, seed: jobs.append(len(angles)) or job(self, angles, seed))
    mine = value_and_gradients(ansatz, z, theta, weights, Simulation("aer"))
    assert jobs[0] == 3 * rank // qubits
    assert np.abs(mine[0].numpy() - expectations(ansatz, z, theta)).max() <= 1e-10
    for grad, expected in zip(mine[1:], shift_gradients_side_by_side(ansatz, z, theta, weights), strict=True):
        assert np.abs(grad.numpy() - expected).max() <= 1e-10


def test_spsa_perturbs_each_circuit_by_itself():
    """Averaged over draws it is the gradient; the spread of the mean is known from the draws themselves."""
    ansatz, z, theta, weights = case(4, 2, tokens=1, layers=1)
    engine = aer.engine(ansatz, Simulation("aer"))
    slopes = Slopes(GateAngles(ansatz), engine.expectations, weights, z, theta)
    draws = np.array([np.concatenate([g.ravel() for g in slopes.by_spsa(8, seed, 1e-3)]) for seed in range(60)])
    expected = np.concatenate([g.ravel() for g in shift_gradients_side_by_side(ansatz, z, theta, weights)])
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - expected) <= 4.5 * error + 1e-6).all()  # 20 numbers: chance exceeds it once in 7,000


@pytest.mark.parametrize("shots", [None, 2000])
def test_shots_and_noise(shots):
    ansatz, z, theta, _ = case(8, 4, tokens=2, layers=1)
    simulation = Simulation("aer", shots=shots, noise_model="depolarizing", seed=1)
    values = expectation_values(torch.tensor(z), torch.tensor(theta), ansatz, simulation).numpy()
    one_by_one = np.concatenate(
        [
            expectation_values(
                torch.tensor(z[:, own]), torch.tensor(theta[:, own]), ansatz, Simulation("aer", noise_model="depolarizing")
            )
            for own in columns(ansatz, z)
        ],
        axis=1,
    )
    assert np.abs(values - one_by_one).max() <= (1e-12 if shots is None else 5 / np.sqrt(2000))  # five standard errors


@compiled
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_any_number_of_threads_gives_the_same_bits(tokens):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(*case(32, 4, tokens)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_angle_that_is_not_finite_is_found_in_its_circuit():
    ansatz, z, theta, weights = case(16, 4)
    z[1, 9] = np.nan
    with pytest.raises(NonFiniteAngle, match=r"encoded input of qubit 1 \(token 1, circuit 2\) is nan"):
        value_and_gradients(ansatz, z, theta, weights)
