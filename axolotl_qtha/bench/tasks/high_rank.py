"""A change of high rank: texts of a teacher, the base with a fixed update of rank 64 on every linear layer.

All of the update's singular values are equal, so the best change of rank 8 leaves sqrt(1 - 8/64) = 94 % of its norm: what an
adapter of low rank can learn is limited by construction. The teacher's own loss is the floor of everybody's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .task import META, Row, Task, write_rows

SEED = 42
COUNTS = {"train": 3000, "validation": 200, "test": 200}
LENGTH = 64  # tokens of a text
RANK = 64
SIZE = 0.7  # Frobenius norm of an update, as a share of the weight's


def teacher(base: Path) -> Any:
    """Return the base with its update, in eval mode."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(SEED)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head:
                module.weight += update(module.weight, generator)
    return model


def update(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random change of a weight (o, d), of rank RANK at most, with equal singular values and SIZE times its norm."""
    left, right = (torch.linalg.qr(torch.randn(size, min(RANK, *weight.shape), generator=generator))[0] for size in weight.shape)
    change = left @ right.T
    return change * (SIZE * weight.norm() / change.norm())


@torch.no_grad()
def sample(model: Any, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return texts a model writes at temperature 1 after its first token, (count, length) token numbers."""
    ids = torch.full((count, 1), model.config.bos_token_id)
    cache = None
    while ids.shape[1] < length:
        output = model(input_ids=ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chosen = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, chosen], dim=1)
    return ids


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Return the mean loss of texts (count, length), in nats a token."""
    return float(model(input_ids=ids, labels=ids).loss)


def write(base: Path, folder: Path) -> None:
    """Have the teacher write the three sets. The same versions of PyTorch on the same kind of CPU write the same."""
    model, generator = teacher(base), torch.Generator().manual_seed(SEED)
    texts = {name: sample(model, count, LENGTH, generator) for name, count in COUNTS.items()}
    write_rows(folder, **{name: [_row(ids) for ids in each.tolist()] for name, each in texts.items()})
    floor = {name: loss(model, texts[name]) for name in ("validation", "test")}
    (folder / META).write_text(json.dumps({"floor": floor}) + "\n")


def _row(ids: list[int]) -> Row:
    """Return a text in tokens: its words would not always give the same tokens again."""
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}


HIGH_RANK = Task(
    "high_rank",
    "texts of a teacher whose update has rank 64",
    {"ds_type": "json", "type": None},
    {"sequence_len": LENGTH},
    write,
)
