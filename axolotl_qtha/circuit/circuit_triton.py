"""The circuit of `ansatz.py` on a GPU: a warp holds the states of a block of tokens in its registers, from |0> to the end.

The circuit comes as alternating walls (RY on every qubit) and diagonals (a CRZ ring), see `program.py`. Importing this module
imports Triton; `triton_kernel.py` does so where it is needed.

The real or imaginary part of the states is a tensor of N axes of size 2, qubit 0 first, and a last axis of T tokens. Triton gives
the last axes to the 32 lanes of the warp: the tokens, then the last qubits. The first qubits are left for the registers of each
lane. So a gate on a first qubit is arithmetic within a lane, on a last qubit a shuffle; no state goes through shared memory.
Whatever is loaded has one axis, the tokens fastest, and is then reshaped: of several axes Triton would choose an order of its
own, and convert.

Backward recomputes the states, then un-computes them and the adjoint states from the end (Jones and Gacon, arXiv 2009.02823).

A token may have several circuits side by side, of N columns each: they are the grid's second axis. The functions without an
underscore serve `tuner/join_triton.py`, too, which runs all circuits of a token in one program.

Arguments of the two kernels, for W walls and C circuits; real ones have z's dtype, float32 or float64:

    z, grad, result, grad_z   (tokens, C * N), z in radians
    turns     (C, W, N + 2**N, 2): cos and sin, for each wall, of half the angles that all tokens share, then of the phases of
              the diagonal before it. Before the first wall it is the identity: loading it settles the lanes of a state
    plan      (W, 5) int32, see `triton_kernel.plan`
    sums      (programs, 2 W - 1, C * N): the gradients of the angles of the first wall, the first diagonal, the second wall and
              so on, summed over a program's tokens
    tokens, walls, factor     walls = W; `factor` is how often z is added where it is
    N, COLUMNS, T             qubits, the same rounded up to a power of two, tokens of a program
"""

# mypy: ignore-errors
# The functions are compiled by Triton: Python's types are not theirs.

import triton
import triton.language as tl


@triton.jit
def _bit(qubit: tl.constexpr, N: tl.constexpr):
    """Return 0 and 1 along the axis of a qubit."""
    return tl.reshape(tl.arange(0, 2), [1] * qubit + [2] + [1] * (N - qubit))


@triton.jit
def _signed(x, qubit: tl.constexpr, N: tl.constexpr):
    """Return x where a qubit is 0, -x where it is 1."""
    return tl.where(_bit(qubit, N) == 0, x, -x)


@triton.jit
def _partner(x, qubit: tl.constexpr):
    """Return x with a qubit flipped: the sum of both less itself, of the bits taken as integers, so without rounding.

    The compiler makes that the other register, or one shuffle.
    """
    bits = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    return (tl.sum(bits, qubit, keep_dims=True) - bits).to(x.dtype, bitcast=True)


@triton.jit
def _rotate(x, partner, cos, sin, qubit: tl.constexpr, N: tl.constexpr):
    """Return RY on a qubit of x, from cos and sin of half its angle."""
    return cos * x - _signed(sin, qubit, N) * partner


@triton.jit
def _total(x, N: tl.constexpr):
    """Return the sum over all states, (T)."""
    return tl.sum(tl.reshape(x, [2**N, x.shape[N]]), 0)


