"""What an export costs, measured on text it was not fitted to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.progress import track
from torch import Tensor, nn

from ..trained.calibration_text import IGNORED, Batch
from ..trained.passes import Pass, Tokens, input_device
from .fit import classical, replaced
from .lowrank import LowRank

WITH_CONSTANTS = "linear, with constants"  # the name of that export among those compared
KEPT = 2 * 2**30  # bytes of log-probabilities that are kept of a model, to compare the written one with


@dataclass
class ModuleError:
    """Errors of one layer's adapter output, relative to it: sqrt(sum |y - y'|^2 / sum |y|^2)."""

    name: str
    export: float  # of the export
    linear_part: float  # of W_C alone, the circuit left out
    with_constant: float | None = None  # of the linear fit with its constant, where the export has left that out


@dataclass
class ModelError:
    """How a model predicts the held-out text, beside the one with the QTHA adapter."""

    perplexity: float
    kl: float = 0.0  # KL(QTHA || this), nats per token
    top1: float = 1.0  # share of tokens for which both have the same first choice


@dataclass
class Tally:
    """Sums over tokens to predict, which a model's `ModelError` is made of."""

    nll: float = 0.0
    kl: float = 0.0
    same: int = 0
    count: int = 0

    def add(self, logs: Tensor, reference: Tensor, targets: Tensor) -> None:
        """Count tokens (N): their log-probabilities (N, vocabulary), those to compare with, and what followed."""
        self.nll -= float(logs.gather(1, targets.to(logs.device)[:, None]).double().sum())
        self.kl += float(F.kl_div(logs, reference, reduction="sum", log_target=True).double())
        self.same += int((logs.argmax(1) == reference.argmax(1)).sum())
        self.count += len(targets)

    def error(self) -> ModelError:
        """Return the means."""
        kl = self.kl / self.count
        # rounding can make it negative; NaN stays, of which max() would make a 0
        return ModelError(_exp(self.nll / self.count), 0.0 if kl < 0 else kl, self.same / self.count)


@dataclass
class Kept:
    """The held-out text and its log-probabilities, (N, vocabulary) of each batch, float32, on the CPU."""

    batches: list[Batch] = field(default_factory=list)
    qtha: list[Tensor] = field(default_factory=list)
    export: list[Tensor] = field(default_factory=list)


@dataclass
class Measured:
    """Everything that was measured on the held-out text."""

    tokens: int
    predicted: int  # tokens that count for the model's figures
    models: dict[str, ModelError]  # base, qtha, export, and others
    modules: list[ModuleError] = field(default_factory=list)

    @property
    def gain_kept(self) -> float | None:
        """Return the share of the perplexity gained over the base that the export keeps; None if nothing was gained."""
        base, qtha, export = (self.models[name].perplexity for name in ("base", "qtha", "export"))
        return (base - export) / (base - qtha) if base > qtha else None


def measure(run: Pass, layers: dict[str, LowRank], others: dict[str, dict[str, LowRank]], kept: Kept | None = None) -> Measured:
    """Measure the export on the text of `run`, and `others` (by what they are) for comparison; fill in `kept`."""
    modules = _modules(run, layers, others.get(WITH_CONSTANTS, {}))
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    tokens = 0
    for batch in track(run.batches(), "measuring", run.count, transient=True):
        tokens += int(batch.mask.sum())
        reference: Tensor | None = None
        if kept is not None:
            kept.batches.append(batch)
        for name, how in _models(run, {"export": layers, **others}):
            with how:
                logs = log_probabilities(run.model, batch)
            reference = logs if reference is None else reference
            if kept is not None and name in ("qtha", "export"):
                getattr(kept, name).append(logs.cpu())
            tallies[name].add(logs, reference, batch.targets())
    models = {name: tallies[name].error() for name in ("base", *(name for name in tallies if name != "base"))}
    return Measured(tokens, tallies["qtha"].count, models, modules)


def _models(run: Pass, exports: dict[str, dict[str, LowRank]]) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    yield "qtha", nullcontext()
    yield "base", cast(PeftModel, run.model).disable_adapter()
    for name, layers in exports.items():
        yield name, replaced(run.adapters, layers)


@torch.no_grad()
def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logarithms of the next-token distributions at the tokens to predict, (N, vocabulary), float32."""
    device = input_device(model)
    wanted = (batch.labels[:, 1:] != IGNORED).to(device)
    logits = model(**batch.inputs(device), use_cache=False).logits
    logits = logits[:, :-1][wanted.to(logits.device)]
    return F.log_softmax(logits.float(), dim=-1)


def _modules(run: Pass, layers: dict[str, LowRank], with_constants: dict[str, LowRank]) -> list[ModuleError]:
    maps = {name: classical(adapter) for name, adapter in run.adapters.items()}
    folded = {name: adapter.fold_b() for name, adapter in run.adapters.items()}
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in run.adapters}

    def observer(name: str, tokens: Tokens) -> None:
        linear_part = F.linear(F.linear(tokens.z, maps[name].to(tokens.z)), folded[name].to(tokens.z))
        whole = with_constants[name](tokens.x) if name in with_constants else tokens.change
        for i, other in enumerate((torch.zeros_like(tokens.change), layers[name](tokens.x), linear_part, whole)):
            sums[name][i] += float((tokens.change - other).double().square().sum())

    run.observe(observer, "measuring")
    result = []
    for name, (total, *off) in sums.items():
        # an adapter that adds nothing is met exactly by an export that adds nothing
        export, without, constant = (math.sqrt(float(part / max(float(total), 1e-300))) if part else 0.0 for part in off)
        result.append(ModuleError(name, export, without, constant if name in with_constants else None))
    return result


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
