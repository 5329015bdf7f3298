"""Matrix product operators (TT-matrices): factorising sizes, shapes of cores, decomposing.

A matrix of shape (out, in), out = o_1 ... o_K and in = i_1 ... i_K, is held as K cores G_k of shape
(chi_{k-1}, o_k, i_k, chi_k) with chi_0 = chi_K = 1:

    M[o_1 ... o_K, i_1 ... i_K] = sum over bonds of  G_1[., o_1, i_1, .] G_2[., o_2, i_2, .] ... G_K[., o_K, i_K, .]

Source: the matrix product operators of arXiv 2503.12790, W[j, i] = Tr(product over k of w_k[j_k, i_k]), here with open ends
(numbers of its equations are not known here); Oseledets (2011), TT-matrix format; the layout is TensorLy's `TTMatrix`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# A factor may be this much larger than size ** (1 / K) before the size is padded: 18944 = 37 * 8 * 8 * 8 stays as it is.
LARGEST_FACTOR = 4.0


@dataclass(frozen=True)
class Factors:
    """How a layer's size is split over the cores: the product of `sizes` is `size`, or more where it had to be padded."""

    size: int
    sizes: tuple[int, ...]

    @property
    def padded(self) -> int:
        """The size the cores span; rows or columns beyond `size` are cut off after folding."""
        return math.prod(self.sizes)


@lru_cache(maxsize=4096)
def factorize(size: int, cores: int) -> Factors:
    """Split `size` into `cores` factors as equal as possible, the largest first.

    A prime, or a size with a large prime factor, is padded to the next size that splits well.

    >>> factorize(3584, 4).sizes, factorize(3584, 2).sizes
    ((8, 8, 8, 7), (64, 56))
    >>> factorize(3583, 2)
    Factors(size=3583, sizes=(64, 56))

    Raises:
        ValueError: if `size` or `cores` is not positive.
    """
    if size < 1 or cores < 1:
        raise ValueError(f"cannot split size {size} into {cores} cores; both must be positive.")
    padded = size
    while True:
        best = min(_splits(padded, cores, padded), key=lambda sizes: (sum(sizes), max(sizes)))
        if max(best) <= LARGEST_FACTOR * padded ** (1 / cores):
            return Factors(size, best)
        padded += 1


def _splits(size: int, cores: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Yield the ways to write `size` as `cores` factors in descending order, none above `largest`."""
    if cores == 1:
        if size <= largest:
            yield (size,)
        return
    for factor in _divisors(size):
        if factor**cores < size:  # the rest could not be that small
            return
        if factor <= largest:
            for rest in _splits(size // factor, cores - 1, factor):
                yield (factor, *rest)


@lru_cache(maxsize=4096)
def _divisors(size: int) -> list[int]:
    """Return all divisors, the largest first."""
    small = [factor for factor in range(1, math.isqrt(size) + 1) if size % factor == 0]
    return sorted({size // factor for factor in small} | set(small), reverse=True)


@dataclass(frozen=True)
class MPOShape:
    """Shape of a matrix product operator from `inputs` to `outputs`."""

    outputs: Factors
    inputs: Factors
    bond_dim: int

    @property
    def bonds(self) -> tuple[int, ...]:
        """chi_0 ... chi_K; a bond never exceeds what its two sides can fill."""
        pairs = [o * i for o, i in zip(self.outputs.sizes, self.inputs.sizes, strict=True)]
        inner = [min(self.bond_dim, math.prod(pairs[:k]), math.prod(pairs[k:])) for k in range(1, len(pairs))]
        return (1, *inner, 1)

    @property
    def core_shapes(self) -> list[tuple[int, int, int, int]]:
        """The shape (chi_{k-1}, o_k, i_k, chi_k) of each core."""
        chi = self.bonds
        pairs = zip(self.outputs.sizes, self.inputs.sizes, strict=True)
        return [(chi[k], o, i, chi[k + 1]) for k, (o, i) in enumerate(pairs)]

    @property
    def num_parameters(self) -> int:
        """Number of entries of all cores."""
        return sum(math.prod(shape) for shape in self.core_shapes)


def decompose(matrix: Tensor, shape: MPOShape) -> list[Tensor]:
    """Return the cores of the TT-SVD of a (outputs, inputs) matrix, padded with zeros and cut to the shape's bonds.

    Source: TensorLy's `tensor_train_matrix`. Computed in float64, returned in the dtype of the matrix.
    """
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

    padded = torch.zeros(shape.outputs.padded, shape.inputs.padded, dtype=torch.float64, device="cpu")
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    tensor = padded.reshape(*shape.outputs.sizes, *shape.inputs.sizes)
    with tensorly.backend_context("pytorch", local_threadsafe=True), torch.device("cpu"):
        cores = tensor_train_matrix(tensor, rank=list(shape.bonds))
    return [core.reshape(wanted).to(matrix) for core, wanted in zip(cores, shape.core_shapes, strict=True)]
