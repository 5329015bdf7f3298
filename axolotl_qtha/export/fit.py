"""Fits the linear surrogate of every adapter of a model while text streams through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..trained.passes import Pass, Tokens
from ..tuner.adapter import QTHAAdapter
from .lowrank import LowRank
from .surrogate import Moments, solve, solve_wide

ROW_TOLERANCE = 0.01  # root mean square of a . x - 1 up to which a row counts as carrying a constant


@contextmanager
def replaced(adapters: dict[str, QTHAAdapter], layers: dict[str, LowRank]) -> Iterator[None]:
    """Have plain LoRAs run in place of the adapters."""
    try:
        for name, adapter in adapters.items():
            adapter.forward = layers[name].__call__  # type: ignore[method-assign]
        yield
    finally:
        for adapter in adapters.values():
            adapter.__dict__.pop("forward", None)


@dataclass(frozen=True)
class Fitted:
    """An adapter's surrogate, h ~ M x + c."""

    b: Tensor  # (o, r), scaled by alpha / r
    rows: Tensor  # (r, d), M
    constant: Tensor | None = None  # (r), c

    def low_rank(self, row: Tensor | None = None) -> LowRank:
        """Return it as a LoRA: c goes into a bias, or into the place that a row with row . x = 1 takes in A."""
        if self.constant is None:
            return LowRank(self.rows, self.b)
        bias = self.b @ self.constant
        if row is None:
            return LowRank(self.rows, self.b, bias)
        return LowRank(torch.cat([self.rows, row[None]]), torch.cat([self.b, bias[:, None]], dim=1))


def exact(adapter: QTHAAdapter) -> LowRank:
    """Return the LoRA that equals a linear adapter (`quantum: none`)."""
    a, b = adapter.folds(fused=True)
    return LowRank(cpu(a), cpu(b))


def classical(adapter: QTHAAdapter) -> Tensor:
    """Return the map (r, r) of the part of h that is linear in z already: W_C, or nothing where h is a product."""
    w_c = cpu(adapter.effective("w_c"))
    return torch.zeros_like(w_c) if adapter.config.quantum == "qwthn" else w_c


def collect(run: Pass, title: str = "fitting") -> tuple[dict[str, Moments], dict[str, Tensor]]:
    """Return the moments of z and what the branch adds to h for each adapter, and the rows that carry a constant; one pass."""
    moments: dict[str, Moments] = {}
    maps = {name: classical(adapter) for name, adapter in run.adapters.items()}
    with _ConstantRows(run.model) as rows:

        def observer(name: str, tokens: Tokens) -> None:
            rows.see(name, tokens)
            rest = tokens.h - F.linear(tokens.z, maps[name].to(tokens.z))
            _add(moments, name, Moments.of(tokens.z, rest))

        run.observe(observer, title)
        return moments, rows.found()


def linear(adapter: QTHAAdapter, moments: Moments, constant: bool) -> Fitted:
    """Return h ~ (W_C + J) z [+ c], fitted by least squares."""
    weights, size = solve(moments, constant).float(), adapter.shape.rank
    rows = (classical(adapter) + weights[:size].T) @ cpu(adapter.fold_a())
    return Fitted(cpu(adapter.fold_b()), rows, weights[size] if constant else None)


def wide(run: Pass, start: dict[str, Fitted], memory: int) -> dict[str, Fitted]:
    """Fit what `start` leaves of h on all d inputs of a layer, not only on z; h has r numbers, so the rank stays r.

    Keeps d x d sums of a layer, so the text is run through again for each group of layers that fits into `memory` bytes.
    """
    fitted: dict[str, Fitted] = {}
    for group in _groups({name: 8 * adapter.shape.in_features**2 for name, adapter in run.adapters.items()}, memory):
        moments: dict[str, Moments] = {}
        run.observe(partial(_wide_moments, moments, start), "fitting", group)
        for name in group:
            begun = start[name]
            weights = solve_wide(moments.pop(name), constant=begun.constant is not None).float()
            rows = begun.rows + weights[: begun.rows.shape[1]].T
            fitted[name] = Fitted(begun.b, rows, None if begun.constant is None else begun.constant + weights[-1])
    return fitted


def _wide_moments(moments: dict[str, Moments], start: dict[str, Fitted], name: str, tokens: Tokens) -> None:
    begun, x = start[name], tokens.x.to(tokens.h.dtype)
    known = F.linear(x, begun.rows.to(x), None if begun.constant is None else begun.constant.to(x))
    _add(moments, name, Moments.of(x, tokens.h - known))


def _add(moments: dict[str, Moments], name: str, new: Moments) -> None:
    moments[name] = moments[name] + new if name in moments else new


class _ConstantRows:
    """Finds rows a with a . x = 1 for every token: layers fed by a LayerNorm with a bias have one.

    There x = w u + b with sum(u) = 0, so sum(x / w) = sum(b / w) whatever the token. RMSNorm leaves no such row.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs = WeakIdKeyDictionary()
        self.rows: dict[str, Tensor] = {}
        self.errors: dict[str, tuple[float, int]] = {}  # sum of squares of a . x - 1, and of how many tokens

    def __enter__(self) -> _ConstantRows:
        norms = [module for module in self.model.modules() if isinstance(module, nn.LayerNorm)]
        self.hooks = [norm.register_forward_hook(self._normed) for norm in norms]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _normed(self, norm: nn.LayerNorm, _: object, output: Tensor) -> None:
        if norm.bias is not None:
            self.outputs[output] = norm

    def see(self, name: str, tokens: Tokens) -> None:
        """Look at the tokens that enter an adapter."""
        if (norm := self.outputs.get(tokens.source)) is None:
            return
        weight, bias = norm.weight.double(), norm.bias.double()
        row = (1 / weight) / (bias / weight).sum()
        off = (tokens.x.double() @ row - 1).square()
        total, count = self.errors.get(name, (0.0, 0))
        self.rows[name], self.errors[name] = row, (total + float(off.sum()), count + len(off))

    def found(self) -> dict[str, Tensor]:
        """Return the rows (d) that were constant on all that was seen."""
        return {
            name: cpu(self.rows[name])
            for name, (total, count) in self.errors.items()
            if total <= count * ROW_TOLERANCE**2  # not so for NaN
        }


def _groups(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Split names into groups whose sizes add up to at most `most`; one name at least."""
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > most:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def cpu(tensor: Tensor) -> Tensor:
    """Return a copy in float32 on the CPU, without its history."""
    return tensor.detach().cpu().float()
