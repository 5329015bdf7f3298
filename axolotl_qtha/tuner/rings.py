"""The classical networks in the circuits' place (`quantum: silu`, `sine`): wired as the circuits are, and of their size.

In a layer each unit sees z and its two neighbours in its ring, as a qubit has z and two CRZ. SiLU is a nonlinearity without a
period; the sine has one, as what circuits read out, and so is a Fourier series without quantum mechanics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _back_of_silu(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return grad * sigmoid * (1 + x * (1 - sigmoid))


def _back_of_sine(grad: Tensor, x: Tensor) -> Tensor:
    return grad * torch.cos(x)


# By the value of `quantum`: the nonlinearity, and the gradient of its argument by that of its value.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _back_of_silu),
    "sine": (torch.sin, _back_of_sine),
}
CLASSICAL = tuple(ACTIVATIONS)


def values(z: Tensor, units: Tensor, size: int, activation: str) -> Tensor:
    """Return q (.., r) of z (.., r).

    Args:
        z: enters every layer.
        units: (4 * layers, r), of each layer the weights of z and of both neighbours, and a bias.
        size: units of a ring.
        activation: the nonlinearity, of `ACTIVATIONS`.
    """
    return _layers(z, units, size, activation)[-1]


def gradients(grad: Tensor, z: Tensor, units: Tensor, size: int, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, and the gradients of sum(grad * q) for z and the units.

    Args:
        grad: (tokens, r).
        z: (tokens, r), and the rest as in `values`.
        units: (4 * layers, r).
        size: units of a ring.
        activation: the nonlinearity.
    """
    layers, of_z, of_units = _layers(z, units, size, activation), torch.zeros_like(z), torch.empty_like(units)
    _, back = ACTIVATIONS[activation]
    for index in range(len(layers) - 2, -1, -1):
        q, rows = layers[index], units[4 * index : 4 * index + 4]
        grad = back(grad, _inner(z, q, rows, size))
        around = z, _rolled(q, 1, size), _rolled(q, -1, size)
        of_units[4 * index : 4 * index + 4] = torch.stack([*((grad * x).sum(0) for x in around), grad.sum(0)])
        of_z += grad * rows[0]
        grad = _rolled(grad * rows[1], -1, size) + _rolled(grad * rows[2], 1, size)
    return layers[-1], of_z + grad, of_units


def _layers(z: Tensor, units: Tensor, size: int, activation: str) -> list[Tensor]:
    """Return z and the layers after it."""
    function, _ = ACTIVATIONS[activation]
    layers = [z]
    for rows in units.unflatten(0, (-1, 4)):
        layers.append(function(_inner(z, layers[-1], rows, size)))
    return layers


def _inner(z: Tensor, q: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return what a layer's nonlinearity is applied to."""
    into, after, before, bias = rows
    return into * z + after * _rolled(q, 1, size) + before * _rolled(q, -1, size) + bias


def _rolled(x: Tensor, by: int, size: int) -> Tensor:
    """Return the values of each unit's neighbour in its ring."""
    return x.unflatten(-1, (-1, size)).roll(by, -1).flatten(-2)
