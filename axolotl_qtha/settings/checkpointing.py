"""Gradient checkpointing beside `adapter: qtha`: which kinds work, and what is set where the YAML says nothing."""

from __future__ import annotations

from typing import Any

from .parallel import deepspeed_settings, zero_stage

NOT_REENTRANT = "`gradient_checkpointing: true` with `gradient_checkpointing_kwargs: {use_reentrant: false}`"


def refuse_reentrant(data: dict[str, Any]) -> None:
    """Refuse what Axolotl refuses for `adapter: qlora` alone: the limit is TRL's, so it holds here too."""
    checkpointing = data.get("gradient_checkpointing_kwargs") or {}
    gpus = (data.get("capabilities") or {}).get("n_gpu") or 1
    reentrant = data.get("gradient_checkpointing") and checkpointing.get("use_reentrant")
    if data.get("rl") and data.get("load_in_4bit") and reentrant and gpus > 1:
        raise ValueError(
            f"gradient_checkpointing_kwargs: {dict(checkpointing)!r} does not work with `rl:` and `load_in_4bit: true` on "
            f"{gpus} GPUs. What works: `gradient_checkpointing_kwargs: {{use_reentrant: false}}`."
        )


def connect(data: dict[str, Any], block: dict[str, Any]) -> None:
    """With `share:`, have blocks computed again without reentering autograd, which is not Axolotl's default.

    Reentrant checkpointing runs backward once for each block, so a tensor that several blocks share is ready more than once: DDP
    and ZeRO fail there, or reduce a part of its gradient.

    Args:
        data: Axolotl's configuration before validation; completed in place.
        block: the `qtha:` block.

    Raises:
        ValueError: naming the YAML key that asks for the other kind, and what works.
    """
    share = block.get("share")
    if not share:
        return
    why = f"does not work with `qtha: {{share: {share}}}`: it runs backward once for each block, and blocks may share tensors"
    for key, value in (
        ("gradient_checkpointing", data.get("gradient_checkpointing")),
        ("activation_offloading", data.get("activation_offloading")),
    ):
        if isinstance(value, str) or (key == "activation_offloading" and value):
            raise ValueError(f"{key}: {value!r} {why}. What works: {NOT_REENTRANT}, or no `share:`.")
    kwargs = dict(data.get("gradient_checkpointing_kwargs") or {})
    if kwargs.get("use_reentrant") and data.get("gradient_checkpointing"):
        raise ValueError(f"gradient_checkpointing_kwargs: {kwargs!r} {why}. What works: {NOT_REENTRANT}, or no `share:`.")
    if data.get("gradient_checkpointing") and zero_stage(deepspeed_settings(data.get("deepspeed"))) == 3:
        raise ValueError(
            f"deepspeed: {data['deepspeed']!r}, gradient_checkpointing: true and `qtha: {{share: {share}}}` do not go together: "
            "with `share:` blocks are computed again without reentering autograd, where ZeRO-3 has released their tensors "
            "(LoRA's, too). What works: ZeRO-2, DDP, `gradient_checkpointing: false`, or no `share:`."
        )
    if data.get("gradient_checkpointing"):
        data["gradient_checkpointing_kwargs"] = {**kwargs, "use_reentrant": False}
