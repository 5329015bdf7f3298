"""The exact engine on an NVIDIA GPU: `circuit_triton.py`, one launch forward and one backward, compiled by Triton on first use.

In the GPU's memory are z, the angles, <Z>, their gradients and a few tables, but no states. Without Triton, and with more than
`MAX_QUBITS` qubits, the same is computed in PyTorch.
"""

from __future__ import annotations

import logging
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .ansatz import Ansatz
from .program import Program, program, tables

MAX_QUBITS = 8  # 4 * 2**8 float32 of a token and its adjoint are 32 registers for each lane of a warp, of 255
# Amplitudes of a warp, 16 or 8 a lane: backward holds four numbers for each, so 64 registers. Twice as many do not fit with what
# else is needed; half as many shuffle more, for more of the qubits lie across lanes.
AMPLITUDES = {torch.float32: 512, torch.float64: 256}
LANES = 32

LOG = logging.getLogger(__name__)


def runs(z: Tensor, qubits: int) -> bool:
    """Return whether the kernel takes this input."""
    return z.device.type == "cuda" and qubits <= MAX_QUBITS and works()


@lru_cache(maxsize=1)
def works() -> bool:
    """Return whether Triton can be used here; if not, the log says so once."""
    try:
        if torch.version.cuda is None:
            raise RuntimeError("not an NVIDIA GPU")  # others have other warps
        from triton.runtime import driver

        driver.active.get_current_target()  # needs a C compiler
        return True
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        LOG.warning(f"Triton cannot be used ({reason}): circuits run in PyTorch, with more memory and more time on a GPU.")
        return False


def block(qubits: int, dtype: torch.dtype) -> int:
    """Return how many tokens a program of the grid, one warp, takes."""
    return min(LANES, AMPLITUDES[dtype] >> qubits)


