"""The linear map that stands in for a circuit: ridge least squares on what real tokens send through it.

Tokens leave the adapter through r numbers, y = y0 + B h with h = W_C z + W_Q q(z) and z = A x, so any linear map x -> h makes a
LoRA of rank r, with the same B. Least squares in h is least squares in y, whatever B is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "wide", "distilled"]

RIDGE = 1e-8  # of the mean square of z: keeps the normal equations solvable where a direction of z is never used


@dataclass
class Moments:
    """Sums over tokens of the products of features f (N, k), a constant 1 last, and targets t (N, r); float64.

    Their size does not depend on the number of tokens.
    """

    ff: Tensor  # (k + 1, k + 1)
    ft: Tensor  # (k + 1, r)
    tt: Tensor  # (r, r)

    @classmethod
    def of(cls, features: Tensor, targets: Tensor) -> Moments:
        """Return the moments of these tokens."""
        exact = torch.float64 if features.device.type != "mps" else torch.float32
        f = torch.cat([features.to(exact), features.new_ones(len(features), 1, dtype=exact)], dim=1)
        t = targets.to(exact)
        return cls((f.T @ f).cpu().double(), (f.T @ t).cpu().double(), (t.T @ t).cpu().double())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.ff + other.ff, self.ft + other.ft, self.tt + other.tt)

    @property
    def tokens(self) -> int:
        """Return how many tokens were seen."""
        return round(float(self.ff[-1, -1]))

    def error(self, weights: Tensor) -> Tensor:
        """Return sum (t - f W)^T (t - f W), (r, r), of a map W (k + 1, r) or, without a constant, (k, r)."""
        ff, ft = self.ff[: len(weights), : len(weights)], self.ft[: len(weights)]
        return self.tt - ft.T @ weights - weights.T @ ft + weights.T @ ff @ weights


def solve(moments: Moments, constant: bool) -> Tensor:
    """Return the map W of least squares t ~ f W, (k + 1, r) with a constant or (k, r) without; float64.

    The constant is not shrunk by the ridge.
    """
    size = len(moments.ff) - (not constant)
    ff, ft = moments.ff[:size, :size].clone(), moments.ft[:size]
    k = len(moments.ff) - 1
    mean = float(ff.diagonal()[:k].mean())
    ff.diagonal()[:k] += RIDGE * (mean or 1.0)
    return torch.linalg.solve(ff, ft)


def solve_wide(moments: Moments, constant: bool) -> Tensor:
    """Return the map W of ridge regression, (k + 1, r) with a constant or (k, r) without, for many features.

    The ridge is the one with the least generalised cross-validation error (Golub, Heath and Wahba, Technometrics 21, 1979) of a
    grid: with few tokens for each feature, least squares alone would learn them by heart.
    """
    k, tokens = len(moments.ff) - 1, moments.tokens
    ff, ft, tt = moments.ff[:k, :k], moments.ft[:k], moments.tt
    mean_f, mean_t = moments.ff[k, :k] / tokens, moments.ft[k] / tokens
    if constant:
        ff, ft, tt = (
            s - tokens * torch.outer(*m) for s, m in ((ff, (mean_f, mean_f)), (ft, (mean_f, mean_t)), (tt, (mean_t, mean_t)))
        )
    values, vectors = torch.linalg.eigh(ff)
    values = values.clamp_min(0)
    projected = vectors.T @ ft  # (k, r)
    least, chosen = float("inf"), torch.zeros_like(projected)
    for ridge in (values.mean() * 10.0**exponent for exponent in range(-6, 5)):
        weights = projected / (values + ridge)[:, None]
        residual = float(tt.trace() - (2 * projected * weights - values[:, None] * weights.square()).sum())
        freedom = float((values / (values + ridge)).sum())
        if freedom < tokens and (score := residual / (1 - freedom / tokens) ** 2) < least:
            least, chosen = score, weights
    weights = vectors @ chosen
    return torch.cat([weights, (mean_t - mean_f @ weights)[None]]) if constant else weights
