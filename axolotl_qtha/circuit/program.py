"""The ansatz folded for simulation: alternating walls and diagonals, and the constants every engine needs.

* The RYs that follow one another on a qubit add up, so the last trainable RY of a layer and the re-uploading RY(z) of
  the next are one *wall*, an RY on every qubit.
* A CRZ ring is one *diagonal* exp(i phi(s)), the same for all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .ansatz import Ansatz, Kind


@dataclass(frozen=True)
class Wall:
    """RY(encodes * z_i + sum of the `rows`) on every qubit."""

    encodes: int  # 0 or 1; with one qubit, which has no rings in between, the number of layers
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """The moments of an ansatz, folded: wall, diagonal, wall, ... A diagonal is (row of angles, its kind)."""

    walls: tuple[Wall, ...]
    diagonals: tuple[tuple[int, Kind], ...]


@lru_cache(maxsize=64)
def program(ansatz: Ansatz) -> Program:
    """Return the folded circuit."""
    walls: list[Wall] = []
    diagonals: list[tuple[int, Kind]] = []
    encodes, rows = 0, list[int]()
    for moment in ansatz.moments():
        if moment.row is None:
            encodes += 1
        elif moment.kind == "rotate":
            rows.append(moment.row)
        else:
            walls.append(Wall(encodes, tuple(rows)))
            diagonals.append((moment.row, moment.kind))
            encodes, rows = 0, []
    if encodes or rows:
        walls.append(Wall(encodes, tuple(rows)))
    # A last diagonal commutes with the Z read-out (gate order 2025-05): it is left out, its gradient is zero.
    return Program(tuple(walls), tuple(diagonals[: len(walls) - 1]))


@dataclass(frozen=True)
class Tables:
    """Constants of n qubits on one device."""

    signs: Tensor  # (2**n, n): +1 where the bit of qubit i is 0, else -1
    phases: dict[Kind, Tensor]  # (n, 2**n): phi(s) = theta @ phases
    generators: tuple[Tensor, Tensor]  # (4**half, qubits of the half): -iY of each qubit, flattened


@lru_cache(maxsize=64)
def tables(ansatz: Ansatz, device: torch.device, dtype: torch.dtype) -> Tables:
    """Return the constants on a device."""
    n = ansatz.qubits
    here: Any = {"dtype": dtype, "device": "cpu"}  # whatever torch.set_default_dtype and torch.device say
    states = torch.arange(2**n, dtype=torch.int64, device="cpu")
    bits = torch.stack([(states >> (n - 1 - i)) & 1 for i in range(n)]).to(dtype)  # (n, 2**n)
    phases: dict[Kind, Tensor] = {}
    if n > 1:
        for kind in ("ring", "counter"):
            # CRZ(t) = diag(1, 1, exp(-it/2), exp(it/2)) on (control, target)
            rows = [bits[control] * (bits[target] - 0.5) for control, target in ansatz.pairs(kind)]
            phases[kind] = torch.stack(rows).to(device)
    generator = torch.tensor([[0.0, -1.0], [1.0, 0.0]], **here)

    def generators(qubits: int) -> Tensor:
        columns = [
            torch.kron(torch.kron(torch.eye(2**i, **here), generator), torch.eye(2 ** (qubits - 1 - i), **here))
            for i in range(qubits)
        ]
        flat = [column.flatten() for column in columns]
        return torch.stack(flat, dim=1).to(device) if flat else torch.zeros(1, 0, dtype=dtype, device=device)

    return Tables((1 - 2 * bits).T.contiguous().to(device), phases, (generators(n // 2), generators(n - n // 2)))
