"""Exact state-vector engine, batched over tokens, with an adjoint backward.

A token may have several circuits side by side, each on its own n of the width of z and with its own n of the angles' columns.

On a CPU it is compiled (`native.py`), on an NVIDIA GPU fused up to 8 qubits (`triton_kernel.py`), and else in PyTorch. Circuits
of the user's own run gate by gate (`general.py`), unless they consist of the built-in one's moments.

A circuit is a row of walls (an RY on every qubit) with diagonals (a ring of CRZ) between them, see `program.py`. In PyTorch a
wall is a real Kronecker product, applied as two half-size matrices, and a diagonal is a product with its phases.

Backward un-computes the state from the end (adjoint differentiation, Jones and Gacon, arXiv 2009.02823) and keeps z and
the angles alone, so the memory kept does not depend on the number of layers, nor on 2**n.

State layout: (tokens, 2**left, 2, 2**right), the 2 being real and imaginary part, qubit 0 the most significant bit, so both
halves of a wall are plain batched matmuls.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import general, native, triton_kernel
from .ansatz import Ansatz
from .operators import differentiable, operator
from .program import Wall, program, tables
from .simulation import EXACT, Simulation

CACHE_AMPLITUDES = 2**17  # amplitudes per chunk of tokens: 1 MiB of float32 state, about a core's L2 cache

LOG = logging.getLogger(__name__)

# A global and no context variable: on a GPU, autograd runs backward in a thread of its own, which would not see that.
_plain = False


class NonFiniteAngle(ValueError):
    """An angle of the circuit is NaN or infinite."""


def prepare(ansatz: Ansatz, simulation: Simulation = EXACT) -> None:
    """Say how slow a circuit is that no fast engine runs; this one runs everywhere."""
    if ansatz.is_own:
        LOG.warning(slowness(ansatz))


@lru_cache(maxsize=16)
def slowness(ansatz: Ansatz) -> str:
    """Return in words how long a circuit of the user's own takes here, beside the built-in one of as many qubits."""
    built_in = Ansatz(ansatz.qubits, 2)

    def run(grad: Tensor, z: Tensor, angles: Tensor) -> None:
        with exactly("cpu"):
            values_and_gradients(grad, z, angles, built_in)

    own, tokens = ansatz.described(), 256
    taken, times = general.slowness(own, run, (built_in.rows, built_in.qubits), tokens)
    return (
        f"circuit: {len(own.circuit.data)} gates on {ansatz.qubits} qubits that no fast engine has: they run one by one in "
        f"PyTorch, {1e3 * taken:.1f} ms for {tokens} tokens forward and backward on this CPU, {times:.0f} times as long as the "
        "built-in circuit of as many qubits and 2 layers. What is faster: RY and CRZ as in the built-in circuit, in any order."
    )


def expectation_values(z: Tensor, angles: Tensor, ansatz: Ansatz, simulation: Simulation = EXACT) -> Tensor:
    """Return <Z_i> exactly, float64 in float64 and anything else in float32; for the arguments see `tuner/backends.py`."""
    check_shapes(z, angles, ansatz)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    flat = z.reshape(-1, z.shape[-1]).to(dtype)
    result: Tensor = _run(flat, angles.to(dtype), ansatz.qubits, ansatz.layers, ansatz.gate_order)
    return result.reshape(z.shape)


def gradients(grad: Tensor, z: Tensor, angles: Tensor, ansatz: Ansatz) -> tuple[Tensor, Tensor]:
    """Return the exact gradients of sum(grad * <Z>): (tokens, width) for z (tokens, width) and (rows, width) for the angles."""
    with exactly(z.device.type):
        return values_and_gradients(grad.contiguous(), z.contiguous(), angles.contiguous(), ansatz)[1:]


def fused(z: Tensor, ansatz: Ansatz) -> Any:
    """Return the module whose `forward` and `backward` run these circuits on z's device in one go; None: PyTorch does."""
    if _plain or ansatz.is_own:
        return None
    if native.runs(z):
        return native
    return triton_kernel if triton_kernel.runs(z, ansatz.qubits) else None


@contextmanager
def in_pytorch() -> Iterator[None]:
    """Run circuits in PyTorch inside, to compare."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def plain() -> bool:
    """Return whether circuits are to be run in PyTorch, see `in_pytorch`."""
    return _plain


@contextmanager
def exactly(device_type: str) -> Iterator[None]:
    """Compute without gradients; keep autocast, `tf32: true` and the like from rounding the matmuls inside to some 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_shapes(z: Tensor, angles: Tensor, ansatz: Ansatz) -> None:
    """Refuse shapes that do not fit one circuit of the ansatz, or several side by side."""
    width = z.shape[-1]
    if not width or width % ansatz.width or tuple(angles.shape) != (ansatz.rows, ansatz.columns(width)):
        columns = "n / " + str(ansatz.width) if ansatz.is_own else "n"
        raise ValueError(
            f"z of shape {tuple(z.shape)} and angles of shape {tuple(angles.shape)} do not fit {ansatz}: "
            f"expected (..., n) and ({ansatz.rows}, {columns}), n being {ansatz.width} or a multiple of it."
        )