@triton.jit
def _row(x, q: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Return row q of a tensor (COLUMNS, T), with N axes of size 1 before the tokens."""
    row = tl.sum(tl.where(tl.arange(0, COLUMNS)[:, None] == q, x, 0.0), 0)
    return tl.reshape(row, [1] * N + [x.shape[1]])


@triton.jit
def place(first, tokens, column, width, N: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr):
    """Return where the numbers of T tokens and a circuit are in (tokens, width), and what of it exists, (COLUMNS * T)."""
    i = tl.arange(0, COLUMNS * T)
    token = (first + i % T).to(tl.int64)
    return token * width + column + i // T, (token < tokens) & (i // T < N)


# A function of its own: inlined, the addresses it computes would stay in registers that the states need.
@triton.jit(noinline=True)
def make_turns(turns, angles, plan, walls, column, width, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a circuit's part of `turns`, from angles (rows, width)."""
    dtype: tl.constexpr = turns.dtype.element_ty
    angles += column
    qubits, states = tl.arange(0, COLUMNS), tl.arange(0, 2**N)
    for w in range(walls):
        entry, here = plan + 5 * w, turns + 2 * w * (N + 2**N)
        shared = tl.zeros([COLUMNS], dtype)
        for row in range(tl.load(entry + 2), tl.load(entry + 3)):
            shared += tl.load(angles + row * width + qubits, mask=qubits < N, other=0.0).to(dtype)
        _store_turns(here, shared / 2, qubits, qubits < N)
        step, ring = tl.load(entry + 1), tl.load(entry + 4)
        phase = tl.zeros([2**N], dtype)
        for q in tl.static_range(N):  # bit_control * (bit_target - 1/2) times the angle
            half = tl.load(angles + ring * width + q).to(dtype) / 2
            target = (q + step + N) % N
            signed = tl.where((states >> (N - 1 - target)) & 1 == 1, half, -half)
            phase += tl.where((states >> (N - 1 - q)) & 1 == 1, signed, 0.0)
        _store_turns(here + 2 * N, tl.where(w > 0, phase, 0.0), states, states < 2**N)


@triton.jit
def _store_turns(turns, angle, i, used):
    tl.store(turns + 2 * i, tl.cos(angle), mask=used)
    tl.store(turns + 2 * i + 1, tl.sin(angle), mask=used)


@triton.jit
def encoding(z, factor, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Return cos and sin of half the encoded angles, a tuple of N rows each, from z (COLUMNS, T)."""
    all_cos, all_sin = tl.cos(z * (factor / 2)), tl.sin(z * (factor / 2))
    cos, sin = (), ()
    for q in tl.static_range(N):
        cos, sin = cos + (_row(all_cos, q, N, COLUMNS),), sin + (_row(all_sin, q, N, COLUMNS),)  # noqa: RUF005, Triton has no *cos
    return cos, sin


@triton.jit
def _half(circuit, w, q: tl.constexpr, N: tl.constexpr):
    """Return cos and sin of half the angle of a wall's qubit, by the addition formulas."""
    turns, plan, cos_z, sin_z = circuit
    here = turns + 2 * w * (N + 2**N) + 2 * q
    cos, sin = tl.load(here), tl.load(here + 1)
    encoded = tl.load(plan + 5 * w) != 0
    return tl.where(encoded, cos * cos_z[q] - sin * sin_z[q], cos), tl.where(encoded, sin * cos_z[q] + cos * sin_z[q], sin)


@triton.jit
def _phase(turns, w, N: tl.constexpr, T: tl.constexpr):
    """Return cos and sin of the phases of the diagonal before wall w."""
    at = turns + 2 * w * (N + 2**N) + 2 * N + 2 * (tl.arange(0, 2**N * T) // T)
    return tl.reshape(tl.load(at), [2] * N + [T]), tl.reshape(tl.load(at + 1), [2] * N + [T])


@triton.jit
def states(circuit, walls, N: tl.constexpr, T: tl.constexpr):
    """Return the final states, real and imaginary part."""
    re, im = _phase(circuit[0], 0, N, T)  # 1 and 0
    for q in tl.static_range(N):  # RYs on |0>: a real product state
        cos, sin = _half(circuit, 0, q, N)
        re *= tl.where(_bit(q, N) == 0, cos, sin)
    for w in range(1, walls):
        a, b = _phase(circuit[0], w, N, T)
        re, im = re * a - im * b, re * b + im * a
        for q in tl.static_range(N):
            cos, sin = _half(circuit, w, q, N)
            re, im = _rotate(re, _partner(re, q), cos, sin, q, N), _rotate(im, _partner(im, q), cos, sin, q, N)
    return re, im


@triton.jit
def _undo_wall(re, im, lre, lim, circuit, w, N: tl.constexpr, COLUMNS: tl.constexpr, UNDO: tl.constexpr):
    """Return the states and adjoint states without the wall, if UNDO, and the gradients of its angles (COLUMNS, T)."""
    gradients = tl.zeros([COLUMNS, re.shape[N]], re.dtype)
    for q in tl.static_range(N):
        partner_re, partner_im = _partner(re, q), _partner(im, q)
        gradient = -_total(_signed(lre * partner_re + lim * partner_im, q, N), N)  # Re <adjoint| -iY |state>
        gradients = tl.where(tl.arange(0, COLUMNS)[:, None] == q, gradient[None, :], gradients)
        if UNDO:
            cos, sin = _half(circuit, w, q, N)
            re, im = _rotate(re, partner_re, cos, -sin, q, N), _rotate(im, partner_im, cos, -sin, q, N)
            lre, lim = _rotate(lre, _partner(lre, q), cos, -sin, q, N), _rotate(lim, _partner(lim, q), cos, -sin, q, N)
    return re, im, lre, lim, gradients


@triton.jit
def _ring_gradients(re, im, lre, lim, step, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the gradients of a diagonal's angles, summed over the tokens, (COLUMNS).

    Its derivative is i v(s) for v = bit_control * (bit_target - 1/2), so the gradient is -2 sum_s v(s) Im(conj(adjoint) state).
    """
    imaginary = lre * im - lim * re
    gradients = tl.zeros([COLUMNS], re.dtype)
    for q in tl.static_range(N):
        by_target = tl.where(step > 0, _signed(imaginary, (q + 1) % N, N), _signed(imaginary, (q + N - 1) % N, N))
        gradient = tl.sum(_total(tl.where(_bit(q, N) == 1, by_target, 0.0), N), 0)
        gradients = tl.where(tl.arange(0, COLUMNS) == q, gradient, gradients)
    return gradients


@triton.jit
def values(re, im, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Return <Z_i>, (COLUMNS, T)."""
    probability = re * re + im * im
    result = tl.zeros([COLUMNS, re.shape[N]], re.dtype)
    for q in tl.static_range(N):
        value = _total(_signed(probability, q, N), N)
        result = tl.where(tl.arange(0, COLUMNS)[:, None] == q, value[None, :], result)
    return result


@triton.jit
def add(at, value, used, again):
    """Store a value, or add it if `again`."""
    tl.store(at, value + tl.where(again, tl.load(at, mask=used, other=0.0), 0.0), mask=used)


@triton.jit
def undo(
    re, im, grad, first, tokens, width, circuit, sums, again, walls, N: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr
):
    """Return the gradients of sum(grad * <Z>) for the encoded angles, (COLUMNS, T), from the final states.

    grad (tokens, width) and sums (2 W - 1, width) begin at the circuit's first column. Those of the shared angles are stored in
    `sums`, or added if `again`.
    """
    turns, plan, _, _ = circuit
    token = (first + tl.arange(0, T)).to(tl.int64)
    weights = tl.zeros_like(re)
    for q in tl.static_range(N):  # zero where there is no token, and so is all that follows from it
        weight = tl.load(grad + token * width + q, mask=token < tokens, other=0.0)
        weights += _signed(tl.reshape(weight, [1] * N + [T]), q, N)
    lre, lim = weights * re, weights * im  # the adjoint states: sum_q grad_q Z_q |state>

    of_z = tl.zeros([COLUMNS, T], re.dtype)
    sums += tl.arange(0, COLUMNS)
    used = tl.arange(0, COLUMNS) < N
    for w in range(walls - 1, 0, -1):
        re, im, lre, lim, of_wall = _undo_wall(re, im, lre, lim, circuit, w, N, COLUMNS, True)
        of_z += tl.where(tl.load(plan + 5 * w) != 0, of_wall, 0.0)
        add(sums + 2 * w * width, tl.sum(of_wall, 1), used, again)
        of_ring = _ring_gradients(re, im, lre, lim, tl.load(plan + 5 * w + 1), N, COLUMNS)
        add(sums + (2 * w - 1) * width, of_ring, used, again)
        a, b = _phase(turns, w, N, T)
        re, im = re * a + im * b, im * a - re * b
        lre, lim = lre * a + lim * b, lim * a - lre * b
    of_wall = _undo_wall(re, im, lre, lim, circuit, 0, N, COLUMNS, False)[4]
    of_z += tl.where(tl.load(plan) != 0, of_wall, 0.0)
    add(sums, tl.sum(of_wall, 1), used, again)
    return of_z


@triton.jit
def _here(turns, walls, N: tl.constexpr, T: tl.constexpr):
    """Return this program's first token, its circuit's first column, the width of z, and its circuit's part of `turns`."""
    circuit = tl.program_id(1)
    turns += circuit * 2 * walls * (N + 2**N)
    return tl.program_id(0) * T, circuit * N, tl.num_programs(1) * N, turns


# Neither the number of tokens nor where z starts in memory is worth compiling anew.
@triton.jit(do_not_specialize=["tokens", "walls"], do_not_specialize_on_alignment=["z"])
def forward(z, turns, plan, result, tokens, walls, factor, N: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr):
    """Store <Z_i> of T tokens."""
    first, column, width, turns = _here(turns, walls, N, T)
    at, inside = place(first, tokens, column, width, N, COLUMNS, T)
    cos_z, sin_z = encoding(tl.reshape(tl.load(z + at, mask=inside, other=0.0), [COLUMNS, T]), factor, N, COLUMNS)
    re, im = states((turns, plan, cos_z, sin_z), walls, N, T)
    tl.store(result + at, tl.reshape(values(re, im, N, COLUMNS), [COLUMNS * T]), mask=inside)


@triton.jit(do_not_specialize=["tokens", "walls"], do_not_specialize_on_alignment=["z", "grad"])
def backward(z, grad, turns, plan, grad_z, sums, tokens, walls, factor, N: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr):
    """Store the gradients of sum(grad * <Z>) of T tokens: for z, and the sums over the tokens for the angles."""
    first, column, width, turns = _here(turns, walls, N, T)
    at, inside = place(first, tokens, column, width, N, COLUMNS, T)
    cos_z, sin_z = encoding(tl.reshape(tl.load(z + at, mask=inside, other=0.0), [COLUMNS, T]), factor, N, COLUMNS)
    circuit = (turns, plan, cos_z, sin_z)
    re, im = states(circuit, walls, N, T)
    sums += tl.program_id(0).to(tl.int64) * (2 * walls - 1) * width + column
    of_z = undo(re, im, grad + column, first, tokens, width, circuit, sums, False, walls, N, COLUMNS, T)
    tl.store(grad_z + at, tl.reshape(of_z * factor, [COLUMNS * T]), mask=inside)
