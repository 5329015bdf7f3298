"""What is read out of many circuits at one time, each with angles of its own: the one place that knows it is `<Z>`.

The engine runs circuits with angles of their own side by side, so an ensemble is one wide row of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_engine
from .ansatz import Ansatz

COLUMNS = 2**18  # of the wide row, which bounds the memory


def inputs(ansatz: Ansatz) -> int:
    """Return how many numbers a circuit takes."""
    return ansatz.qubits


def outputs(ansatz: Ansatz) -> int:
    """Return how many numbers a circuit gives."""
    return ansatz.qubits


def angle_shape(ansatz: Ansatz) -> tuple[int, int]:
    """Return the shape of a circuit's table of trained angles."""
    return ansatz.rows, ansatz.qubits


def expectations(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return what is read out: <Z_i>, (draws, tokens, outputs).

    Args:
        z: encoded inputs in radians, (draws, tokens, n).
        angles: trained angles in radians, (draws, rows, n): one table for all tokens of a draw.
        ansatz: the circuit.
    """
    draws, tokens, n = z.shape
    wide = z.transpose(0, 1).reshape(tokens, draws * n)
    found = torch_engine.expectation_values(wide, angles.transpose(0, 1).reshape(angles.shape[1], draws * n), ansatz)
    return found.reshape(tokens, draws, n).transpose(0, 1)


def jacobians(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return the derivatives of what is read out for the trained angles, (N, outputs, rows, n).

    Args:
        z: encoded inputs in radians, (N, n).
        angles: trained angles in radians, (N, rows, n).
        ansatz: the circuit.
    """
    many = max(1, COLUMNS // (outputs(ansatz) * z.shape[1]))
    parts = [_jacobians(z[i : i + many], angles[i : i + many], ansatz) for i in range(0, len(z), many)]
    return torch.cat(parts)


def _jacobians(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return them from one wide row, in which each circuit stands once for each output."""
    (count, n), rows, each = z.shape, angles.shape[1], outputs(ansatz)
    wide = z[:, None].expand(count, each, n).reshape(1, -1)
    table = angles[:, None].expand(count, each, rows, n).permute(2, 0, 1, 3).reshape(rows, -1)
    one = torch.eye(each, n, dtype=z.dtype, device=z.device).expand(count, each, n).reshape(1, -1)
    _, found = torch_engine.gradients(one, wide, table, ansatz)
    return found.view(rows, count, each, n).permute(1, 2, 0, 3)
