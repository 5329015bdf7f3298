"""What an export holds of a model besides low ranks: modules trained in full, and embeddings of another size."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..tuner.layer import QTHALayer


@dataclass(frozen=True)
class Whole:
    """Tensors that take the place of the base's, and how the model's embedding and head stand to each other."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # by their names in the base model
    vocabulary: int | None = None  # rows of the embeddings, where the base has another number of them
    embedding: str | None = None  # name of the module
    head: str | None = None  # name of the module that gives the logits
    tied: bool = False  # the model with the adapter: one tensor is both
    base_tied: bool = False  # the base: one tensor was both


def whole_of(model: PeftModel, rows: int | None, adapted: Collection[str], adapter: str = "default") -> Whole:
    """Return what a trained model holds besides its low ranks, on the CPU.

    Args:
        model: with its adapters.
        rows: of the base's own embedding, if known.
        adapted: names of the layers that have a low rank.
        adapter: the adapter's name.

    Raises:
        ValueError: if a head of another size than the base's is quantised.
    """
    base: Any = model.get_base_model()
    names = {id(module): name for name, module in base.named_modules()}
    tensors: dict[str, Tensor] = {}
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            tensors |= {f"{name}.{key}": tensor for key, tensor in _trained(module, adapter).state_dict().items()}
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if embedding is None:
        return Whole(_copies(tensors))
    now = _trained(embedding, adapter).weight
    vocabulary = None if rows in (None, len(now)) else len(now)
    embedding_name = names[id(embedding)]
    if head is None:
        return Whole(_copies(tensors), vocabulary, embedding_name)
    head_name, head_now = names[id(head)], _trained(head, adapter)
    tied = head_now.weight is now and head_name not in adapted
    if vocabulary is not None:
        if not head_now.weight.is_floating_point():
            raise ValueError(
                f"{head_name} is quantised and has another size than the base's. What works: the YAML without quantisation."
            )
        tensors[f"{embedding_name}.weight"] = now
        if not tied:
            tensors |= {f"{head_name}.{key}": part for key, part in head_now.named_parameters(recurse=False)}
    base_tied = _original(head).weight is _original(embedding).weight
    return Whole(_copies(tensors), vocabulary, embedding_name, head_name, tied, base_tied)


def _trained(module: nn.Module, adapter: str) -> Any:
    """Return the module that computes: the trained copy, or what a low rank stands beside."""
    if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
        return module.modules_to_save[adapter]
    return _original(module)


def _original(module: nn.Module) -> Any:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    return module.get_base_layer() if isinstance(module, QTHALayer) else module


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