def settings(qubits: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the kernels' constants, and how they are compiled."""
    return (
        {"N": qubits, "COLUMNS": 1 << (qubits - 1).bit_length(), "T": block(qubits, dtype)},
        # Without maxnreg the assembler may spill a few registers to fit more warps. Sums of bits as integers may overflow.
        {"num_warps": 1, "maxnreg": 255, "enable_fp_fusion": True, "sanitize_overflow": False},
    )


@dataclass(frozen=True)
class _Constants:
    """What does not depend on the angles, on one device, for W walls."""

    select: Tensor  # (2 W - 1, rows, 1): 1 where a row adds to the angles of a wall, of the next diagonal, and so on
    phases: Tensor  # (W - 1, n, 2**n): of each diagonal, see `Tables`
    identity: Tensor  # (2**n): a diagonal's phases that are zero


@lru_cache(maxsize=64)
def _constants(ansatz: Ansatz, device: torch.device, dtype: torch.dtype) -> _Constants:
    folded = program(ansatz)
    walls = len(folded.walls)
    select = torch.zeros(2 * walls - 1, ansatz.rows, 1, dtype=dtype, device="cpu")
    for i, wall in enumerate(folded.walls):
        select[2 * i, list(wall.rows)] = 1
    for i, (row, _) in enumerate(folded.diagonals):
        select[2 * i + 1, row] = 1
    by_kind = tables(ansatz, device, dtype).phases
    phases = [by_kind[kind] for _, kind in folded.diagonals]
    return _Constants(
        select.to(device),
        torch.stack(phases) if phases else select.new_zeros(0, ansatz.qubits, 2**ansatz.qubits, device=device),
        select.new_zeros(2**ansatz.qubits, device=device),
    )


@lru_cache(maxsize=64)
def plan(ansatz: Ansatz, device: torch.device) -> Tensor:
    """Return what the kernels are told of the W walls and of the diagonal before each, (W, 5) int32.

    Columns: whether z is added to the wall's angles; whether each qubit of the diagonal's CRZ ring controls the next one (1) or
    the one before (-1); the first of the rows of angles that add up to the wall's, which follow one another, and the one after
    their last; the diagonal's row.
    """
    folded = program(ansatz)
    diagonals = [(0, 0), *((1 if kind == "ring" else -1, row) for row, kind in folded.diagonals)]
    entries = [
        (wall.encodes > 0, step, min(wall.rows, default=0), max(wall.rows, default=-1) + 1, row)
        for wall, (step, row) in zip(folded.walls, diagonals, strict=True)
    ]
    return torch.tensor(entries, dtype=torch.int32, device=device)


def factor(ansatz: Ansatz) -> float:
    """Return how often z is added to a wall's angles: once, or with one qubit as often as there are layers."""
    return float(max(wall.encodes for wall in program(ansatz).walls))


class Tables:
    """What the kernels take but for the tokens: computed once for angles (rows, width), those of circuits side by side."""

    def __init__(self, angles: Tensor, ansatz: Ansatz) -> None:
        folded: Program = program(ansatz)
        self.walls = len(folded.walls)
        self.factor, self.plan = factor(ansatz), plan(ansatz, angles.device)
        self.constants = _constants(ansatz, angles.device, angles.dtype)
        # Products and sums, no matmul: the user may allow TF32, which rounds an angle of one radian by 5e-4.
        summed = (self.constants.select * angles).sum(1)
        shared = summed.unflatten(1, (-1, ansatz.qubits)).transpose(0, 1)  # (circuits, 2 W - 1, n)
        self.circuits = shared.shape[0]
        phase = (self.constants.phases * shared[:, 1::2, :, None]).sum(2)
        identity = self.constants.identity.expand(self.circuits, 1, -1)
        turn = torch.cat([shared[:, ::2] / 2, torch.cat([identity, phase], dim=1)], dim=2)
        self.turns = torch.stack([turn.cos(), turn.sin()], dim=3)
        sizes, options = settings(ansatz.qubits, angles.dtype)
        self.block = sizes["T"]
        self.options = sizes | options

    def grid(self, tokens: int) -> tuple[int, int]:
        """Return the grid's programs: blocks of tokens, and circuits."""
        return -(-tokens // self.block), self.circuits

    def angle_gradients(self, sums: Tensor) -> Tensor:
        """Return the gradients of the angles, (rows, width), from those of walls and diagonals, (programs, 2 W - 1, width)."""
        return (self.constants.select * sums.sum(0)[:, None]).sum(0)


def forward(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return <Z_i>, (tokens, width), of contiguous z (tokens, width), angles (rows, width) in radians, float32 or float64."""
    return run(z, Tables(angles, ansatz))


def run(z: Tensor, tables: Tables) -> Tensor:
    """Return `forward` of z and the angles that the tables were made of."""
    from . import circuit_triton

    result = torch.empty_like(z)
    if z.shape[0] == 0:
        return result
    with torch.cuda.device_of(z):
        circuit_triton.forward[tables.grid(z.shape[0])](
            *(z, tables.turns, tables.plan, result, z.shape[0], tables.walls, tables.factor), **tables.options
        )
    return result


def backward(grad: Tensor, z: Tensor, angles: Tensor, ansatz: Ansatz) -> tuple[Tensor, Tensor]:
    """Return the gradients of sum(grad * <Z>) for z and the angles; all tensors contiguous, as for `forward`."""
    from . import circuit_triton

    grad_z = torch.empty_like(z)
    if z.shape[0] == 0:
        return grad_z, torch.zeros_like(angles)
    tables = Tables(angles, ansatz)
    grid = tables.grid(z.shape[0])
    # each program has its own place: no atomics, so that the sums do not depend on which comes first
    sums = z.new_empty(grid[0], 2 * tables.walls - 1, z.shape[1])
    with torch.cuda.device_of(z):
        circuit_triton.backward[grid](
            *(z, grad, tables.turns, tables.plan, grad_z, sums, z.shape[0], tables.walls, tables.factor),
            **tables.options,
        )
    return grad_z, tables.angle_gradients(sums)
