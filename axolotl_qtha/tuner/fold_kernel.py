"""The folding of `fold.py` on an NVIDIA GPU: `fold_triton.py`, compiled by Triton on first use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..circuit.triton_kernel import works
from .side import Side

INNER = 16  # the least that a tensor core's product takes
ROWS, COLUMNS = 32, 32  # of a tile, at most: twice as many spill registers, by kilobytes where W_C is part of B
GROUPS = 64  # programs that share a side's i, at most: each has sums of its own
ADDED = 128  # entries of a program that adds sums


def runs(flat: Tensor, sides: Sequence[Side]) -> bool:
    """Return whether the kernel takes these sides."""
    return flat.device.type == "cuda" and all(len(side.cores) <= 2 for side in sides) and works()


def rows(sides: Sequence[Side]) -> int:
    """Return the rows of a tile."""
    return min(ROWS, max(INNER, 1 << (sides[0].rank - 1).bit_length()))


def geometry(side: Side, squares: int) -> list[int]:
    """Return what the kernels need to know of a side.

    Args:
        side: the side, of at most two cores.
        squares: where the sums of W_C's gradient begin.

    Returns:
        rank, size; m1, i1, chi, m2, i2; where W begins and its strides of s and m; where G1 begins and its strides of a, i, c;
        where G2 begins and its strides of c, b, j; tiles of columns; groups of programs; `squares`.
    """
    r, size, back = side.rank, side.size, side.transposed
    starts = [side.start]
    for shape in side.shapes:
        starts.append(starts[-1] + math.prod(shape))
    if not side.cores:
        m1, i1, chi, m2, i2 = r, 1, size, 1, size
        w, g1, g2 = (0, 1, 1), (starts[0], *((1, 1, r) if back else (size, 1, 1))), (0, 1, 1, 1)
    else:
        (_, first_out, first_in, bond), last = side.cores[0], side.cores[-1]
        m1, i1 = (first_in, first_out) if back else (first_out, first_in)
        m = math.prod(core[2 if back else 1] for core in side.cores)
        w = (starts[-2], *((1, r) if back else (m, 1)))
        if len(side.cores) == 1:
            chi, i2, i1, m2 = i1, i1, 1, 1
            g1, g2 = (starts[0], *((1, 1, m1) if back else (chi, 1, 1))), (0, 1, 1, 1)
        else:
            chi = bond
            m2, i2 = (last[2], last[1]) if back else (last[1], last[2])
            g1 = (starts[0], *((chi, m1 * chi, 1) if back else (i1 * chi, chi, 1)))
            g2 = (starts[1], m2 * i2, *((1, m2) if back else (i2, 1)))
    tiles = -(-i2 // COLUMNS)
    groups = min(GROUPS, i1 if len(side.cores) == 2 else tiles)
    return [r, size, m1, i1, chi, m2, i2, *w, *g1, *g2, tiles, groups, squares]


class _Plan:
    """What the launches of some sides take but for tensors."""

    def __init__(self, sides: Sequence[Side], total: int, device: torch.device, dtype: torch.dtype) -> None:
        numbers = [geometry(side, total) for side in sides]
        padded = numbers if len(numbers) == 2 else [numbers[0], numbers[0]]
        self.geometry = torch.tensor(padded, dtype=torch.int32, device=device)
        self.gains = torch.tensor([side.gain for side in (sides[0], sides[-1])], dtype=dtype, device=device)
        self.rows, self.total = rows(sides), total
        height = -(-sides[0].rank // self.rows)
        self.tiles = [height * found[3] * found[18] for found in numbers]
        self.programs = [height * found[19] for found in numbers]
        self.split = sides[1].start if len(sides) == 2 else 0  # one alone is taken for the second
        self.shape = {"TWO": len(sides[0].cores) == 2, "NETWORK": bool(sides[0].cores), "ROWS": self.rows, "COLUMNS": COLUMNS}


@lru_cache(maxsize=1024)
def _plan(sides: tuple[Side, ...], total: int, device: torch.device, dtype: torch.dtype) -> _Plan:
    return _Plan(sides, total, device, dtype)


def forward(flat: Tensor, w_c: Tensor | None, sides: Sequence[Side], dtype: torch.dtype) -> list[Tensor]:
    """Return the matrices (r, size) of the sides in a flat tensor, float32 or float64; see `fold.fold`."""
    from . import fold_triton

    plan = _plan(tuple(sides), flat.numel(), flat.device, flat.dtype)
    found = [flat.new_empty((side.rank, side.size), dtype=dtype) for side in sides]
    first, second, programs = _ordered(found, plan.tiles)
    with torch.cuda.device_of(flat):
        fold_triton.forward[(sum(plan.tiles),)](
            *(flat, flat if w_c is None else w_c, first, second, plan.geometry, plan.gains, programs),
            **plan.shape, FUSED=w_c is not None, INNER=INNER,
        )  # fmt: skip
    return found


def backward(grads: Sequence[Tensor], flat: Tensor, w_c: Tensor | None, sides: Sequence[Side]) -> tuple[Tensor, Tensor]:
    """Return the gradients of the flat tensor, and of W_C (of no entries without it); grads as what `forward` returns."""
    from . import fold_triton

    plan = _plan(tuple(sides), flat.numel(), flat.device, flat.dtype)
    of_flat, of_w_c = torch.empty_like(flat), flat.new_empty(0 if w_c is None else w_c.shape)
    entries = flat.numel() + of_w_c.numel()
    sums = flat.new_empty(sum(plan.programs), entries)
    first, second, programs = _ordered([grad.contiguous() for grad in grads], plan.programs)
    fused: dict[str, Any] = {**plan.shape, "FUSED": w_c is not None}
    with torch.cuda.device_of(flat):
        fold_triton.backward[(sum(plan.programs),)](
            *(flat, flat if w_c is None else w_c, first, second, sums, plan.geometry, plan.gains, programs, entries),
            **fused, INNER=INNER,
        )  # fmt: skip
        fold_triton.add[(-(-entries // ADDED),)](
            *(sums, of_flat, of_w_c if w_c is not None else of_flat, plan.geometry),
            *(plan.programs[0] if len(sides) == 2 else 0, plan.split, plan.total, entries),
            **fused, SIZE=ADDED,
        )  # fmt: skip
    return of_flat, of_w_c


def _ordered(matrices: list[Tensor], counts: list[int]) -> tuple[Tensor, Tensor, int]:
    """Return the first and the second matrix, and how many programs are for the first: none for a side alone, which may be B."""
    return matrices[0], matrices[-1], counts[0] if len(matrices) == 2 else 0
