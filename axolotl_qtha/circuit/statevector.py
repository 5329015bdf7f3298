"""The state a circuit ends in, in Qiskit's order of amplitudes: for a look at it, and for what a paper says of an ansatz.

Training needs no states but their `<Z_i>`: those come from `torch_engine.py`, whose walls and phases are the ones here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import general
from .ansatz import Ansatz, Kind
from .program import Wall, tables
from .torch_engine import StateVector, _apply_wall, _kron, check_finite, check_shapes


def statevector(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return the state of one circuit for each token, differentiable in z and the angles.

    The circuit is that of `Ansatz.circuit()` on |0...0>, with the order of amplitudes of `qiskit.quantum_info.Statevector`: qubit
    0 is the least significant bit of an amplitude's number.

    Args:
        z: encoded inputs in radians, (..., n).
        angles: trained angles in radians, (rows, n); of a circuit of the user's own (rows, 1).
        ansatz: the circuit.

    Returns:
        complex128 of shape (..., 2**n) for a float64 z, else complex64; computed in float64.

    Raises:
        ValueError: if a shape does not fit, there are several circuits side by side, or an angle is NaN or infinite.
    """
    check_shapes(z, angles, ansatz)
    if (width := z.shape[-1]) != ansatz.width:
        count = width // ansatz.width
        columns = f"z[..., {ansatz.width} * b : {ansatz.width} * (b + 1)]"
        raise ValueError(
            f"z of shape {tuple(z.shape)} is for {count} circuits side by side, which have a state each. What works: one of "
            f"them, {columns} and the same columns of the angles, b being 0 to {count - 1}."
        )
    flat = z.reshape(-1, width)
    states = statevectors(flat, angles.expand(len(flat), *angles.shape), ansatz)
    return states.reshape(*z.shape[:-1], states.shape[-1])


def statevectors(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return the states of many circuits, each with angles of its own; see `statevector`.

    Args:
        z: encoded inputs in radians, (N, n).
        angles: trained angles in radians, (N, rows, columns).
        ansatz: the circuit.

    Returns:
        complex128 (N, 2**n) for a float64 z, else complex64.
    """
    check_finite(z, angles.flatten(0, 1), ansatz)
    with torch.autocast(z.device.type, enabled=False):
        if ansatz.is_own:
            own: Tensor = general.states(z.double()[None], angles.double().flatten(1), ansatz.gate_order)[0]
            return own if z.dtype == torch.float64 else own.to(torch.complex64)
        run = _Ensemble(z.double(), angles.double().transpose(0, 1), ansatz)
        state = run.forward()  # (N, 2**left, 2, 2**right), qubit 0 the most significant bit
        amplitudes = torch.complex(state[:, :, 0], state[:, :, 1]).reshape(len(z), *[2] * ansatz.qubits)
        turned = amplitudes.permute(0, *range(ansatz.qubits, 0, -1)).reshape(len(z), -1)
    return turned if z.dtype == torch.float64 else turned.to(torch.complex64)


class _Ensemble(StateVector):
    """Circuits with angles of their own, (rows, tokens, n); `forward` alone, but with autograd."""

    def __init__(self, z: Tensor, angles: Tensor, ansatz: Ansatz) -> None:
        super().__init__(z, angles, ansatz)
        last: list[tuple[int, Kind]] = []  # a ring after the last wall, which the program leaves out: it turns no <Z>
        for moment in reversed(ansatz.moments()):
            if moment.row is None or moment.kind == "rotate":
                break
            last.insert(0, (moment.row, moment.kind))
        self.last, self.phases = last, tables(ansatz, z.device, z.dtype).phases

    def wall(self, wall: Wall) -> tuple[Tensor, Tensor]:
        """Return the two halves of a wall, (tokens, 2**half, 2**half) each."""
        angle = self.angles[list(wall.rows)].sum(0) + wall.encodes * self.z
        cos, sin = torch.cos(angle / 2), torch.sin(angle / 2)
        rotations = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
        return _kron(rotations[:, : self.left]), _kron(rotations[:, self.left :])

    def forward(self) -> Tensor:
        """Return the final state."""
        left, right = self.wall(self.program.walls[0])
        real = left[:, :, :1] * right[:, None, :, 0]
        state = torch.stack([real, torch.zeros_like(real)], dim=2)
        for (row, kind), wall in zip(self.program.diagonals, self.program.walls[1:], strict=True):
            state = _apply_wall(self._turned(state, row, kind), *self.wall(wall))
        for row, kind in self.last:
            state = self._turned(state, row, kind)
        return state

    def _turned(self, state: Tensor, row: int, kind: Kind) -> Tensor:
        """Multiply by the phases of a CRZ ring."""
        phase = (self.angles[row] @ self.phases[kind]).view(-1, 2**self.left, 2**self.right)
        cos, sin = torch.cos(phase), torch.sin(phase)
        real, imag = state[:, :, 0], state[:, :, 1]
        return torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=2)
