"""Matrix product operators against dense matrices: TensorLy's reconstruction, brute force, and truncated SVDs."""

import itertools
import math

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train_matrix
from tensorly.tt_matrix import TTMatrix

from axolotl_qtha.tuner.mpo import LARGEST_FACTOR, Factors, MPOShape, decompose, factorize

SIZES, CORES, BONDS, RANKS = st.integers(1, 400), st.integers(1, 4), st.integers(1, 9), st.integers(1, 12)


def dense(cores):
    """Return the padded matrix (outputs, inputs) of the cores, as TensorLy builds it."""
    with tensorly.backend_context("numpy", local_threadsafe=True):
        return TTMatrix([core.double().numpy() for core in cores]).to_matrix()


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (18944, (37, 8, 8, 8)),
        (5120, (10, 8, 8, 8)),
        (4096, (8, 8, 8, 8)),
        (3584, (8, 8, 8, 7)),
        (2560, (8, 8, 8, 5)),
        (2048, (8, 8, 8, 4)),
        (1024, (8, 8, 4, 4)),
        (512, (8, 4, 4, 4)),
        (256, (4, 4, 4, 4)),
    ],
)
def test_factorises_as_the_authors_do(size, sizes):
    assert factorize(size, 4) == Factors(size, sizes)


def splits(size, cores):
    """Return all ways to write `size` as `cores` factors in descending order."""
    divisors = [i for i in range(1, size + 1) if size % i == 0]
    ways = itertools.combinations_with_replacement(reversed(divisors), cores)
    return [way for way in ways if math.prod(way) == size]


def allowed(ways, size, cores):
    return [way for way in ways if max(way) <= LARGEST_FACTOR * size ** (1 / cores)]


@pytest.mark.parametrize("cores", [1, 2, 3, 4])
def test_every_size_is_split_evenly_and_padded_only_if_it_must_be(cores):
    for size in range(1, 401):
        factors = factorize(size, cores)
        assert factors.size == size
        assert len(factors.sizes) == cores
        assert list(factors.sizes) == sorted(factors.sizes, reverse=True)
        assert factors.padded == math.prod(factors.sizes) >= size
        # nothing between the size and the padded size could have been used, and of its splits the most even one is
        for skipped in range(size, factors.padded):
            assert not allowed(splits(skipped, cores), skipped, cores)
        ways = allowed(splits(factors.padded, cores), factors.padded, cores)
        assert factors.sizes in ways
        assert sum(factors.sizes) == min(sum(way) for way in ways)
        # padding is cheap: the worst case is 7 -> 2 * 2 * 2 * 1, from 100 on it is 101 -> 7 * 5 * 3 * 1
        assert factors.padded <= size * (8 / 7 if size < 100 else 1.04)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(400, 60000), cores=st.integers(1, 4))
def test_large_sizes_are_hardly_padded(size, cores):
    assert size <= factorize(size, cores).padded <= 1.02 * size


@pytest.mark.parametrize("prime", [101, 3583, 18947])
def test_primes(prime):
    assert factorize(prime, 1) == Factors(prime, (prime,))
    for cores in (2, 3, 4):
        factors = factorize(prime, cores)
        assert factors.padded > prime
        assert factors.sizes[1] > 1


@pytest.mark.parametrize(("size", "cores"), [(0, 2), (-4, 2), (4, 0)])
def test_refuses_sizes_that_cannot_be_split(size, cores):
    with pytest.raises(ValueError, match=f"cannot split size {size} into {cores} cores; both must be positive"):
        factorize(size, cores)


@given(outputs=SIZES, inputs=SIZES, cores=CORES, bond=st.integers(1, 10**6))
@settings(deadline=None)
def test_bonds_are_capped_at_what_the_two_sides_fill(outputs, inputs, cores, bond):
    shape = MPOShape(factorize(outputs, cores), factorize(inputs, cores), bond)
    pairs = [o * i for o, i in zip(shape.outputs.sizes, shape.inputs.sizes, strict=True)]
    assert shape.bonds[0] == shape.bonds[-1] == 1
    assert len(shape.bonds) == cores + 1
    for k in range(1, cores):
        assert shape.bonds[k] == min(bond, math.prod(pairs[:k]), math.prod(pairs[k:]))
    assert shape.num_parameters == sum(torch.zeros(core).numel() for core in shape.core_shapes)


def test_bonds_of_the_authors_are_not_capped():
    shape = MPOShape(factorize(256, 4), factorize(3584, 4), 8)
    assert shape.core_shapes == [(1, 4, 8, 8), (8, 4, 8, 8), (8, 4, 8, 8), (8, 4, 7, 1)]


def random_matrix(outputs, inputs, seed=0):
    return torch.randn(outputs, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(outputs=st.integers(1, 40), inputs=st.integers(1, 40), cores=CORES)
def test_decomposing_at_full_bond_is_exact(outputs, inputs, cores):
    matrix = random_matrix(outputs, inputs)
    shape = MPOShape(factorize(outputs, cores), factorize(inputs, cores), 10**6)
    full = dense(decompose(matrix, shape))
    # a few SVDs in float64
    np.testing.assert_allclose(full[:outputs, :inputs], matrix, atol=1e-11)
    assert np.abs(full[outputs:]).sum() + np.abs(full[:, inputs:]).sum() <= 1e-9  # the padding holds nothing


@pytest.mark.parametrize("bond", [1, 2, 5, 9])
@pytest.mark.parametrize(("outputs", "inputs", "cores"), [(36, 35, 2), (23, 29, 2), (36, 48, 3), (30, 37, 4)])
def test_decomposing_at_low_bond_is_as_good_as_it_can_be(outputs, inputs, cores, bond):
    matrix = random_matrix(outputs, inputs)
    shape = MPOShape(factorize(outputs, cores), factorize(inputs, cores), bond)
    padded = np.zeros((shape.outputs.padded, shape.inputs.padded))
    padded[:outputs, :inputs] = matrix
    error = np.linalg.norm(padded - dense(decompose(matrix, shape)))

    tensor = padded.reshape(*shape.outputs.sizes, *shape.inputs.sizes)
    with tensorly.backend_context("numpy", local_threadsafe=True):
        theirs = tensor_train_matrix(tensor, rank=list(shape.bonds)).to_matrix()
    assert error <= np.linalg.norm(padded - theirs) + 1e-10

    # Oseledets (2011), theorem 2.2: at most the root of the summed squares of what each cut alone must lose.
    order = [axis for k in range(cores) for axis in (k, cores + k)]  # o_1 i_1 o_2 i_2 ...
    pairs = tensor.transpose(order)
    lost = 0.0
    for k in range(1, cores):
        values = np.linalg.svd(pairs.reshape(math.prod(pairs.shape[: 2 * k]), -1), compute_uv=False)
        lost += np.square(values[bond:]).sum()
    assert error <= math.sqrt(lost) + 1e-10
    if cores == 2:  # one cut: the optimum itself (Eckart and Young)
        assert error == pytest.approx(math.sqrt(lost), abs=1e-10)


def test_decompose_returns_the_dtype_of_the_matrix():
    shape = MPOShape(factorize(12, 2), factorize(10, 2), 4)
    for dtype in (torch.float32, torch.bfloat16):
        cores = decompose(random_matrix(12, 10).to(dtype), shape)
        assert [core.dtype for core in cores] == [dtype, dtype]
        assert [tuple(core.shape) for core in cores] == shape.core_shapes
