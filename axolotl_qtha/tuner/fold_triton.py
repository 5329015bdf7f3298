"""The folding of `fold.py` on a GPU, for up to two cores: one launch forward, two backward. Importing this module imports Triton.

A side is M[s, (i, j)] = gain * sum_{a, b, c} W[s, a, b] G1[a, i, c] G2[c, b, j]; for B, W_C^T times that, where it is fused.
A program makes a tile of rows and columns j for one i: first T[s, c] = sum_a W[s, a, b] G1[a, i, c] of one b, then T G2. With one
core, and with none (a full matrix, as if W were the identity), T is the result; then j stands for c, and there is one i.

Backward makes T again and D[s, c] = sum_j grad[s, (i, j)] G2[c, b, j], from which come all gradients. Each program adds what it
finds over its i into sums of its own, and the second launch adds these in a fixed order: no atomics, runs repeat bit for bit.

Arguments; real ones have the flat tensor's dtype, but for results and their gradients:

    flat, w_c              the tensor of all cores and matrices; W_C (r, r)
    geometry, gains        of the sides, one behind the other: `fold_kernel.geometry` says what the numbers are
    a, b                   the matrices (r, size), or their gradients
    sums                   (programs, entries): the gradients of the programs' sides, and of W_C
    TWO, NETWORK, FUSED    two cores; any core; whether W_C is part of B
    ROWS, INNER, COLUMNS   of a tile: s, a and c, j
"""

# mypy: ignore-errors
# The functions are compiled by Triton: Python's types are not theirs.

import triton
import triton.language as tl

FIELDS = tl.constexpr(21)


@triton.jit
def _product(x, y):
    """Return the matrix product; not rounded to TF32."""
    return tl.dot(x, y, input_precision="ieee", out_dtype=x.dtype)


@triton.jit
def _w(side, s, a, b):
    """Return where W[s, a, b] is, and what of it exists, (s, a)."""
    r, m1, m2 = tl.load(side), tl.load(side + 2), tl.load(side + 5)
    at = tl.load(side + 7) + s[:, None] * tl.load(side + 8) + (a[None, :] * m2 + b) * tl.load(side + 9)
    return at, (s[:, None] < r) & (a[None, :] < m1)


@triton.jit
def _g1(side, a, i, c):
    """Return where G1[a, i, c] is, and what of it exists, (a, c)."""
    m1, chi = tl.load(side + 2), tl.load(side + 4)
    at = tl.load(side + 10) + a[:, None] * tl.load(side + 11) + i * tl.load(side + 12) + c[None, :] * tl.load(side + 13)
    return at, (a[:, None] < m1) & (c[None, :] < chi)


@triton.jit
def _g2(side, c, b, j):
    """Return where G2[c, b, j] is, and what of it exists, (c, j)."""
    chi, i2 = tl.load(side + 4), tl.load(side + 6)
    at = tl.load(side + 14) + c[:, None] * tl.load(side + 15) + b * tl.load(side + 16) + j[None, :] * tl.load(side + 17)
    return at, (c[:, None] < chi) & (j[None, :] < i2)


@triton.jit
def _matrix(side, s, i, j):
    """Return where M[s, (i, j)] is, and what of it exists, (s, j)."""
    r, size, i2 = tl.load(side), tl.load(side + 1), tl.load(side + 6)
    column = i * i2 + j
    at = s[:, None].to(tl.int64) * size + column[None, :]
    return at, (s[:, None] < r) & (j[None, :] < i2) & (column[None, :] < size)


@triton.jit
def _square(w_c, side, s, t):
    """Return W_C[s, t], (s, t)."""
    r = tl.load(side)
    return tl.load(w_c + s[:, None] * r + t[None, :], mask=(s[:, None] < r) & (t[None, :] < r), other=0.0)


@triton.jit
def _inner(flat, side, s, i, b, c, NETWORK: tl.constexpr, INNER: tl.constexpr):
    """Return T[s, c] of one i and b."""
    if NETWORK:
        t = tl.zeros([s.shape[0], c.shape[0]], flat.dtype.element_ty)
        for first in range(0, tl.load(side + 2), INNER):
            a = first + tl.arange(0, INNER)
            at, there = _w(side, s, a, b)
            w = tl.load(flat + at, mask=there, other=0.0)
            at, there = _g1(side, a, i, c)
            t += _product(w, tl.load(flat + at, mask=there, other=0.0))
    else:
        at, there = _g1(side, s, i, c)
        t = tl.load(flat + at, mask=there, other=0.0)
    return t


