"""How much memory a training step takes, from one forward and backward on the meta device: real shapes, no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from ..circuit.torch_engine import chunk_tokens
from ..settings.meta_base import QuantisedLinear
from ..settings.training_run import TrainingRun
from ..tuner.config import QTHAConfig
from .sharding import Shards

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
class Memory:
    """Expected bytes on one GPU, by part: those of one rank, where ranks share the run."""

    weights: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int  # kept for backward, with checkpointing as configured
    activations_with_checkpointing: int
    activations_without_checkpointing: int
    circuit: int
    working: int  # what comes on top at the peak: logits, a block computed again, a dequantised or gathered weight, buckets
    total: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of a run, from which those of a rank follow."""

    shards: Shards
    weights: int  # of the whole base
    states: int  # of the whole optimiser
    kept: int  # activations of one micro batch, with checkpointing as configured
    kept_with_checkpointing: int
    kept_without_checkpointing: int
    circuit: int
    working: int  # at the peak of one micro batch

    def of_rank(self, ranks: int) -> Memory:
        """Return the memory of one of so many ranks."""
        parts = {
            "weights": self.shards.weights(self.weights, ranks),
            "adapter": self.shards.adapter(ranks),
            "gradients": self.shards.gradients(ranks),
            "optimiser": self.shards.optimiser(self.states, ranks),
            "activations": self.kept,
            "circuit": self.circuit,
            "working": self.working + self.shards.gathers.peak + self.shards.buckets,
        }
        return Memory(
            **parts,
            activations_with_checkpointing=self.kept_with_checkpointing,
            activations_without_checkpointing=self.kept_without_checkpointing,
            total=sum(parts.values()),
        )


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
    quantised |= {key: tensor.stored_bytes for key, tensor in tensors.items() if hasattr(tensor, "stored_bytes")}  # experts
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


def footprint(run: TrainingRun, model: PeftModel, weights: int, shards: Shards) -> Footprint:
    """Return the footprint of a run.

    Args:
        run: the training.
        model: its model on the meta device, in train mode, with adapters.
        weights: bytes of the base alone.
        shards: what ranks share of the model.

    Raises:
        Exception: of any kind, if the model's forward looks at values, which are not there.
    """
    config = cast(QTHAConfig, model.active_peft_config)
    batch, length = run.sequences, run.sequence_len
    logits = not run.fused_loss and config.task_type == "CAUSAL_LM"  # a head with a few labels is as good as none
    both = {wanted: activations(model, batch, length, wanted, logits) for wanted in (True, False)}
    mine = both[run.gradient_checkpointing]
    qubits = max(map(config.qubits_at, config.ranks))  # circuits side by side are simulated one after the other
    here = config.has_circuit and config.quantum_backend == "torch"  # Aer has memory of its own, for one chunk of circuits
    return Footprint(
        shards=shards,
        weights=weights,
        states=optimiser_bytes(run.optimizer, model),
        kept=mine.kept,
        kept_with_checkpointing=both[True].kept,
        kept_without_checkpointing=both[False].kept,
        circuit=workspace_bytes(qubits, batch * length, chunk_tokens(qubits)) if here else 0,
        working=mine.peak - mine.kept,
    )
