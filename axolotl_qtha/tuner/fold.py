"""One operator that makes both large matrices of an adapter, A = W_A MPO_A and B = (alpha / r) MPO_B W_B, from its flat tensor.

The arithmetic is small; what it costs on a GPU is launches. There a Triton kernel folds up to two cores in one
(`fold_kernel.py`); elsewhere PyTorch contracts core by core. Backward contracts once more instead of keeping what lies between
the cores, which is as large as the operator's rows. All gains and alpha / r are one factor of a side: it is linear in each part.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..circuit.operators import differentiable, operator
from ..circuit.torch_engine import exactly
from . import fold_kernel
from .side import Side, Sides, precise, sides_of


def _empty(flat: Tensor, w_c: Tensor | None, numbers: list[int], gains: list[float], dtype: torch.dtype) -> list[Tensor]:
    return [flat.new_empty((side.rank, side.size), dtype=dtype) for side in sides_of(tuple(numbers), tuple(gains))]


def _empty_grad(grads: Any, flat: Tensor, w_c: Tensor | None, numbers: Any, gains: Any, dtype: torch.dtype) -> Any:
    return torch.empty_like(flat), flat.new_empty(0 if w_c is None else w_c.shape)


@operator("fold(Tensor flat, Tensor? w_c, int[] numbers, float[] gains, ScalarType dtype) -> Tensor[]", _empty)
def _fold(flat: Tensor, w_c: Tensor | None, numbers: list[int], gains: list[float], dtype: torch.dtype) -> list[Tensor]:
    wanted = sides_of(tuple(numbers), tuple(gains))
    with exactly(flat.device.type):
        flat = precise(flat)
        if fold_kernel.runs(flat, wanted):
            return fold_kernel.forward(flat, None if w_c is None else w_c.to(flat.dtype), wanted, dtype)
        return [_folded(flat, w_c if side.transposed else None, side).to(dtype) for side in wanted]


@operator(
    "fold_grad(Tensor[] grads, Tensor flat, Tensor? w_c, int[] numbers, float[] gains, ScalarType dtype) -> (Tensor, Tensor)",
    _empty_grad,
)
def _fold_grad(
    grads: list[Tensor], flat: Tensor, w_c: Tensor | None, numbers: list[int], gains: list[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wanted = sides_of(tuple(numbers), tuple(gains))
    with exactly(flat.device.type):
        values = precise(flat)
        if fold_kernel.runs(values, wanted):
            of_flat, of_w_c = fold_kernel.backward(grads, values, None if w_c is None else w_c.to(values.dtype), wanted)
            return of_flat.to(flat.dtype), of_w_c.to(flat.dtype)
        of_flat, of_w_c = torch.empty_like(values), values.new_empty(0 if w_c is None else w_c.shape)
        for grad, side in zip(grads, wanted, strict=True):
            _folded_grad(grad.to(values.dtype), values, w_c if side.transposed else None, side, of_flat, of_w_c)
        return of_flat.to(flat.dtype), of_w_c.to(flat.dtype)


def _backward(*args: Any) -> tuple[Tensor, Tensor]:
    *grads, flat, w_c, numbers, gains, dtype = args
    of_flat, of_w_c = _fold_grad(grads, flat, w_c, numbers, gains, dtype)
    return of_flat, of_w_c


_run = differentiable(_fold, _backward, 2)


def fold(flat: Tensor, w_c: Tensor | None, wanted: Sides, dtype: torch.dtype) -> list[Tensor]:
    """Return the matrices, (r, size) each, in the dtype of the products with tokens; differentiable.

    Computed in float32, float64 where the flat tensor is, without autocast or TF32.

    Args:
        flat: the tensor that holds the sides and nothing else.
        w_c: flat (r * r), as stored; B is multiplied by it, if given. Its gain is part of the side's.
        wanted: its sides, in the order of the result.
        dtype: of the result.
    """
    return list(_run(flat, w_c if wanted.hold_b else None, wanted.numbers, wanted.gains, dtype))


def _folded(flat: Tensor, w_c: Tensor | None, side: Side) -> Tensor:
    *cores, weight = side.parts(flat)
    if w_c is not None:
        weight = precise(w_c).view(side.rank, side.rank).T @ weight
    state = weight * side.gain  # of a full matrix the result, else small
    for core in cores:
        state = _contracted(state, core)
    return state.reshape(side.rank, -1)[:, : side.size].contiguous()


def _folded_grad(grad: Tensor, flat: Tensor, w_c: Tensor | None, side: Side, of_flat: Tensor, of_w_c: Tensor) -> None:
    """Write the gradients of a side's parts, and of W_C, from that of the matrix, (r, size)."""
    *cores, weight = side.parts(flat)
    *of_cores, of_weight = side.parts(of_flat)
    square = None if w_c is None else precise(w_c).view(side.rank, side.rank)
    states = [(weight if square is None else square.T @ weight) * side.gain]
    for core in cores[:-1]:
        states.append(_contracted(states[-1], core))
    if cores:  # to the padded size
        grad = F.pad(grad, (0, math.prod(core.shape[2] for core in cores) - side.size))
    for state, core, of_core in zip(reversed(states), reversed(cores), reversed(of_cores), strict=False):
        left, out, inp, right = core.shape
        rest = state.shape[1] // (left * out)
        grad = grad.reshape(-1, inp, right, rest).permute(0, 3, 1, 2).reshape(-1, inp * right)
        of_core.copy_((_opened(state, core).T @ grad).view(left, out, inp, right))
        grad = grad @ core.reshape(left * out, inp * right).T
        grad = grad.reshape(-1, rest, left * out).transpose(1, 2).reshape(state.shape)
    grad = grad * side.gain
    if square is None:
        of_weight.copy_(grad)
    else:
        of_weight.copy_(square @ grad)
        of_w_c.copy_((weight @ grad.T).flatten())


# The state of a contraction is (rows * inputs done, bond * outputs to do). All products are two-dimensional: torch.matmul runs
# batches differently with and without gradients, and rounds differently.


def _opened(state: Tensor, core: Tensor) -> Tensor:
    """(rows * done, bond * o_k * to do) -> (rows * done * to do, bond * o_k)."""
    bond = core.shape[0] * core.shape[1]
    return state.reshape(state.shape[0], bond, -1).transpose(1, 2).reshape(-1, bond)


def _contracted(state: Tensor, core: Tensor) -> Tensor:
    """Contract one core: (rows * done, bond * o_k * to do) -> (rows * done * i_k, bond * to do)."""
    _, _, inp, right = core.shape
    product = _opened(state, core) @ core.reshape(-1, inp * right)
    return product.reshape(state.shape[0], -1, inp, right).permute(0, 2, 3, 1).reshape(state.shape[0] * inp, -1)
