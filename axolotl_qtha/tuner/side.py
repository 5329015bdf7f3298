"""The two large matrices of an adapter as they lie in its flat tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .table import Part

CoreShape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Side:
    """One of the two matrices in the flat tensor: gain * W (r, m) times the cores' operator (m, padded), cut to `size` columns.

    For B all is stored transposed: W as (m, r), cores as (chi, out_k, mid_k, chi'), a full matrix as (size, r); what is folded
    is B^T, which has r rows as well.
    """

    rank: int
    size: int  # columns
    start: int  # in the flat tensor, from where come the cores one behind the other, then W
    cores: tuple[CoreShape, ...]  # as stored, (chi_{k-1}, o_k, i_k, chi_k); none: a full matrix instead
    gain: float
    transposed: bool

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The parts as stored, one behind the other."""
        if not self.cores:
            return [(self.size, self.rank) if self.transposed else (self.rank, self.size)]
        mid = math.prod(core[2 if self.transposed else 1] for core in self.cores)
        return [*self.cores, (mid, self.rank) if self.transposed else (self.rank, mid)]

    @property
    def numbers(self) -> list[int]:
        """What the operator is given of it, but for the gain."""
        return [
            self.rank,
            self.size,
            self.start,
            int(self.transposed),
            len(self.cores),
            *(n for core in self.cores for n in core),
        ]

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Return views of the cores and W, or of the full matrix, all as for A: the axis of r, or of the middle, first."""
        views, at = list[Tensor](), self.start
        for shape in self.shapes:
            count = torch.Size(shape).numel()
            view = flat[at : at + count].view(shape)
            views.append((view.transpose(1, 2) if len(shape) == 4 else view.T) if self.transposed else view)
            at += count
        return views


class Sides:
    """The sides in a flat tensor, and what the operator is given of them."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.numbers = [number for side in sides for number in side.numbers]
        self.gains = [side.gain for side in sides]
        self.hold_b = any(side.transposed for side in sides)


def sides(parts: dict[str, Part], rank: int, size_a: int, size_b: int, scaling: float, fused: bool) -> dict[str, Sides]:
    """Return the sides that each flat tensor holds, that of A before that of B.

    Args:
        parts: the adapter's table.
        rank: of the adapter.
        size_a: in_features.
        size_b: out_features.
        scaling: alpha / rank.
        fused: whether W_C is part of B.
    """
    found: dict[str, list[Side]] = {}
    for side, size in (("a", size_a), ("b", size_b)):
        own = [part for name, part in parts.items() if name in (side, f"w_{side}") or name.startswith(f"mpo_{side}_")]
        gain = scaling * (parts["w_c"].gain if fused else 1.0) if side == "b" else 1.0
        cores: Any = tuple(part.shape for part in own if len(part.shape) == 4)
        gain *= math.prod(part.gain for part in own)
        start = min(part.start for part in own)
        found.setdefault(own[0].tensor, []).append(Side(rank, size, start, cores, gain, side == "b"))
    return {name: Sides(both) for name, both in found.items()}


@lru_cache(maxsize=1024)
def sides_of(numbers: tuple[int, ...], gains: tuple[float, ...]) -> list[Side]:
    """Return what `Sides` was made of."""
    found, at = [], 0
    for gain in gains:
        rank, size, start, transposed, count = numbers[at : at + 5]
        at += 5
        cores: Any = tuple(numbers[k : k + 4] for k in range(at, at + 4 * count, 4))
        at += 4 * count
        found.append(Side(rank, size, start, cores, gain, bool(transposed)))
    return found


def precise(value: Tensor) -> Tensor:
    """Return a tensor in the precision that all of an adapter but its products with tokens is computed in."""
    return value if value.dtype == torch.float64 else value.float()