def check_finite(z: Tensor, angles: Tensor, ansatz: Ansatz) -> None:
    """Refuse angles that are NaN or infinite; `z` is (tokens, width)."""
    if math.isfinite((z.sum() + angles.sum()).item()):
        return
    for what, values in (("trained angle", angles), ("encoded input", z)):
        if not bool(torch.isfinite(values).all()):
            row, column = (~torch.isfinite(values)).nonzero()[0].tolist()
            where = f"row {row}" if values is angles else f"token {row}"
            width = 1 if ansatz.is_own and values is angles else ansatz.width
            where += f", circuit {column // width}" if z.shape[1] > ansatz.width else ""
            of = f" of {'input' if ansatz.is_own else 'qubit'} {column % width}" if width > 1 or not ansatz.is_own else ""
            raise NonFiniteAngle(
                f"the circuit's {what}{of} ({where}) is {values[row, column].item()}. What works: a smaller "
                "learning_rate or max_grad_norm, from the last good checkpoint; a base in bfloat16 rather than float16."
            )


class StateVector:
    """One circuit on one chunk of tokens."""

    def __init__(self, z: Tensor, angles: Tensor, ansatz: Ansatz) -> None:
        self.z, self.angles = z, angles
        self.left = ansatz.qubits // 2
        self.right = ansatz.qubits - self.left
        self.program = program(ansatz)
        self.tables = tables(ansatz, z.device, z.dtype)

    def wall(self, wall: Wall) -> tuple[Tensor, Tensor]:
        """Return the two halves of a wall, (tokens or 1, 2**half, 2**half) each."""
        angle = self.angles[list(wall.rows)].sum(0, keepdim=True)  # (1, n)
        if wall.encodes:
            angle = angle + wall.encodes * self.z
        cos, sin = torch.cos(angle / 2), torch.sin(angle / 2)
        rotations = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))  # (tokens or 1, n, 2, 2)
        return _kron(rotations[:, : self.left]), _kron(rotations[:, self.left :])

    def diagonal(self, index: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin of a CRZ ring's phases, (2**left, 2**right) each."""
        row, kind = self.program.diagonals[index]
        phase = (self.angles[row] @ self.tables.phases[kind]).view(2**self.left, 2**self.right)
        return torch.cos(phase), torch.sin(phase)

    def forward(self) -> Tensor:
        """Return the final state."""
        first_left, first_right = self.wall(self.program.walls[0])
        real = first_left[:, :, :1] * first_right[:, None, :, 0]  # RYs on |0>: a real product state
        state = torch.stack([real, torch.zeros_like(real)], dim=2)
        for index, wall in enumerate(self.program.walls[1:]):
            state = _rotate_phase(state, *self.diagonal(index))
            state = _apply_wall(state, *self.wall(wall))
        return state

    def expectations(self, state: Tensor) -> Tensor:
        """Return <Z_i>, (tokens, n)."""
        probabilities = state.square().sum(dim=2).flatten(1)
        return probabilities @ self.tables.signs

    def gradients(self, psi: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return <Z>, and the gradients of sum(grad * <Z>): (tokens, n) for z and (rows, n) for the angles."""
        values = self.expectations(psi)
        # E = <psi|D|psi> with D = sum_i grad_i Z_i; the adjoint state starts as D psi.
        adjoint = (grad @ self.tables.signs.T).view(-1, 2**self.left, 1, 2**self.right) * psi
        grad_z, grad_angles = torch.zeros_like(grad), torch.zeros_like(self.angles)
        for index in range(len(self.program.walls) - 1, -1, -1):
            wall = self.program.walls[index]
            grad_wall = self._wall_gradient(psi, adjoint)
            if wall.encodes:
                grad_z += wall.encodes * grad_wall
            for row in wall.rows:
                grad_angles[row] += grad_wall.sum(0)
            if index == 0:
                break
            left, right = self.wall(wall)
            undo = left.transpose(1, 2), right.transpose(1, 2)
            psi, adjoint = _apply_wall(psi, *undo), _apply_wall(adjoint, *undo)
            row, kind = self.program.diagonals[index - 1]
            # A ring multiplies basis state s by exp(i t w(s)), w being `phases`: dE/dt = -2 sum_s w(s) Im(conj(adjoint) psi)
            imaginary = (adjoint[:, :, 0] * psi[:, :, 1]).sub_(adjoint[:, :, 1] * psi[:, :, 0]).sum(0).flatten()
            grad_angles[row] += -2 * (self.tables.phases[kind] @ imaginary)
            cos, sin = self.diagonal(index - 1)
            psi, adjoint = _rotate_phase(psi, cos, -sin), _rotate_phase(adjoint, cos, -sin)
        return values, grad_z, grad_angles

    def _wall_gradient(self, psi: Tensor, adjoint: Tensor) -> Tensor:
        """Return dE/dangle = Re <adjoint| -iY_i |psi> of every token and qubit, (tokens, n)."""
        tokens, right = psi.shape[0], 2**self.right
        by_left = adjoint.flatten(2) @ psi.flatten(2).transpose(1, 2)
        by_right = adjoint.reshape(tokens, -1, right).transpose(1, 2) @ psi.reshape(tokens, -1, right)
        gradients = [by.flatten(1) @ table for by, table in zip((by_left, by_right), self.tables.generators, strict=True)]
        return torch.cat(gradients, dim=1)


def _kron(rotations: Tensor) -> Tensor:
    """Kronecker product over the qubits: (tokens, q, 2, 2) -> (tokens, 2**q, 2**q)."""
    result = rotations.new_ones(rotations.shape[0], 1, 1)
    for i in range(rotations.shape[1]):
        size = 2 * result.shape[-1]
        block = result[:, :, None, :, None] * rotations[:, i][:, None, :, None, :]
        result = block.reshape(-1, size, size)
    return result


def _apply_wall(state: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Apply left (x) right to the two halves of the state, to real and imaginary part alike."""
    shape = state.shape
    state = torch.matmul(left, state.flatten(2))
    if right.shape[0] == 1:  # the same wall for all tokens: one large product instead of a batch of small ones
        return (state.reshape(-1, shape[-1]) @ right[0].T).reshape(shape)
    return torch.bmm(state.reshape(shape[0], -1, shape[-1]), right.transpose(1, 2)).reshape(shape)


def _rotate_phase(state: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply the state by cos + i sin."""
    real, imag = state[:, :, 0], state[:, :, 1]
    result = torch.empty_like(state)
    torch.mul(real, cos, out=result[:, :, 0]).addcmul_(imag, sin, value=-1)
    torch.mul(real, sin, out=result[:, :, 1]).addcmul_(imag, cos)
    return result


def chunk_tokens(qubits: int) -> int:
    """Return how many tokens are simulated at one time."""
    return max(1, CACHE_AMPLITUDES >> qubits)


def _parts(z: Tensor, qubits: int) -> Iterator[tuple[slice, slice]]:
    """Yield the tokens and the columns of z (tokens, width) that are simulated at one time: a circuit on a chunk of tokens."""
    for column in range(0, z.shape[1], qubits):
        for start in range(0, z.shape[0], chunk_tokens(qubits)):
            yield slice(start, start + chunk_tokens(qubits)), slice(column, column + qubits)


def values(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return <Z_i>, (tokens, width), of contiguous z (tokens, width) and angles (rows, width); inside `exactly`."""
    if z.device.type == "cpu":  # on a GPU the answer would have to be waited for
        check_finite(z, angles, ansatz)
    if (kernel := fused(z, ansatz)) is not None:
        result: Tensor = kernel.forward(z, angles, ansatz)
        return result
    if ansatz.is_own:
        return general.values(z, angles, ansatz.gate_order)
    result = torch.empty_like(z)
    for tokens, columns in _parts(z, ansatz.qubits):
        run = StateVector(z[tokens, columns], angles[:, columns], ansatz)
        result[tokens, columns] = run.expectations(run.forward())
    return result


def values_and_gradients(grad: Tensor, z: Tensor, angles: Tensor, ansatz: Ansatz) -> tuple[Tensor, Tensor, Tensor]:
    """Return <Z_i>, and the gradients of sum(grad * <Z>) for z and the angles; all contiguous, inside `exactly`."""
    kernel = fused(z, ansatz)
    if kernel is native:
        return native.backward(grad, z, angles, ansatz)
    if ansatz.is_own:
        return general.values_and_gradients(grad, z, angles, ansatz.gate_order)
    if kernel is not None:
        return kernel.forward(z, angles, ansatz), *kernel.backward(grad, z, angles, ansatz)
    result, grad_z, grad_angles = torch.empty_like(z), torch.empty_like(z), torch.zeros_like(angles)
    for tokens, columns in _parts(z, ansatz.qubits):
        run = StateVector(z[tokens, columns], angles[:, columns], ansatz)
        result[tokens, columns], grad_z[tokens, columns], of_angles = run.gradients(run.forward(), grad[tokens, columns])
        grad_angles[:, columns] += of_angles
    return result, grad_z, grad_angles


@operator(
    "circuit(Tensor z, Tensor angles, int qubits, int layers, str gate_order) -> Tensor",
    lambda z, angles, qubits, layers, gate_order: torch.empty_like(z),
)
def _circuit(z: Tensor, angles: Tensor, qubits: int, layers: int, gate_order: str) -> Tensor:
    with exactly(z.device.type):
        return values(z.contiguous(), angles.contiguous(), Ansatz(qubits, layers, gate_order))


@operator(
    "circuit_grad(Tensor grad, Tensor z, Tensor angles, int qubits, int layers, str gate_order) -> (Tensor, Tensor)",
    lambda grad, z, angles, qubits, layers, gate_order: (torch.empty_like(z), torch.empty_like(angles)),
)
def _circuit_grad(grad: Tensor, z: Tensor, angles: Tensor, qubits: int, layers: int, gate_order: str) -> tuple[Tensor, Tensor]:
    return gradients(grad, z, angles, Ansatz(qubits, layers, gate_order))


_run = differentiable(_circuit, _circuit_grad, 2)
