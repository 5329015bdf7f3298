"""A warning that names the adapters which the first step of a training did not reach.

Some models read the weight of a layer and multiply by themselves, so that the layer, and an adapter on it, is never called. Those
known to are refused (`tuner/uncalled.py`); this finds the others, in code from the Hub, say, or in a kernel that takes over.

An adapter is reached if the backward pass of one of the step's micro-batches computes a gradient for it, be it zero. That is
seen by a hook on its W_C, which it shares with no other. PyTorch runs it outside the compiled or recomputed forward pass, and
before DeepSpeed or an optimiser takes the gradient away; FSDP2, which computes it for other tensors, leaves it at the adapter's.
The hooks go with the first step.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any

from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner.adapter import QTHAAdapter
from ..tuner.layer import PREFIX
from .diagnostics import active_adapters

LOG = get_logger(__name__)
# One of several experts, by its number: it may get no token for long. A shared expert, `shared_expert.up_proj`, has none.
EXPERT = re.compile(r"expert\w*[._]\d+\.", re.IGNORECASE)


class Reached(TrainerCallback):
    """Looks after the backward passes of a training's first step, before its optimiser step; DeepSpeed has stepped by then."""

    def __init__(self) -> None:
        self._adapters: dict[str, QTHAAdapter] | None = None
        self._reached: set[int] = set()
        self._hooks: list[RemovableHandle] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Hook the adapters that are trained, once."""
        if self._adapters is not None or model is None:
            return
        self._adapters = {name: adapter for name, adapter in active_adapters(model) if adapter.fusion.requires_grad}
        for adapter in self._adapters.values():
            self._hooks.append(adapter.fusion.register_hook(partial(self._note, id(adapter))))

    def _note(self, adapter: int, _: Tensor) -> None:
        self._reached.add(adapter)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Name what no backward pass came to, once."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        adapters = self._adapters or {}
        missed = [name for name, adapter in adapters.items() if not self._is_reached(adapter) and not EXPERT.search(name)]
        if missed:
            LOG.warning(warning(missed, len(adapters)))
        self._adapters, self._reached = {}, set()

    def _is_reached(self, adapter: QTHAAdapter) -> bool:
        return id(adapter) in self._reached or adapter.fusion.grad is not None


def warning(missed: list[str], of: int) -> str:
    """Return what to say of adapters that were not reached.

    Args:
        missed: their names, as `active_adapters` gives them.
        of: how many there are in all.

    >>> warning(["default.base_model.model.layers.0.dt_proj", "default.base_model.model.layers.1.dt_proj"], 6).split(":")[0]
    '2 of 6 adapters were not reached by the first step, on layers.*.dt_proj (2)'
    """
    layers = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name.split(PREFIX, 1)[-1]) for name in missed)
    named = ", ".join(f"{layer} ({count})" if count > 1 else layer for layer, count in layers.items())
    return (
        f"{len(missed)} of {of} adapters were not reached by the first step, on {named}: they learn nothing unless later data "
        "reach them. Either the model does not call these layers (it reads their weight, or this data need none of them), or "
        "what they give does not get to the loss. What works: `exclude_modules` in the `qtha:` block with these names."
    )
