"""From z to h on a GPU: a warp takes a run of tokens through the picture of `bottleneck.py`, and back.

Importing this module imports Triton; `join_kernel.py` does so where it is needed.

A program takes the tokens from `start` to `end` through one phase after another, so that each phase may cut them into blocks of
its own. Circuits hold T tokens in registers, as in `circuit_triton.py`; the program makes the tables of one circuit, runs it for
all of its tokens, and goes on to the next. Products with the matrices are made of tiles of 16 by 16, whatever the rank. What a
phase hands to the next is in global memory, in arrays as long as z; the program reads only what it has itself written, after a
barrier.

Gradients of what all tokens share are first summed over a program's tokens, and then by `totals` over the programs: no atomics,
so that the sums do not depend on which program comes first.

Arguments, for W walls, C circuits and rank r = C * N. z, grad, h and grad_z have the model's dtype; what is handed on has the
precision of the arithmetic, float32 or float64:

    z, grad, h, grad_z   (tokens, r)
    fusion    (2, r, r): W_C and W_Q, both without their gain
    angles    (rows, r), in radians
    scale     (r), or None
    plan      (W, 5) int32, see `triton_kernel.plan`
    turns     (programs, W, N + 2**N, 2): the tables of one circuit, see `circuit_triton.py`
    q         (tokens, r): <Z>
    of_q      (tokens, r): the gradients of q, and where a circuit has been undone, those of its part of z
    of_linear, of_branch   (tokens, r): the gradients of W_C z and W_Q q. Where h is their sum, they are those of h
    sums      (programs, 2 r r + 2 W r): the gradients of both matrices, of walls and diagonals (2 W - 1, r), see
              `circuit_triton.py`, and of the scale (r)
    tokens, span         of z, and of each program
    walls, factor        walls = W; `factor` is how often z is added to a wall's angles
    N, COLUMNS, T        qubits, the same rounded up to a power of two, tokens of a block of states
"""

# mypy: ignore-errors
# The functions are compiled by Triton: Python's types are not theirs.

import math

import triton
import triton.language as tl

from ..circuit.circuit_triton import add, encoding, make_turns, place, states, undo, values

PI = tl.constexpr(math.pi)
SIDE = tl.constexpr(16)  # of a tile: 8 numbers a lane, beside 64 of two other tiles


@triton.jit
def _tile(x, i, i_end, j, j_end, down, across, dtype: tl.constexpr):
    """Return the tile of x from (i, j), of the matrix whose rows and columns are that far apart; 0 beyond its end."""
    i, j = i + tl.arange(0, SIDE)[:, None], j + tl.arange(0, SIDE)[None, :]
    return tl.load(x + i.to(tl.int64) * down + j.to(tl.int64) * across, mask=(i < i_end) & (j < j_end), other=0.0).to(dtype)


@triton.jit
def _store(x, tile, first, end, column, r):
    """Store a tile of x (tokens, r)."""
    i, j = first + tl.arange(0, SIDE)[:, None], column + tl.arange(0, SIDE)[None, :]
    tl.store(x + i.to(tl.int64) * r + j, tile, mask=(i < end) & (j < r))


@triton.jit
def _product(x, w, first, end, column, r, down, across, dtype: tl.constexpr):
    """Return a tile of x (tokens, r) times the matrix (r, r) whose rows and columns are that far apart in w."""
    tile = tl.zeros([SIDE, SIDE], dtype)
    for k in range(0, r, SIDE):
        left, right = _tile(x, first, end, k, r, r, 1, dtype), _tile(w, k, r, column, r, down, across, dtype)
        tile = tl.dot(left, right, tile, input_precision="ieee", out_dtype=dtype)
    return tile


