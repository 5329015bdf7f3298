"""The values an adapter starts with: those of an exact no-op."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import QTHAConfig
from .mpo import decompose
from .sizes import AdapterShape
from .table import Part


def values(
    config: QTHAConfig, shape: AdapterShape, parts: dict[str, Part], seed: int, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the initial values of all parts, as they act (float32, on the CPU).

    Args:
        config: the adapter's configuration.
        shape: its sizes on this layer.
        parts: its parts.
        seed: of the random numbers.
        weight: the frozen weight (out_features, in_features), for `init: tt_svd`.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    here: Any = {"device": "cpu", "dtype": torch.float32}  # whatever torch.set_default_dtype and torch.device say
    found: dict[str, Tensor] = {}

    def normal(*names: str) -> None:
        for name in names:
            number = torch.randn(parts[name].shape, generator=generator, **here)
            found[name] = number * parts[name].std + 0.0  # where that is zero, not -0

    if shape.mpo_a is None or shape.mpo_b is None:
        normal("a")
        found["b"] = torch.zeros(parts["b"].shape, **here)
    else:
        cores = [name for name in parts if name.startswith("mpo_")]
        normal("w_a", "w_b")
        directions: dict[str, Tensor] = {}
        if config.init == "tt_svd" and weight is not None:
            mid, r = shape.mpo_a.outputs.padded, shape.rank
            left, right = _leading_directions(weight, mid, generator)
            decomposed = [*decompose(right, shape.mpo_a), *decompose(left, shape.mpo_b)]
            directions = dict(zip(cores, decomposed, strict=True))
            found |= {"w_a": torch.eye(r, mid, **here), "w_b": torch.eye(mid, r, **here)}
        normal(*cores)
        for name, core in directions.items():
            found[name] = core * (parts[name].std / core.square().mean().sqrt().clamp_min(1e-30)) + 0.0
    r = shape.rank
    for name in ("w_c", "w_q") if shape.has_branch else ("w_c",):  # kaiming_uniform_, as the authors
        found[name] = (2 * torch.rand(r, r, generator=generator, **here) - 1) * math.sqrt(6 / r)
    if config.share:  # what a layer has for itself: it trains faster, and more evenly over seeds, where it stretches no direction
        nn.init.orthogonal_(found["w_c"], math.sqrt(2), generator=generator)
    if shape.has_branch and config.branch_init != "kaiming" and config.quantum != "qwthn":
        # drawn all the same, so that what comes after is too
        found["w_q"].zero_()
    if "units" in parts:
        normal("units")
    if "angles" in parts:
        found["angles"] = (2 * torch.rand(parts["angles"].shape, generator=generator, **here) - 1) * config.init_angles
    if "scale" in parts:
        found["scale"] = torch.ones(r, **here)
    return found


def _leading_directions(weight: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the leading singular directions of a (o, d) weight: left (o, count) and right (count, d), zero-padded."""
    matrix = weight.detach().to("cpu", torch.float32)
    rank = min(count, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        u, _, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    left, right = matrix.new_zeros(matrix.shape[0], count), matrix.new_zeros(count, matrix.shape[1])
    left[:, :rank], right[:rank] = u[:, :rank], v[:, :rank].T
    return left, right
