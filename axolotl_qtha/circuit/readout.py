"""What is read out of many circuits at one time, each with angles of its own: the one place that knows it is `<Z>`.

The engine runs circuits with angles of their own side by side, so an ensemble is one wide row of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_engine
from .ansatz import Ansatz

COLUMNS = 2**18  # of the wide row, which bounds the memory


def expectations(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return what is read out: <Z_i>, (draws, tokens, outputs).

    Args:
        z: encoded inputs in radians, (draws, tokens, n).
        angles: trained angles in radians, (draws, rows, columns): one table for all tokens of a draw.
        ansatz: the circuit.
    """
    draws, tokens, n = z.shape
    wide = z.transpose(0, 1).reshape(tokens, draws * n)
    found = torch_engine.expectation_values(wide, angles.transpose(0, 1).flatten(1), ansatz)
    return found.reshape(tokens, draws, n).transpose(0, 1)


def jacobians(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return the derivatives of what is read out for the trained angles, (N, outputs, rows, columns).

    Args:
        z: encoded inputs in radians, (N, n).
        angles: trained angles in radians, (N, rows, columns).
        ansatz: the circuit.
    """
    many = max(1, COLUMNS // z.shape[1] ** 2)
    parts = [_jacobians(z[i : i + many], angles[i : i + many], ansatz) for i in range(0, len(z), many)]
    return torch.cat(parts)


def _jacobians(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return them from one wide row, in which each circuit stands once for each output."""
    (count, n), (rows, columns) = z.shape, angles.shape[1:]
    wide = z[:, None].expand(count, n, n).reshape(1, -1)
    table = angles[:, None].expand(count, n, rows, columns).permute(2, 0, 1, 3).reshape(rows, -1)
    one = torch.eye(n, dtype=z.dtype, device=z.device).expand(count, n, n).reshape(1, -1)
    _, found = torch_engine.gradients(one, wide, table, ansatz)
    return found.view(rows, count, n, columns).permute(1, 2, 0, 3)
