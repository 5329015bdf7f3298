"""Which of Axolotl's optimisers train an adapter whose tensors are flat."""

from __future__ import annotations

from typing import Any

WORKS = "`optimizer: adamw_torch`, or another of those in docs/host.md"
# Optimisers for matrices, and what they do with a tensor that is none.
MATRICES = {
    "muon": "skips every tensor with fewer than two dimensions",
    "dion": "skips every tensor with fewer than two dimensions",
    "sinkgd": "leaves every tensor with fewer than two dimensions to AdamW",
    "polora": "trains LoRA's two matrices only",
    "q_galore_adamw8bit": "projects the gradients of weight matrices",
    "galore_adamw": "projects the gradients of weight matrices",
    "galore_adamw_8bit": "projects the gradients of weight matrices",
    "galore_adafactor": "projects the gradients of weight matrices",
    "galore_adamw_layerwise": "projects the gradients of weight matrices",
    "galore_adamw_8bit_layerwise": "projects the gradients of weight matrices",
    "galore_adafactor_layerwise": "projects the gradients of weight matrices",
    "apollo_adamw": "scales the gradients of weight matrices",
    "apollo_adamw_layerwise": "scales the gradients of weight matrices",
}


def refuse(data: dict[str, Any]) -> None:
    """Refuse optimisers that would leave the adapter as it is, or treat it as another optimiser would.

    Args:
        data: Axolotl's configuration before validation.

    Raises:
        ValueError: naming the optimiser and what works.
    """
    optimizer = getattr(data.get("optimizer"), "value", data.get("optimizer"))
    if why := MATRICES.get(str(optimizer)):
        raise ValueError(
            f"optimizer: {optimizer!r} {why}, and an adapter's cores and angles are flat tensors (docs/method.md). "
            f"What works: {WORKS}."
        )