@triton.jit
def _angles(z, scale, at, inside, column, BOUNDED: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr, dtype: tl.constexpr):
    """Return z, its scale and the angles that are encoded, (COLUMNS * T) each."""
    z = tl.load(z + at, mask=inside, other=0.0).to(dtype)
    factors = tl.full([COLUMNS * T], 1.0, dtype)
    if scale is not None:
        factors = tl.load(scale + column + tl.arange(0, COLUMNS * T) // T, mask=inside, other=0.0).to(dtype)
    angles = z * factors
    if BOUNDED:  # tanh, to the rounding of 1
        angles = PI - 2 * PI / (tl.exp(angles * (2 / PI)) + 1)
    return z, factors, angles


@triton.jit
def _span(tokens, span):
    """Return the tokens of this program: the first, and the one after the last."""
    start = tl.program_id(0) * span
    return start, tl.minimum(start + span, tokens)


# None of these is worth compiling anew. A gain in double precision would be rounded without its type.
@triton.jit(
    do_not_specialize=["tokens", "span", "walls", "r"],
    do_not_specialize_on_alignment=["z", "fusion", "angles", "scale", "h"],
)
def forward(
    z, fusion, angles, scale, plan, turns, q, h, tokens, span, walls, r, factor, gain: tl.float64,
    BOUNDED: tl.constexpr, PRODUCT: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Store h of a program's tokens."""
    dtype: tl.constexpr = q.dtype.element_ty
    gain = tl.full([], gain, dtype)
    start, end = _span(tokens, span)
    turns += tl.program_id(0).to(tl.int64) * 2 * walls * (N + 2**N)
    for column in range(0, r, N):
        make_turns(turns, angles, plan, walls, column, r, N, COLUMNS)
        tl.debug_barrier()
        for first in range(start, end, T):
            at, inside = place(first, end, column, r, N, COLUMNS, T)
            _, _, encoded = _angles(z, scale, at, inside, column, BOUNDED, COLUMNS, T, dtype)
            cos_z, sin_z = encoding(tl.reshape(encoded, [COLUMNS, T]), factor, N, COLUMNS)
            re, im = states((turns, plan, cos_z, sin_z), walls, N, T)
            tl.store(q + at, tl.reshape(values(re, im, N, COLUMNS), [COLUMNS * T]), mask=inside)
        tl.debug_barrier()
    for first in range(start, end, SIDE):
        for column in range(0, r, SIDE):
            linear = gain * _product(z, fusion, first, end, column, r, 1, r, dtype)
            branch = gain * _product(q, fusion + r * r, first, end, column, r, 1, r, dtype)
            _store(h, linear * branch if PRODUCT else linear + branch, first, end, column, r)


@triton.jit(
    do_not_specialize=["tokens", "span", "walls", "r"],
    do_not_specialize_on_alignment=["z", "grad", "fusion", "angles", "scale", "of_linear", "of_branch"],
)
def backward(
    z, grad, fusion, angles, scale, plan, turns, q, of_q, of_linear, of_branch, grad_z, sums,
    tokens, span, walls, r, factor, gain: tl.float64,
    BOUNDED: tl.constexpr, PRODUCT: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Store the gradients of z of a program's tokens, and the sums over them of all others."""
    dtype: tl.constexpr = q.dtype.element_ty
    gain = tl.full([], gain, dtype)
    start, end = _span(tokens, span)
    program, matrix = tl.program_id(0).to(tl.int64), r * r
    turns += program * 2 * walls * (N + 2**N)
    sums += program * 2 * (matrix + walls * r)

    if PRODUCT:
        _gate(grad, z, fusion, of_branch, gain, start, end, r, dtype)
    _apply(of_branch, fusion + matrix, None, of_q, gain, start, end, r, dtype)

    for column in range(0, r, N):
        of_angles = sums + 2 * matrix + column
        make_turns(turns, angles, plan, walls, column, r, N, COLUMNS)
        for first in range(start, end, T):
            tl.debug_barrier()  # each lane adds to what any may have stored
            at, inside = place(first, end, column, r, N, COLUMNS, T)
            _, _, encoded = _angles(z, scale, at, inside, column, BOUNDED, COLUMNS, T, dtype)
            cos_z, sin_z = encoding(tl.reshape(encoded, [COLUMNS, T]), factor, N, COLUMNS)
            circuit = (turns, plan, cos_z, sin_z)
            re, im = states(circuit, walls, N, T)
            tl.store(q + at, tl.reshape(values(re, im, N, COLUMNS), [COLUMNS * T]), mask=inside)
            again = first > start
            of_z = undo(re, im, of_q + column, first, end, r, circuit, of_angles, again, walls, N, COLUMNS, T)
            of_z = tl.reshape(of_z * factor, [COLUMNS * T])
            # computed again: meanwhile, the states need all registers
            entered, factors, encoded = _angles(z, scale, at, inside, column, BOUNDED, COLUMNS, T, dtype)
            if BOUNDED:
                of_z *= 1 - (encoded / PI) * (encoded / PI)
            if scale is not None:
                of_scale = tl.sum(tl.reshape(of_z * entered, [COLUMNS, T]), 1)
                i = tl.arange(0, COLUMNS)
                add(of_angles + (2 * walls - 1) * r + i, of_scale, i < N, again)
                of_z *= factors
            tl.store(of_q + at, of_z, mask=inside)
        tl.debug_barrier()

    if PRODUCT:
        _gate(grad, q, fusion + matrix, of_linear, gain, start, end, r, dtype)
    _apply(of_linear, fusion, of_q, grad_z, gain, start, end, r, dtype)
    _outer(of_linear, z, sums, start, end, r, dtype)
    _outer(of_branch, q, sums + matrix, start, end, r, dtype)


# Functions of their own, as `make_turns` is: they are called where no states are held.
@triton.jit(noinline=True)
def _apply(x, w, other, result, gain, start, end, r, dtype: tl.constexpr):
    """Store x (tokens, r) times the matrix w, and what else there is, (tokens, r)."""
    for first in range(start, end, SIDE):
        for column in range(0, r, SIDE):
            tile = gain * _product(x, w, first, end, column, r, r, 1, dtype)
            if other is not None:
                tile += _tile(other, first, end, column, r, r, 1, dtype)
            _store(result, tile, first, end, column, r)


@triton.jit(noinline=True)
def _gate(grad, x, w, result, gain, start, end, r, dtype: tl.constexpr):
    """Store the gradients of one path of a product, (tokens, r): those of h times the other path, W x."""
    for first in range(start, end, SIDE):
        for column in range(0, r, SIDE):
            other = gain * _product(x, w, first, end, column, r, 1, r, dtype)
            _store(result, other * _tile(grad, first, end, column, r, r, 1, dtype), first, end, column, r)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _outer(grad, x, sums, start, end, r, dtype: tl.constexpr):
    """Store the gradients of a matrix (r, r): the sum over the tokens of grad (tokens, r) times x (tokens, r)."""
    for i in range(0, r, SIDE):
        for j in range(0, r, SIDE):
            tile = tl.zeros([SIDE, SIDE], dtype)
            for first in range(start, end, SIDE):
                left, right = _tile(grad, i, r, first, end, 1, r, dtype), _tile(x, first, end, j, r, r, 1, dtype)
                tile = tl.dot(left, right, tile, input_precision="ieee", out_dtype=dtype)
            _store(sums, tile, i, r, j, r)


@triton.jit(do_not_specialize=["programs", "walls", "r", "rows"], do_not_specialize_on_alignment=["of_fusion", "of_angles"])
def totals(
    sums, slots, of_fusion, of_angles, of_scale, programs, walls, r, rows, gain: tl.float64,
    P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the parameters: each the sum over the programs.

    Args:
        sums: see above; of P programs at one time.
        slots: (rows + 1) int32, which of the walls and diagonals a row of angles adds to, -1 for none; and where the scale is.
        of_fusion: (2 r r).
        of_angles: (rows * r).
        of_scale: (r) or None.
        programs: how many.
        walls: W.
        r: the rank.
        rows: of angles.
        gain: of both matrices.
        P: programs added at one time.
        COLUMNS: how many gradients a program of this grid stores.
    """
    dtype: tl.constexpr = sums.dtype.element_ty
    matrices = 2 * r * r
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_matrices = i < matrices
    j = i - matrices  # of what follows them, in rows of r
    slot = tl.load(slots + j // r, mask=(j >= 0) & (j < (rows + 1) * r), other=-1)
    column, used = tl.where(in_matrices, i, matrices + slot * r + j % r), in_matrices | (slot >= 0)
    total = tl.zeros([P, COLUMNS], dtype)
    for first in range(0, programs, P):
        program = first + tl.arange(0, P).to(tl.int64)[:, None]
        at = sums + program * (matrices + 2 * walls * r) + column[None, :]
        total += tl.load(at, mask=(program < programs) & used[None, :], other=0.0)
    value = tl.sum(total, 0)
    tl.store(of_fusion + i, value * tl.full([], gain, dtype), mask=in_matrices)
    tl.store(of_angles + j, value, mask=(j >= 0) & (j < rows * r))
    if of_scale is not None:
        tl.store(of_scale + j - rows * r, value, mask=(j >= rows * r) & (j < (rows + 1) * r))
