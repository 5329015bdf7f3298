"""Gradients over random initialisations (barren plateaus), and the effective dimension of the circuit as a model.

Sources: variance of gradients, McClean et al., arXiv 1803.11173; local and global cost, Cerezo et al., arXiv 2001.00550;
effective dimension and the normalised Fisher information, Abbas et al., arXiv 2011.00027; at one point, Abbas, Figalli,
Woerner, arXiv 2112.04807.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .ansatz import Ansatz
from .readout import jacobians
from .statevector import statevectors

AMPLITUDES = 2**17  # of states whose gradients are taken at one time: autograd keeps some dozens of copies


@dataclass(frozen=True)
class Spread:
    """A variance over initialisations, averaged over the trained angles, and its standard error over initialisations."""

    value: float
    error: float


@dataclass(frozen=True)
class GradientVariance:
    """Var over initialisations of the derivative of a cost for a trained angle, averaged over these angles.

    `readouts`: the sum over i of Var d<Z_i>, which is what a loss sees whose gradients at the <Z_i> are uncorrelated and of
    variance 1, as those of the adapter are. `local` and `global_`: Cerezo's two costs, 1 - mean_i <|0><0|_i> and
    1 - <|0...0><0...0|>.
    """

    readouts: Spread
    local: Spread
    global_: Spread


def gradient_variance(z: Tensor, angles: Tensor, ansatz: Ansatz) -> GradientVariance:
    """Return the variance of gradients over initialisations.

    Args:
        z: encoded inputs in radians, (N, n), one of each initialisation.
        angles: of the initialisations, in radians, (N, rows, n).
        ansatz: the circuit.
    """
    by_output = jacobians(z, angles, ansatz)
    local = -by_output.mean(1) / 2  # <|0><0|> = (1 + <Z>) / 2
    return GradientVariance(
        _spread(by_output.flatten(2)), _spread(local.flatten(1)), _spread(global_gradients(z, angles, ansatz))
    )


def global_gradients(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return the derivatives of 1 - <|0...0><0...0|> for the trained angles, (N, angles); arguments as `gradient_variance`."""
    many, found = max(1, AMPLITUDES >> ansatz.qubits), []
    for start in range(0, len(z), many):
        with torch.enable_grad():
            own = angles[start : start + many].detach().clone().requires_grad_()
            cost = 1 - statevectors(z[start : start + many], own, ansatz)[:, 0].abs().square()
            found.append(torch.autograd.grad(cost.sum(), own)[0].flatten(1))
    return torch.cat(found)


def _spread(gradients: Tensor) -> Spread:
    """Return the variance over the first axis of (N, ..., angles), averaged over the last, summed over those between them."""
    count = len(gradients)
    squares = (gradients - gradients.mean(0)).square().mean(-1) * count / (count - 1)
    each = squares.reshape(count, -1).sum(1)  # what each initialisation adds
    return Spread(float(each.mean()), float(each.std()) / math.sqrt(count))


def fisher(jacobian: Tensor) -> Tensor:
    """Return the Fisher information mean_t J_t^T J_t, (d, d), of a model with outputs <Z_i> and Gaussian noise of variance 1.

    The likelihood is p(y | x, theta) = N(y; <Z>(x, theta), 1): J_t are the derivatives of the outputs for the d angles.

    Args:
        jacobian: (tokens, outputs, rows, n), or (tokens, outputs, d).
    """
    flat = jacobian.flatten(2).flatten(0, 1)
    return flat.T @ flat / len(jacobian)


def effective_dimension(fishers: Tensor, data: int, gamma: float = 1.0) -> float:
    """Return Abbas et al.'s effective dimension: of how many of a model's d parameters that much data can tell.

    d_eff = 2 log mean_theta sqrt det(1 + k F) / log k, k = gamma data / (2 pi log data), F normalised to a mean trace of d. Of
    one matrix it is the local effective dimension in the limit of a small ball.

    Args:
        fishers: Fisher information at draws of the parameters from all of their space, (draws, d, d).
        data: number of data points, n of the paper.
        gamma: constant in (0, 1].

    Raises:
        ValueError: if there is so little data that k is not above 1, or no parameter has an effect.
    """
    k = gamma * data / (2 * math.pi * math.log(data)) if data > 1 else 0.0
    if k <= 1:
        raise ValueError(
            f"data: {data!r} with gamma {gamma!r} is too little for an effective dimension. What works: `data: 1000`."
        )
    size, trace = fishers.shape[-1], fishers.diagonal(dim1=1, dim2=2).sum(1).mean()
    if not trace > 0:
        raise ValueError("fishers: no parameter has an effect. What works: a circuit whose angles change what is read out.")
    normalised = fishers.double() * (size / trace.double())
    logs = torch.linalg.slogdet(torch.eye(size, dtype=torch.float64) + k * normalised)[1] / 2
    return float(2 * (torch.logsumexp(logs, 0) - math.log(len(logs))) / math.log(k))
