"""How much memory a training step takes, from one forward and backward on the meta device: real shapes, no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from .base import QuantisedLinear

# Bytes of optimiser state per trainable parameter, by what Axolotl's `optimizer:` names contain; the first match counts.
STATE_BYTES = (
    ("ademamix_8bit", 3),
    ("8bit", 2),  # two moments of one byte, their scales are 1 % more
    ("4bit", 1),
    ("fp8", 2),
    ("ademamix", 12),
    ("lion", 4),
    ("sgd", 4),
    ("rmsprop", 4),
    ("adagrad", 4),
    ("muon", 4),
    ("adafactor", 1),  # row and column means only
    ("came", 5),
    ("lomo", 0),
)
ADAMW_BYTES = 8  # two float32 moments


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch, beyond weights, adapter, gradients and optimiser states."""

    kept: int  # alive between forward and backward
    peak: int  # the most alive at any time


class _Ledger(TorchDispatchMode):
    """Counts the bytes of tensors alive, by their storages."""

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._bytes = {tensor.untyped_storage()._cdata: 0 for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._bytes.pop(key, 0)


def activations(model: PeftModel, batch: int, length: int, checkpointing: bool, logits: bool = True) -> Activations:
    """Return what a forward and backward of a (batch, length) micro batch keeps and needs.

    Args:
        model: on the meta device, in train mode, with its adapters.
        batch: sequences per micro batch.
        length: tokens per sequence.
        checkpointing: whether each block is computed again in backward.
        logits: whether the loss is taken from all logits at once; False for fused losses (cut cross entropy, Liger).
    """
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    held = [*model.parameters(), *model.buffers(), ids, inputs["attention_mask"]]
    with _checkpointing(model, checkpointing), _Ledger(held) as ledger:
        if logits:
            loss = model(**inputs, labels=ids).loss
        else:
            backbone: Any = model.get_base_model().base_model
            loss = backbone(**inputs).last_hidden_state.sum()
        kept = ledger.now
        loss.backward()
        del loss
    for parameter in model.parameters():
        parameter.grad = None
    return Activations(kept, ledger.peak)


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    if wanted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            model.gradient_checkpointing_disable()


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the frozen weights and buffers as they are stored; tied ones count once."""
    quantised = {id(module.weight): module.stored_bytes for module in model.modules() if isinstance(module, QuantisedLinear)}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(quantised.get(key, tensor.numel() * tensor.element_size()) for key, tensor in tensors.items())


def optimiser_bytes(optimizer: str, model: nn.Module) -> int:
    """Return the bytes of the optimiser's states; bitsandbytes keeps parameters below 4096 entries in 32 bits."""
    each = next((size for name, size in STATE_BYTES if name in optimizer), ADAMW_BYTES)
    small = ADAMW_BYTES if "8bit" in optimizer else each
    counts = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return sum(count * (each if count >= 4096 else small) for count in counts)


def workspace_bytes(qubits: int, tokens: int, chunk: int) -> int:
    """Return the most bytes the exact engine's backward holds at one time, beyond its inputs and outputs.

    Four float32 states (the state, its adjoint and the next of both), and the two halves of one wall.
    """
    left = qubits // 2
    right = qubits - left
    states = 4 * 2 * 2**qubits
    walls = 2 * (4**left + 4**right)
    return 4 * min(tokens, chunk) * (states + walls)
