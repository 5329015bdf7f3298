"""From z to h: the formula, and that `prepared` gives the same in every case, on a CPU in one call of the compiled engine."""

import math

import pytest
import torch

from axolotl_qtha.circuit import native, torch_engine
from axolotl_qtha.circuit.ansatz import GATE_ORDERS, Ansatz
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.circuit.torch_engine import NonFiniteAngle, expectation_values
from axolotl_qtha.tuner.bottleneck import Bottleneck, Circuit, bounded, prepared

from .. import triton_runs

compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
# The rounding of the gates, and of cos, sin and tanh, as in test_torch_engine.py.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
ENCODINGS = [{}, {"bounded": True}, {"scale": True}, {"scale": True, "bounded": True}]
INTERPRETED = """
import torch
from axolotl_qtha.circuit import native, triton_kernel
from tests.tuner.test_bottleneck import Ansatz, case, prepared
native.runs = lambda z: False
triton_kernel.runs = lambda z, qubits: True
for tokens in (0, 1, 17, 100):
    bottleneck, z = case(Ansatz(4, 2), tokens, bounded=True, scale=True)
    run = prepared(bottleneck)
    assert run is not bottleneck
    for inputs in (z, z.view(tokens, 1, 4), z.bfloat16()):
        assert torch.equal(run(inputs), bottleneck(inputs))
print("the same")
"""


def case(ansatz, tokens, dtype=torch.float32, product=False, scale=False, **encoding):
    """Return a bottleneck of random numbers, and z (tokens, n)."""
    generator = torch.Generator().manual_seed(tokens)
    n = ansatz.qubits
    angles, w_c, w_q, z = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((ansatz.rows, n), (n, n), (n, n), (tokens, n))
    )
    scales = torch.rand(n, generator=generator, dtype=dtype) + 0.5 if scale else None
    return Bottleneck(w_c, w_q, Circuit(angles, ansatz, Simulation(), scales, **encoding), product), 2 * z


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_formula(encoding, product):
    bottleneck, z = case(Ansatz(3, 2), 5, torch.float64, product, **encoding)
    angles = z * bottleneck.branch.scale if "scale" in encoding else z
    angles = math.pi * torch.tanh(angles / math.pi) if "bounded" in encoding else angles
    q = expectation_values(angles, bottleneck.branch.angles, Ansatz(3, 2))
    linear, branch = z @ bottleneck.w_c.T, q @ bottleneck.w_q.T
    expected = linear * branch if product else linear + branch
    assert (bottleneck(z) - expected).abs().max() <= 1e-14


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("qubits", [1, 2, 3, 4, 7, 8, 12])
def test_prepared_gives_the_same_on_any_qubits(qubits, dtype):
    for layers in (1, 3):
        for gate_order in GATE_ORDERS:
            bottleneck, z = case(Ansatz(qubits, layers, gate_order), 3, dtype, bounded=True)
            with torch.no_grad():
                assert (prepared(bottleneck)(z) - bottleneck(z)).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 63, 64, 65, 200])
def test_prepared_gives_the_same_for_any_tokens(tokens, encoding, product, dtype):
    bottleneck, z = case(Ansatz(4, 2), tokens, dtype, product, **encoding)
    with torch.no_grad():
        found, expected = prepared(bottleneck)(z), bottleneck(z)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    if tokens > native.FEW:
        assert torch.equal(found, expected)
    if tokens:
        assert (found - expected).abs().max() <= TOLERANCE[dtype] * max(1, expected.abs().max())


@compiled
def test_a_token_gives_the_same_bits_in_any_batch():
    bottleneck, z = case(Ansatz(4, 2), 64, bounded=True)
    run, before = prepared(bottleneck), torch.get_num_threads()
    alone = torch.cat([run(z[i : i + 1]) for i in range(64)])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(z), alone)
    finally:
        torch.set_num_threads(before)


def test_any_shape_and_dtype_of_z():
    bottleneck, z = case(Ansatz(4, 2), 30, bounded=True)
    run = prepared(bottleneck)
    with torch.no_grad():
        expected = bottleneck(z)
        for inputs, wanted in (
            (z[0], expected[0]),
            (z.view(2, 15, 4), expected.view(2, 15, 4)),
            (z.view(2, 15, 4).transpose(0, 1), expected.view(2, 15, 4).transpose(0, 1)),
            (z.T.contiguous().T, expected),
            (z[::2], expected[::2]),
        ):
            assert run(inputs).shape == wanted.shape
            assert (run(inputs) - wanted).abs().max() <= 1e-5
        low = z.bfloat16()
        assert run(low).dtype == bottleneck(low).dtype == torch.bfloat16
        assert (run(low) == bottleneck(low)).double().mean() > 0.95
        with torch.autocast("cpu", torch.bfloat16):
            assert (run(z) - expected).abs().max() <= 1e-5
            assert torch.equal(bottleneck(z), expected)
            assert (prepared(bottleneck)(z) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(number, tokens):
    bottleneck, z = case(Ansatz(4, 2), tokens)
    z[-1, 2] = number
    texts = []
    for run in (bottleneck, prepared(bottleneck)):
        with torch.no_grad(), pytest.raises(NonFiniteAngle, match=f"encoded input of qubit 2 .token {tokens - 1}.") as error:
            run(z)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    bottleneck.branch.angles[3, 1] = number
    with pytest.raises(NonFiniteAngle, match=r"trained angle of qubit 1 \(row 3\)"):
        prepared(bottleneck)


def test_a_bound_makes_infinity_finite():
    bottleneck, z = case(Ansatz(4, 2), 2, bounded=True)
    bottleneck.w_c.zero_()
    z[0] = 1e30
    with torch.no_grad():
        assert (prepared(bottleneck)(z) - bottleneck(z)).abs().max() <= 1e-5


def test_it_stays_what_it_was_prepared_of():
    bottleneck, z = case(Ansatz(4, 2), 2)
    run = prepared(bottleneck)
    del bottleneck
    held = [torch.randn(8, 4) for _ in range(1000)]  # would take the memory of matrices that are not held
    assert len(held) == 1000
    with torch.no_grad():
        assert (run(z) - case(Ansatz(4, 2), 2)[0](z)).abs().max() <= 1e-5


def test_other_branches_and_engines_are_left_as_they_are():
    bottleneck, z = case(Ansatz(2, 1), 2)
    for branch in (torch.sin, Circuit(bottleneck.branch.angles, Ansatz(2, 1), Simulation("aer"))):
        other = Bottleneck(bottleneck.w_c, bottleneck.w_q, branch)
        assert prepared(other) is other
    run = prepared(bottleneck)
    with torch.no_grad(), torch_engine.in_pytorch():
        assert prepared(bottleneck) is bottleneck
        assert torch.equal(run(z), bottleneck(z))


def test_bounded_has_the_gradient_of_its_formula():
    z = torch.linspace(-20, 20, 41, dtype=torch.float64, requires_grad=True)
    expected = math.pi * torch.tanh(z / math.pi)
    assert torch.equal(bounded(z), expected)
    with torch.no_grad():
        assert torch.equal(bounded(z), expected)
    (found,) = torch.autograd.grad(bounded(z).sum(), z)
    (wanted,) = torch.autograd.grad(expected.sum(), z)
    assert (found - wanted).abs().max() <= 1e-12


@pytest.mark.slow
def test_fused_on_a_gpu_in_tritons_interpreter():
    assert triton_runs.interpreted(INTERPRETED).strip().endswith("the same")
