"""The exact engine, compiled and in PyTorch, against Qiskit's state vector, parameter shift and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from axolotl_qtha.circuit import native
from axolotl_qtha.circuit.ansatz import GATE_ORDERS, Ansatz
from axolotl_qtha.circuit.torch_engine import expectation_values
from axolotl_qtha.timing import kept_bytes

from .reference import FOUR_TERMS, SHIFTS, TWO_TERMS, angles_and_inputs, expectations, shift_gradients

# Rounding: up to 240 gates on 4096 amplitudes, each off by about 1e-7 (float32) or 2e-16 (float64) in random directions.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def engine(request, monkeypatch):
    """Run each test on both; without a C++ compiler the first is skipped."""
    if request.param == "torch":
        monkeypatch.setattr(native, "runs", lambda z: False)
    elif native.library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def tensors(ansatz, tokens, dtype=torch.float64, seed=0):
    z, theta = angles_and_inputs(ansatz, tokens, seed)
    return torch.tensor(z, dtype=dtype, requires_grad=True), torch.tensor(theta, dtype=dtype, requires_grad=True)


def value_and_gradients(ansatz, z, theta, run=expectation_values):
    """Return the result, and the gradients of its sum of squares, which weigh every <Z_i> differently."""
    result = run(z, theta, ansatz)
    return result.detach(), *torch.autograd.grad(result.square().sum(), (z, theta))


@pytest.mark.parametrize("gate_order", GATE_ORDERS)
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("qubits", range(1, 11))
def test_matches_the_state_vector(qubits, layers, gate_order):
    ansatz = Ansatz(qubits, layers, gate_order)
    z, theta = angles_and_inputs(ansatz, tokens=2, seed=qubits)
    expected = expectations(ansatz, z, theta)
    for dtype, tolerance in TOLERANCE.items():
        result = expectation_values(torch.tensor(z, dtype=dtype), torch.tensor(theta, dtype=dtype), ansatz)
        assert result.dtype == dtype
        assert np.abs(result.numpy() - expected).max() <= tolerance


@pytest.mark.parametrize("gate_order", GATE_ORDERS)
@pytest.mark.parametrize("qubits", [11, 12])
def test_the_largest_circuits(qubits, gate_order):
    ansatz = Ansatz(qubits, 2, gate_order)
    z, theta = tensors(ansatz, tokens=3, dtype=torch.float32)
    result, grad_z, grad_theta = value_and_gradients(ansatz, z, theta)
    assert result.abs().max() <= 1 + 1e-6  # float32 rounding of a sum of 4096 probabilities
    assert grad_z.isfinite().all()
    assert grad_theta.isfinite().all()
    # z and theta are the reference's own random numbers, rounded to float32
    expected = expectations(ansatz, z[:1].detach().double().numpy(), theta.detach().double().numpy())
    assert np.abs(result[:1].numpy() - expected).max() <= TOLERANCE[torch.float32]


def test_the_shift_rules_are_the_known_ones():
    # the reference solves for its coefficients; Anselmetti et al. (arXiv 2104.05695) give (sqrt(2) +- 1) / (4 sqrt(2))
    root = math.sqrt(2)
    assert pytest.approx(((root + 1) / (4 * root), -(root - 1) / (4 * root)), abs=1e-15) == FOUR_TERMS
    assert sum(2 * c * math.sin(s) for c, s in zip(TWO_TERMS, SHIFTS, strict=True)) == pytest.approx(1)


@pytest.mark.parametrize("gate_order", GATE_ORDERS)
@pytest.mark.parametrize(("qubits", "layers"), [(1, 2), (2, 2), (3, 3), (5, 1)])
def test_gradients_match_parameter_shift(qubits, layers, gate_order):
    ansatz = Ansatz(qubits, layers, gate_order)
    z, theta = tensors(ansatz, tokens=2, seed=layers)
    weights = torch.tensor(np.random.default_rng(1).normal(size=(2, qubits)))
    grad_z, grad_theta = torch.autograd.grad((weights * expectation_values(z, theta, ansatz)).sum(), (z, theta))
    shifted = [
        shift_gradients(ansatz, row, theta.detach().numpy(), weight)
        for row, weight in zip(z.detach().numpy(), weights.numpy(), strict=True)
    ]
    # both are exact: what is left is rounding
    assert np.abs(grad_z.numpy() - np.stack([by_z for by_z, _ in shifted])).max() <= 1e-10
    assert np.abs(grad_theta.numpy() - sum(by_theta for _, by_theta in shifted)).max() <= 1e-10


@pytest.mark.parametrize("gate_order", GATE_ORDERS)
@pytest.mark.parametrize(("qubits", "layers"), [(1, 3), (2, 1), (3, 2), (6, 2)])
def test_gradients_match_finite_differences(qubits, layers, gate_order):
    ansatz = Ansatz(qubits, layers, gate_order)
    z, theta = tensors(ansatz, tokens=2)
    # central differences of 1e-6: an error of 1e-12 by truncation and 1e-10 by rounding, far below the default 1e-5
    assert torch.autograd.gradcheck(lambda z, theta: expectation_values(z, theta, ansatz), (z, theta), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("qubits", [4, 8, 10])
def test_float32_gradients_match_float64(qubits):
    ansatz = Ansatz(qubits, 3)
    z, theta = tensors(ansatz, tokens=4)
    exact = value_and_gradients(ansatz, z, theta)
    single = value_and_gradients(ansatz, *(t.detach().float().requires_grad_() for t in (z, theta)))
    for a, b in zip(single, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 1e-5  # gradients are of size 1; float32 rounding as in TOLERANCE


def test_the_last_ring_of_2025_05_is_dead():
    circuits = Ansatz(4, 2, "2025-05"), Ansatz(4, 2, "2025-06")
    dead, alive = [value_and_gradients(ansatz, *tensors(ansatz, tokens=4))[2] for ansatz in circuits]
    assert dead[-1].eq(0).all()
    assert dead[:-1].abs().min() > 1e-4
    assert alive.abs().min() > 1e-4


def test_memory_kept_for_backward_does_not_grow_with_layers():
    def kept(layers):
        ansatz = Ansatz(6, layers)
        z, theta = tensors(ansatz, tokens=64, dtype=torch.float32)
        theta = torch.nn.Parameter(theta.detach())
        return kept_bytes(lambda: expectation_values(z, theta, ansatz))

    assert kept(1) == kept(8) == 64 * 6 * 4  # z itself


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    ansatz = Ansatz(4, 2)
    z, theta = tensors(ansatz, tokens=5, dtype=dtype)
    result, grad_z, grad_theta = value_and_gradients(ansatz, z, theta)
    assert result.dtype == torch.float32
    assert (grad_z.dtype, grad_theta.dtype) == (dtype, dtype)
    # the rounding of the inputs is the only one: the same inputs given in float32 give the same bits
    assert torch.equal(result, expectation_values(z.detach().float(), theta.detach().float(), ansatz))


def test_autocast_changes_nothing():
    ansatz = Ansatz(5, 2)
    z, theta = tensors(ansatz, tokens=7, dtype=torch.float32)
    plain = value_and_gradients(ansatz, z, theta)
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_gradients(ansatz, z, theta)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lower_matmul_precision_changes_nothing(precision):
    ansatz = Ansatz(8, 3)
    z, theta = tensors(ansatz, tokens=64, dtype=torch.float32)
    plain = value_and_gradients(ansatz, z, theta)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)  # what Axolotl's `tf32: true` sets
    try:
        again = value_and_gradients(ansatz, z, theta)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.slow
def test_chunks_of_tokens_do_not_matter():
    ansatz = Ansatz(8, 2)
    z, theta = tensors(ansatz, tokens=5000, dtype=torch.float64)
    whole = value_and_gradients(ansatz, z, theta)
    halves = [value_and_gradients(ansatz, half.detach().requires_grad_(), theta) for half in z.split(2500)]
    # one token's numbers may round differently in batches of another size
    assert (whole[0] - torch.cat([result for result, _, _ in halves])).abs().max() <= 1e-12
    assert (whole[1] - torch.cat([grad_z for _, grad_z, _ in halves])).abs().max() <= 1e-12
    # a sum of 5000 terms
    assert (whole[2] - sum(grad_theta for _, _, grad_theta in halves)).abs().max() <= 1e-10


@pytest.mark.parametrize("qubits", [1, 4])
def test_no_tokens(qubits):
    ansatz = Ansatz(qubits, 2)
    z, theta = torch.zeros(2, 0, qubits, requires_grad=True), torch.ones(ansatz.rows, qubits, requires_grad=True)
    result, grad_z, grad_theta = value_and_gradients(ansatz, z, theta)
    assert result.shape == grad_z.shape == (2, 0, qubits)
    assert grad_theta.eq(0).all()


def test_leading_dimensions_are_kept():
    ansatz = Ansatz(3, 1)
    z, theta = tensors(ansatz, tokens=24)
    result = expectation_values(z, theta, ansatz)
    for shape in [(2, 3, 4, 3), (24, 1, 3)]:
        assert torch.equal(expectation_values(z.reshape(shape), theta, ansatz), result.reshape(shape))
    assert torch.equal(expectation_values(z.reshape(2, 12, 3).transpose(0, 1), theta, ansatz)[5, 1], result[17])
    # one token alone: no batch to multiply with, so the rounding may differ
    assert (expectation_values(z[0], theta, ansatz) - result[0]).abs().max() <= 1e-14


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    ansatz = Ansatz(4, 2)
    z, theta = tensors(ansatz, tokens=6, dtype=torch.float32)

    def recomputed(z, theta, ansatz):
        return checkpoint(expectation_values, z, theta, ansatz, use_reentrant=use_reentrant)

    def gradients(run):
        z.grad = theta.grad = None
        run(z, theta, ansatz).square().sum().backward()
        return z.grad, theta.grad

    assert all(torch.equal(a, b) for a, b in zip(gradients(expectation_values), gradients(recomputed), strict=True))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    ansatz = Ansatz(4, 2)
    z, theta = tensors(ansatz, tokens=6, dtype=torch.float32)

    def function(z, theta, ansatz):
        return 2 * expectation_values(torch.tanh(z), theta, ansatz) + z

    eager = value_and_gradients(ansatz, z, theta, run=function)
    compiled = value_and_gradients(ansatz, z, theta, run=torch.compile(function, fullgraph=True))
    for a, b in zip(compiled, eager, strict=True):
        assert (a - b).abs().max() <= 1e-5  # compiled code may fuse and so round differently around the circuit


SHAPES = [
    ((5, 3), (8, 4)),
    ((5, 4), (7, 4)),
    ((5, 4), (4, 8)),
    ((5, 4), (32,)),
    ((5, 6), (8, 6)),
    ((5, 8), (8, 4)),
    ((5, 0), (8, 0)),
]


@pytest.mark.parametrize(("z", "theta"), SHAPES)
def test_refuses_shapes_that_do_not_fit(z, theta):
    with pytest.raises(ValueError, match=r"do not fit.*expected \(\.\.\., n\) and \(8, n\), n being 4 or a multiple of it"):
        expectation_values(torch.zeros(z), torch.zeros(theta), Ansatz(4, 2))
