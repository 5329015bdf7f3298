"""Trains a fitted LoRA further, until the model with it predicts what the model with the QTHA adapter does."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from ..trained.passes import Pass
from .fit import cpu, replaced
from .lowrank import LowRank

LEARNING_RATE = 2e-3  # of Adam, falling to zero
PASSES = 2  # over the text


def distilled(run: Pass, start: dict[str, LowRank]) -> dict[str, LowRank]:
    """Minimise KL(QTHA || export) of the next-token distributions over the text, starting from a fit; the ranks stay.

    Takes the memory and the time of training a LoRA on the text, and a forward pass of the QTHA model for each of its batches.
    """
    run.model.requires_grad_(False)

    def trainable(tensor: Tensor) -> Tensor:
        return nn.Parameter(tensor.to(run.device, copy=True))

    layers = {name: _mapped(layer, trainable) for name, layer in start.items()}
    parameters = [tensor for layer in layers.values() for tensor in (layer.a, layer.b, layer.bias) if tensor is not None]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    steps = PASSES * run.count
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    batches = (batch for _ in range(PASSES) for batch in run.batches())
    for batch in track(batches, "distilling", steps, transient=True):
        inputs, real = batch.inputs(run.device), batch.mask[:, 1:].to(run.device)
        with torch.no_grad():
            wanted = _log_probabilities(run.model, inputs, real)
        with torch.enable_grad(), replaced(run.adapters, layers):
            got = _log_probabilities(run.model, inputs, real)
            loss = F.kl_div(got, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: _mapped(layer, cpu) for name, layer in layers.items()}


def _log_probabilities(model: nn.Module, inputs: dict[str, Tensor], real: Tensor) -> Tensor:
    """Return the logarithms of the next-token distributions after the tokens that have a next one, (N, vocabulary)."""
    return F.log_softmax(model(**inputs, use_cache=False).logits[:, :-1][real].float(), dim=-1)


def _mapped(layer: LowRank, change: Callable[[Tensor], Tensor]) -> LowRank:
    return LowRank(change(layer.a), change(layer.b), None if layer.bias is None else change(layer.bias))