@triton.jit
def _make(
    flat, w_c, result, side, gain, program,
    TWO: tl.constexpr, NETWORK: tl.constexpr, FUSED: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store a tile of a side's matrix."""
    r, i1, chi, m2 = tl.load(side), tl.load(side + 3), tl.load(side + 4), tl.load(side + 5)
    tiles = tl.load(side + 18)
    i = program // tiles % i1
    j = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    rows = program // (tiles * i1) * ROWS + tl.arange(0, ROWS)
    out = tl.zeros([ROWS, COLUMNS], flat.dtype.element_ty)
    first = 0 if FUSED else program // (tiles * i1) * ROWS
    last = r if FUSED else first + 1
    for at in range(first, last, ROWS):
        s = at + tl.arange(0, ROWS)
        if TWO:
            tile = tl.zeros([ROWS, COLUMNS], flat.dtype.element_ty)
            for b in range(0, m2):
                for start in range(0, chi, INNER):
                    c = start + tl.arange(0, INNER)
                    place, there = _g2(side, c, b, j)
                    g2 = tl.load(flat + place, mask=there, other=0.0)
                    tile += _product(_inner(flat, side, s, i, b, c, NETWORK, INNER), g2)
        else:
            tile = _inner(flat, side, s, 0, 0, j, NETWORK, INNER)
        if FUSED:
            out += _product(tl.trans(_square(w_c, side, s, rows)), tile)
        else:
            out = tile
    place, there = _matrix(side, rows, i, j)
    tl.store(result + place, (out * gain).to(result.dtype.element_ty), mask=there)


@triton.jit
def forward(
    flat, w_c, a, b, geometry, gains, programs,
    TWO: tl.constexpr, NETWORK: tl.constexpr, FUSED: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store both matrices: the first programs make the first side, which alone is never fused unless it is the only one."""
    program = tl.program_id(0)
    if program < programs:
        _make(flat, w_c, a, geometry, tl.load(gains), program, TWO, NETWORK, False, ROWS, INNER, COLUMNS)
    else:
        gain, program = tl.load(gains + 1), program - programs
        _make(flat, w_c, b, geometry + FIELDS, gain, program, TWO, NETWORK, FUSED, ROWS, INNER, COLUMNS)


@triton.jit
def _add(at, value, there, first):
    """Add to sums that no other program adds to; store where this is the first time."""
    tl.debug_barrier()  # what was stored before may come from another thread
    old = tl.load(at, mask=there, other=0.0)
    tl.store(at, tl.where(first, value, old + value), mask=there)


@triton.jit
def _unmake(
    flat, w_c, grad, sums, side, gain, program,
    TWO: tl.constexpr, NETWORK: tl.constexpr, FUSED: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of a side's parts for some i and a tile of rows."""
    r, m1, i1, chi, m2 = tl.load(side), tl.load(side + 2), tl.load(side + 3), tl.load(side + 4), tl.load(side + 5)
    tiles, groups = tl.load(side + 18), tl.load(side + 19)
    count = i1 if TWO else tiles  # of what a program takes some: i, or tiles of c
    group, start = program % groups, program // groups * ROWS
    s = start + tl.arange(0, ROWS)
    squares = sums + tl.load(side + 20)
    for which in range(group, count, groups):
        i = which if TWO else 0
        new_group = which == group
        for b in range(0, m2):
            for offset in range(0, chi if TWO else 1, INNER):
                c = offset + tl.arange(0, INNER) if TWO else which * COLUMNS + tl.arange(0, COLUMNS)
                t = _inner(flat, side, s, i, b, c, NETWORK, INNER)
                d = tl.zeros(t.shape, t.dtype)
                new = new_group & (b == 0) & (offset == 0)
                for other in range(0 if FUSED else start, r if FUSED else start + 1, ROWS):
                    rows = other + tl.arange(0, ROWS)
                    square = _square(w_c, side, s, rows) if FUSED else 0.0
                    joined = _product(tl.trans(square), t) if FUSED else t
                    if TWO:
                        found = tl.zeros(t.shape, t.dtype)
                        for tile in range(0, tiles):
                            j = tile * COLUMNS + tl.arange(0, COLUMNS)
                            at, there = _matrix(side, rows, i, j)
                            g = tl.load(grad + at, mask=there, other=0.0).to(t.dtype) * gain
                            at, there = _g2(side, c, b, j)
                            found += _product(g, tl.trans(tl.load(flat + at, mask=there, other=0.0)))
                            _add(sums + at, _product(tl.trans(joined), g), there, new_group & (other == (0 if FUSED else start)))
                    else:
                        at, there = _matrix(side, rows, 0, c)
                        found = tl.load(grad + at, mask=there, other=0.0).to(t.dtype) * gain
                    if FUSED:
                        d += _product(square, found)
                        there = (s[:, None] < r) & (rows[None, :] < r)
                        _add(squares + s[:, None] * r + rows[None, :], _product(t, tl.trans(found)), there, new)
                    else:
                        d = found
                if NETWORK:
                    for first in range(0, m1, INNER):
                        a = first + tl.arange(0, INNER)
                        at, there = _g1(side, a, i, c)
                        g1 = tl.load(flat + at, mask=there, other=0.0)
                        place, exists = _w(side, s, a, b)
                        w = tl.load(flat + place, mask=exists, other=0.0)
                        _add(sums + at, _product(tl.trans(w), d), there, b == 0)
                        _add(sums + place, _product(d, tl.trans(g1)), exists, new_group & (offset == 0))
                else:
                    at, there = _g1(side, s, i, c)
                    tl.store(sums + at, d, mask=there)


@triton.jit
def backward(
    flat, w_c, a, b, sums, geometry, gains, programs, entries,
    TWO: tl.constexpr, NETWORK: tl.constexpr, FUSED: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store each program's sums, in a row of `entries`."""
    program = tl.program_id(0)
    sums += program.to(tl.int64) * entries
    if program < programs:
        _unmake(flat, w_c, a, sums, geometry, tl.load(gains), program, TWO, NETWORK, False, ROWS, INNER, COLUMNS)
    else:
        gain, program = tl.load(gains + 1), program - programs
        _unmake(flat, w_c, b, sums, geometry + FIELDS, gain, program, TWO, NETWORK, FUSED, ROWS, INNER, COLUMNS)


@triton.jit
def add(
    sums, of_flat, of_w_c, geometry, programs, split, total, entries,
    TWO: tl.constexpr, NETWORK: tl.constexpr, FUSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Add the programs' sums: `total` entries of the flat tensor, below `split` of the first side; then those of W_C."""
    entry = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    second = entry >= split
    side = geometry + tl.where(second, FIELDS, 0)
    r, i1, chi, groups = tl.load(side), tl.load(side + 3), tl.load(side + 4), tl.load(side + 19)
    w, g1, g2 = tl.load(side + 7), tl.load(side + 10), tl.load(side + 14)
    tiles = (r + ROWS - 1) // ROWS
    square = entry >= total
    of_w = (entry >= w) & (square == 0) if NETWORK else entry < 0
    of_g2 = (entry >= g2) & (of_w == 0) & (square == 0) if TWO else entry < 0
    own = (entry - w) // tl.load(side + 8) if NETWORK else (entry - g1) // tl.load(side + 11)
    row = tl.where(square, (entry - total) // r, own % r)
    i = (entry - g1) // tl.load(side + 12) % i1 if TWO else (entry - g1) // tl.load(side + 13) % chi // COLUMNS
    # Which rows of `sums` hold the entry: `first`, and every `step`-th after it.
    by_row = of_w | square
    first = tl.where(of_g2, 0, tl.where(by_row, row // ROWS * groups, i % groups))
    step = tl.where(of_g2 | by_row, 1, groups)
    count = tl.where(of_g2, groups * tiles, tl.where(by_row, groups, tiles))
    if NETWORK == 0:
        first, count = tl.where(square, first, row // ROWS * groups + i % groups), tl.where(square, groups, 1)
    inside = entry < total + (r * r if FUSED else 0)
    result = tl.zeros([SIZE], sums.dtype.element_ty)
    for k in range(0, tl.max(count)):
        at = (tl.where(second, programs, 0) + first + k * step).to(tl.int64) * entries + entry
        result += tl.load(sums + at, mask=inside & (k < count), other=0.0)
    tl.store(of_flat + entry, result, mask=inside & (square == 0))
    if FUSED:
        tl.store(of_w_c + entry - total, result, mask=inside & square)
