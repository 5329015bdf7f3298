"""Layers that share tensors beside Axolotl's own keys: where they cannot, and what is set where the YAML says nothing."""

from __future__ import annotations

from typing import Any

from ..tuner.choices import form
from .parallel import deepspeed_settings, zero_stage

NOT_REENTRANT = "`gradient_checkpointing: true` with `gradient_checkpointing_kwargs: {use_reentrant: false}`"


def connect(data: dict[str, Any], block: dict[str, Any]) -> None:
    """Refuse `share:` where it cannot work, and take `mpo: auto` for tensor networks there, which share nothing.

    Where layers share, have blocks computed again without reentering autograd, which is not Axolotl's default.

    Args:
        data: Axolotl's configuration before validation; completed in place.
        block: the `qtha:` block.

    Raises:
        ValueError: naming the YAML key, its value, and what works.
    """
    share, left = block.get("share"), form(block) == "auto"
    if not share and not left:
        return
    if why := _against(data, share or {"layers": "auto", "inputs": True}):
        if not left:
            raise ValueError(why)
        data["qtha"] = {**block, "mpo": "tt"}
    elif data.get("gradient_checkpointing"):
        data["gradient_checkpointing_kwargs"] = {**(data.get("gradient_checkpointing_kwargs") or {}), "use_reentrant": False}


def _against(data: dict[str, Any], share: Any) -> str:
    """Return what does not go with layers that share tensors, and what works; "" where nothing is in their way.

    Reentrant checkpointing runs backward once for each block, so a tensor that several blocks share is ready more than once: DDP
    and ZeRO fail there, or reduce a part of its gradient.
    """
    layers = share.get("layers", 1) if isinstance(share, dict) else 1
    if layers != 1 and (data.get("fsdp_config") or data.get("fsdp")):
        return (
            f"qtha: {{share: {share}}} does not work with FSDP2, which shards block by block, where each tensor is of one block. "
            "What works: `share: {inputs: true}`, no `share:`, or DDP, ZeRO-1, 2 or 3."
        )
    why = f"does not work with `qtha: {{share: {share}}}`: it runs backward once for each block, and blocks may share tensors"
    checkpointing, offloading = data.get("gradient_checkpointing"), data.get("activation_offloading")
    if isinstance(checkpointing, str):
        return f"gradient_checkpointing: {checkpointing!r} {why}. What works: {NOT_REENTRANT}, or no `share:`."
    if offloading:
        return f"activation_offloading: {offloading!r} {why}. What works: {NOT_REENTRANT}, or no `share:`."
    kwargs = dict(data.get("gradient_checkpointing_kwargs") or {})
    if kwargs.get("use_reentrant") and checkpointing:
        return f"gradient_checkpointing_kwargs: {kwargs!r} {why}. What works: {NOT_REENTRANT}, or no `share:`."
    if checkpointing and zero_stage(deepspeed_settings(data.get("deepspeed"))) == 3:
        return (
            f"deepspeed: {data['deepspeed']!r}, gradient_checkpointing: true and `qtha: {{share: {share}}}` do not go together: "
            "with `share:` blocks are computed again without reentering autograd, where ZeRO-3 has released their tensors "
            "(LoRA's, too). What works: ZeRO-2, DDP, `gradient_checkpointing: false`, or no `share:`."
        )
    return ""
