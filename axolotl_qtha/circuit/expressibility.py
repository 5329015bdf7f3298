"""How much of the space of states an ensemble of them fills, and how entangled they are.

Sources: expressibility and its 75 bins, Sim, Johnson, Aspuru-Guzik, arXiv 1905.10876; the entangling measure Q, Meyer and
Wallach, arXiv quant-ph/0108104, by the purities of single qubits as Brennen, arXiv quant-ph/0305094, writes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 75  # of Sim et al., over fidelities from 0 to 1
REPEATS = 200  # samples of Haar-random fidelities that say what the estimator gives for them


@dataclass(frozen=True)
class Expressibility:
    """KL(fidelities || Haar) in nats; the smaller, the closer the ensemble is to one of Haar-random states.

    A histogram of M fidelities estimates it with a bias upwards: M fidelities of Haar-random states, whose true value is 0, give
    `haar`, about (occupied bins - 1) / (2 M). What is within a few `haar_std` of `haar` cannot be told from Haar.
    """

    kl: float
    haar: float  # mean of the estimate for as many Haar-random fidelities
    haar_std: float
    pairs: int
    histogram: tuple[float, ...]  # share of the fidelities in each bin


def fidelities(first: Tensor, second: Tensor) -> Tensor:
    """Return |<first|second>|^2 of states (N, 2**n) each, as (N)."""
    return (first.conj() * second).sum(-1).abs().square()


def log_haar(qubits: int, bins: int = BINS) -> NDArray[np.float64]:
    """Return the logarithm of each bin's share of Haar-random fidelities, whose density is (N - 1) (1 - F)**(N - 2), N = 2**n.

    Between F = l and u lies (1 - l)**(N - 1) - (1 - u)**(N - 1). In logarithms, since the last bins hold next to nothing.
    """
    power, edges = 2.0**qubits - 1, np.linspace(0, 1, bins + 1)
    low, high = edges[:-1], edges[1:]
    result: NDArray[np.float64] = power * np.log1p(-low) + np.log1p(-(((1 - high) / (1 - low)) ** power))
    return result


def expressibility(fidelities: Tensor, qubits: int, seed: int = 0, bins: int = BINS) -> Expressibility:
    """Compare fidelities of pairs of states with those of Haar-random states.

    Args:
        fidelities: of independent pairs, (M).
        qubits: of the states.
        seed: of the Haar-random samples that the estimate is compared with.
        bins: equal ones, of the histogram.

    Raises:
        ValueError: if there are no fidelities, or some that are none.
    """
    values = fidelities.detach().double().cpu().numpy()
    if not len(values) or not np.isfinite(values).all() or values.min() < -1e-6 or values.max() > 1 + 1e-6:
        raise ValueError("fidelities: some are missing, or not in [0, 1]. What works: those of normalised states.")
    counts, _ = np.histogram(values.clip(0, 1), bins=bins, range=(0, 1))
    log_q = log_haar(qubits, bins)
    share = np.exp(log_q)
    drawn = np.random.default_rng(seed).multinomial(len(values), share / share.sum(), size=REPEATS)
    of_haar = [_kl(row / len(values), log_q) for row in drawn]
    shares = counts / len(values)
    mean, std = float(np.mean(of_haar)), float(np.std(of_haar, ddof=1))
    return Expressibility(_kl(shares, log_q), mean, std, len(values), tuple(shares.tolist()))


def _kl(shares: NDArray[np.float64], log_q: NDArray[np.float64]) -> float:
    filled = shares > 0
    return float((shares[filled] * (np.log(shares[filled]) - log_q[filled])).sum())


def meyer_wallach(states: Tensor) -> Tensor:
    """Return Q = 2 (1 - mean over qubits of Tr rho_k^2) of normalised states (N, 2**n): 0 for product states, 1 at most; (N)."""
    qubits = states.shape[-1].bit_length() - 1
    purities = []
    for k in range(qubits):
        parts = states.reshape(len(states), -1, 2, 2**k)
        rho = torch.einsum("naib,najb->nij", parts, parts.conj())
        purities.append(rho.abs().square().sum((1, 2)))
    return 2 * (1 - torch.stack(purities).mean(0))


def haar_meyer_wallach(qubits: int) -> float:
    """Return the mean of Q over Haar-random states, (N - 2) / (N + 1) with N = 2**n: Meyer and Wallach's own result.

    >>> haar_meyer_wallach(1), haar_meyer_wallach(4)
    (0.0, 0.8235294117647058)
    """
    return (2**qubits - 2) / (2**qubits + 1)
