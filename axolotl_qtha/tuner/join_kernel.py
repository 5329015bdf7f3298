"""From z to h and back on an NVIDIA GPU: `join_triton.py`, one launch forward and two backward, compiled by Triton on first use.

In the GPU's memory are z, h, the parameters, their gradients and a few arrays as long as z, but no states.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..circuit import triton_kernel
from ..circuit.ansatz import Ansatz
from ..circuit.program import program
from .joint import Joint

# As many warps of 255 registers as the largest GPUs hold at one time, eight on each multiprocessor. A program makes the tables of
# its circuits, which takes about as long as a block of tokens forward: so few programs, of several blocks each.
PROGRAMS = 1024
SCRATCH = 2**24  # numbers of all programs' tables and sums: with many layers or a large rank there are fewer programs
TOTALS = (256, 8)  # programs whose sums are added at one time, and columns of them


def runs(z: Tensor, joint: Joint) -> bool:
    """Return whether the kernel takes z (tokens, r)."""
    return joint.ansatz is not None and not joint.ansatz.is_own and triton_kernel.runs(z, joint.ansatz.qubits)


@dataclass(frozen=True)
class _Launch:
    """What both kernels take of tokens and sizes."""

    sizes: tuple[Any, ...]  # the arguments from `tokens` to `gain`
    options: dict[str, Any]
    programs: int
    turns: Tensor
    plan: Tensor


def _launch(z: Tensor, dtype: torch.dtype, joint: Joint, sums: int) -> _Launch:
    """Return it for kernels that also need so many numbers a program for its sums."""
    ansatz, (tokens, r) = _circuit(joint), z.shape
    walls = len(program(ansatz).walls)
    turns = 2 * walls * (ansatz.qubits + 2**ansatz.qubits)
    constants, options = triton_kernel.settings(ansatz.qubits, dtype)
    span, programs = split(tokens, constants["T"], min(PROGRAMS, max(1, SCRATCH // (sums + turns))))
    return _Launch(
        (tokens, span, walls, r, triton_kernel.factor(ansatz), joint.gain),
        # A pipeline would copy the tiles of the next step to shared memory, which takes longer than these short loops.
        constants | {"BOUNDED": joint.bounded, "PRODUCT": joint.product} | options | {"num_stages": 1},
        programs,
        torch.empty(programs, turns, dtype=dtype, device=z.device),
        triton_kernel.plan(ansatz, z.device),
    )


def split(tokens: int, block: int, limit: int) -> tuple[int, int]:
    """Return how many tokens a program takes, whole blocks of them, and how many programs that are: at most `limit`."""
    blocks = -(-tokens // block)
    span = -(-blocks // limit) * block
    return span, -(-tokens // span)


@lru_cache(maxsize=64)
def _slots(ansatz: Ansatz, device: torch.device) -> Tensor:
    """Return to which wall or diagonal each row of angles adds, -1 for none, and where the sums of the scale are."""
    folded = program(ansatz)
    walls, slots = len(folded.walls), [-1] * ansatz.rows
    for index, wall in enumerate(folded.walls):
        for row in wall.rows:
            slots[row] = 2 * index
    for index, (row, _) in enumerate(folded.diagonals):
        slots[row] = 2 * index + 1
    return torch.tensor([*slots, 2 * walls - 1], dtype=torch.int32, device=device)


def forward(z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, joint: Joint) -> Tensor:
    """Return h (tokens, r) in z's dtype.

    Computed in float32, in float64 where `fusion` is. All tensors are contiguous and on one GPU.

    Args:
        z: (tokens, r), in any floating-point dtype.
        fusion: (2 r r), W_C and W_Q without their gain.
        angles: (rows * r), in radians.
        scale: (r), or None.
        joint: the rest.
    """
    from . import join_triton

    h, dtype = torch.empty_like(z), _precise(fusion)
    if z.shape[0] == 0:
        return h
    launch, q = _launch(z, dtype, joint, 0), torch.empty_like(z, dtype=dtype)
    with torch.cuda.device_of(z):
        join_triton.forward[(launch.programs,)](
            *(z, fusion, angles, scale, launch.plan, launch.turns, q, h), *launch.sizes, **launch.options
        )
    return h


def backward(
    grad: Tensor, z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, joint: Joint
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of sum(grad * h) for z, `fusion`, `angles` and `scale`, each in its shape and dtype.

    The arguments are those of `forward`, and grad (tokens, r). Everything is computed again from z.
    """
    from . import join_triton

    of_z, dtype, r = torch.empty_like(z), _precise(fusion), z.shape[1]
    shared = [None if x is None else torch.empty_like(x) for x in (fusion, angles, scale)]
    of_fusion, of_angles, of_scale = shared
    assert of_fusion is not None
    assert of_angles is not None
    if z.shape[0] == 0:
        for x in shared:
            if x is not None:
                x.zero_()
        return of_z, of_fusion, of_angles, of_scale
    ansatz = _circuit(joint)
    walls = len(program(ansatz).walls)
    launch = _launch(z, dtype, joint, 2 * r * (r + walls))
    q, of_q = torch.empty_like(z, dtype=dtype), torch.empty_like(z, dtype=dtype)
    of_linear, of_branch = (torch.empty_like(q), torch.empty_like(q)) if joint.product else (grad, grad)
    # each program has its own place: no atomics, so that the sums do not depend on which comes first
    sums = q.new_empty(launch.programs, 2 * r * (r + walls))
    with torch.cuda.device_of(z):
        join_triton.backward[(launch.programs,)](
            *(z, grad, fusion, angles, scale, launch.plan, launch.turns, q, of_q, of_linear, of_branch, of_z, sums),
            *launch.sizes,
            **launch.options,
        )
        at_once, columns = TOTALS
        join_triton.totals[(-(-(2 * r + ansatz.rows + 1) * r // columns),)](
            *(sums, _slots(ansatz, z.device), of_fusion, of_angles, of_scale),
            *(launch.programs, walls, r, ansatz.rows, joint.gain, at_once, columns),
            enable_fp_fusion=True,
        )
    return of_z, of_fusion, of_angles, of_scale


def _precise(fusion: Tensor) -> torch.dtype:
    return torch.float64 if fusion.dtype == torch.float64 else torch.float32


def _circuit(joint: Joint) -> Ansatz:
    assert joint.ansatz is not None  # `runs` has said no to others
    return joint.ansatz
