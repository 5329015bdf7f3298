"""The circuit as a Fourier series in one of its inputs.

Source: Schuld, Sweke, Meyer, arXiv 2008.08605: what is read out is a trigonometric polynomial in an encoded angle, whose
frequencies the encoding gates set: RY(z) uploaded L times allows 0 to L, and the trained angles decide their coefficients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ansatz import Ansatz
from .readout import expectations

FIRST, MOST = 16, 1024  # points on a period
NEGLIGIBLE = 1e-9  # amplitude that float64 cannot tell from 0 (1e-15 an evaluation), and no measurement finds


def spectrum(z: Tensor, angles: Tensor, ansatz: Ansatz) -> tuple[Tensor, Tensor]:
    """Return the Fourier coefficients of what is read out as a function of each input, the others held.

    The points are doubled until the upper half of the frequencies is empty, and the series gives what is read out at z itself,
    which is on no grid: then the transform is exact up to rounding.

    Args:
        z: encoded inputs in radians, (draws, n), in float64; input j is moved through a whole period from 0.
        angles: trained angles in radians, (draws, rows, n).
        ansatz: the circuit.

    Returns:
        The frequencies w (F), in units of 1 / radian: whole numbers, or multiples of 1/2 where the period is 4 pi; and |c_w| of
        f(x) = sum_w c_w exp(i w x), (draws, inputs, outputs, F), for w >= 0 (f is real: c_-w has the same amplitude).

    Raises:
        ValueError: if what is read out has no period of 2 or 4 pi in an input, or too high frequencies.
    """
    values = expectations(z[:, None], angles, ansatz)
    turns = _turns(z, angles, ansatz, values)
    points = FIRST
    while points <= MOST:
        grid = torch.arange(points, dtype=torch.float64) * (2 * math.pi * turns / points)
        found = torch.stack([_along(z, angles, ansatz, j, grid) for j in range(ansatz.width)], dim=1)
        series = torch.fft.rfft(found, dim=-1) / points
        frequencies = torch.arange(points // 4, dtype=torch.float64) / turns
        low, high = series[..., : points // 4], series[..., points // 4 :]
        if float(high.abs().max()) < NEGLIGIBLE and _is_whole(low, frequencies, z, values):
            return frequencies, low.abs()
        points *= 2
    raise ValueError(f"{ansatz}: an input has frequencies above {MOST // 4}. What works: fewer uploads of it.")


def accessible(frequencies: Tensor, amplitudes: Tensor) -> list[float]:
    """Return the frequencies that any draw, input and output has, ascending."""
    there = amplitudes.flatten(0, -2).amax(0) > NEGLIGIBLE
    return [float(frequency) for frequency in frequencies[there]]


def _is_whole(series: Tensor, frequencies: Tensor, z: Tensor, values: Tensor) -> bool:
    """Return whether the series gives these values at z: a frequency far above the points would pose as a low one."""
    waves = torch.exp(1j * z[:, :, None] * frequencies)  # (draws, inputs, F)
    sums = 2 * (series * waves[:, :, None]).real.sum(-1) - series[..., 0].real
    return float((sums - values).abs().max()) < NEGLIGIBLE


def _turns(z: Tensor, angles: Tensor, ansatz: Ansatz, values: Tensor) -> int:
    """Return the period of what is read out in all inputs, in units of 2 pi: 1, or 2."""
    for turns in (1, 2):
        moved = (z + 2 * math.pi * turns * torch.eye(ansatz.width, dtype=z.dtype)[:, None]).transpose(0, 1)
        if float((expectations(moved, angles, ansatz) - values).abs().max()) < NEGLIGIBLE:
            return turns
    raise ValueError(
        f"{ansatz}: what is read out has no period of 2 or 4 pi in an input. What works: gates of angles in radians."
    )


def _along(z: Tensor, angles: Tensor, ansatz: Ansatz, j: int, grid: Tensor) -> Tensor:
    """Return what is read out where input j is moved along the grid, (draws, outputs, points)."""
    moved = z[:, None].repeat(1, len(grid), 1)
    moved[:, :, j] = grid
    return expectations(moved, angles, ansatz).transpose(1, 2)
