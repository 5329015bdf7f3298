"""The operator that folds both matrices: against TensorLy's dense operators, the earlier folding, and finite differences."""

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.tt_matrix import TTMatrix

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.adapter import QTHAAdapter
from axolotl_qtha.tuner.fold import fold
from axolotl_qtha.tuner.side import sides
from axolotl_qtha.tuner.sizes import adapter_shape
from axolotl_qtha.tuner.table import table, tensor_sizes

from . import earlier_fold

SIZES, CORES, BONDS, RANKS = st.integers(1, 400), st.integers(1, 4), st.integers(1, 9), st.integers(1, 12)
MODES = [
    {"quantum": quantum, **network}
    for quantum in ("qtha", "none", "silu", "frozen", "qwthn")
    for network in ({}, {"mpo": "none"}, {"num_cores": 1}, {"num_cores": 3})
]


def case(inputs, outputs, fused, **given):
    """Return a table of parts, its sides, and the number of entries of `cores`."""
    config = QTHAConfig(quantum="none", **given)
    shape = adapter_shape(config, inputs, outputs)
    parts = table(config, shape)
    both = sides(parts, shape.rank, inputs, outputs, config.scaling, fused)["cores"]
    return config, parts, both, tensor_sizes(parts)["cores"]


def part(flat, parts, name):
    """Return a part as it acts, float64."""
    found = parts[name]
    return flat.double().numpy()[found.start : found.start + found.size].reshape(found.shape) * found.gain


def dense(flat, parts, name, count):
    """Return the padded matrix (outputs, inputs) of the cores, as TensorLy builds it."""
    with tensorly.backend_context("numpy", local_threadsafe=True):
        return TTMatrix([part(flat, parts, f"{name}_{k}") for k in range(count)]).to_matrix()


def positive(random, size, dtype):
    """Return numbers of one sign: their sums do not cancel, so that every entry has a small relative error."""
    return torch.tensor(random.exponential(size=size), dtype=dtype)


@settings(max_examples=150, deadline=None)
@given(
    outputs=SIZES,
    inputs=SIZES,
    cores=CORES,
    bond=BONDS,
    rank=RANKS,
    wider=st.integers(0, 9),
    fused=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_both_sides_equal_the_dense_products(outputs, inputs, cores, bond, rank, wider, fused, dtype, seed):
    config, parts, both, size = case(
        inputs, outputs, fused, rank=rank, num_cores=cores, bond_dim=bond, mid_dim=rank + wider, alpha=3.0
    )
    random = np.random.default_rng(seed)
    flat, w_c = positive(random, size, dtype), positive(random, rank * rank, dtype)
    a, b = fold(flat, w_c if fused else None, both, dtype)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((rank, inputs), (rank, outputs), dtype, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13  # some ten thousand additions of rounding 6e-8 or 1e-16, averaging out
    expected_a = part(flat, parts, "w_a") @ dense(flat, parts, "mpo_a", cores)[:, :inputs]
    np.testing.assert_allclose(a.double(), expected_a, rtol=tolerance)
    join = w_c.double().numpy().reshape(rank, rank) * parts["w_c"].gain if fused else np.eye(rank)
    expected_b = config.scaling * dense(flat, parts, "mpo_b", cores)[:outputs] @ part(flat, parts, "w_b") @ join
    np.testing.assert_allclose(b.T.double(), expected_b, rtol=tolerance)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("given", [{"mpo": "none"}, *({"num_cores": k, "bond_dim": 4, "mid_dim": 6} for k in (1, 2, 3))], ids=str)
def test_gradients_are_those_of_finite_differences(given, fused):
    _, _, both, size = case(23, 30, fused, rank=3, **given)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(size, dtype=torch.float64, generator=generator, requires_grad=True)
    w_c = torch.randn(9, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda flat, w_c: fold(flat, w_c if fused else None, both, flat.dtype), (flat, w_c))


def test_products_may_have_another_dtype_and_sides_are_optional():
    _, _, both, size = case(20, 30, False, rank=4, bond_dim=3, mid_dim=6)
    flat = torch.randn(size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        a, b = fold(flat, None, both, dtype)
        exact = [matrix.to(dtype) for matrix in fold(flat, None, both, torch.float32)]
        assert torch.equal(a, exact[0])
        assert torch.equal(b, exact[1])
        (gradient,) = torch.autograd.grad(a.sum(), flat)  # of one side alone
        assert gradient.dtype == torch.float32
        assert 0 < gradient.count_nonzero() < size


@pytest.mark.parametrize("given", MODES, ids=str)
def test_an_adapter_is_that_of_the_earlier_folding(given):
    sizes = {} if given.get("mpo") == "none" else {"bond_dim": 4, "mid_dim": 12}
    config = QTHAConfig(rank=4, **sizes, **given)
    adapter = QTHAAdapter(config, adapter_shape(config, 70, 118), 5)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    x, weights = torch.randn(2, 9, 70, generator=generator), torch.randn(2, 9, 118, generator=generator)

    def results(run):
        """Return z, the output, and the gradients of x and all parameters."""
        inputs = x.clone().requires_grad_()
        z, output = run(inputs)
        wanted = [inputs, *adapter.parameters()]
        return [z, output, *torch.autograd.grad((output * weights).sum(), wanted)]

    def now(inputs):
        seen = []
        adapter.seen = seen.append
        return (lambda output: (seen[0], output))(adapter(inputs))

    def before(inputs):
        z, _, output = earlier_fold.forward(adapter, inputs)
        return z, output

    for ours, theirs in zip(results(now), results(before), strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()  # float32 in another order of products
