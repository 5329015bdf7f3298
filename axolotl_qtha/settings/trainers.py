"""Trainers of Axolotl's that do not train an adapter of ours, refused with what works; docs/host.md has a table of all."""

from __future__ import annotations

from typing import Any


def refuse(data: dict[str, Any], block: dict[str, Any]) -> None:
    """Refuse a YAML whose trainer would fail after the base was loaded.

    Args:
        data: the YAML, before validation.
        block: its `qtha:` block.

    Raises:
        ValueError: naming key, value and what works.
    """
    if data.get("rl") == "gdpo":
        raise ValueError(
            "rl: 'gdpo' does not work with an adapter: Axolotl 0.19 hands its trainer the adapter twice, and the trainer refuses "
            "that, with `adapter: lora` as well. What works: `rl: grpo`, which takes several `reward_funcs` too."
        )
    if data.get("rl") == "simpo" and data.get("simpo_gamma") is None:
        raise ValueError(
            "simpo_gamma: None lets the first step of `rl: simpo` fail, with `adapter: lora` as well. "
            "What works: `simpo_gamma: 0.5`."
        )
    given = data.get("trl")
    trl: dict[str, Any] = given if isinstance(given, dict) else {}
    if trl.get("vllm_lora_sync"):
        raise ValueError("trl.vllm_lora_sync: True hands vLLM a LoRA, which this adapter is not. What works: leave it out.")
    quantised = next((key for key in ("load_in_4bit", "load_in_8bit") if data.get(key)), None)
    quantum = block.get("quantum") or "qtha"
    if trl.get("use_vllm") and (quantum != "none" or quantised):
        why = (
            f"no merged weight equals `quantum: {quantum}`" if quantum != "none" else f"`{quantised}: true` cannot be merged into"
        )
        raise ValueError(
            f"trl.use_vllm: True hands vLLM the base with the adapter merged into it, and {why}. What works: "
            "`use_vllm: false`, which generates with the model as it is trained; or `qtha: {quantum: none}` on a base in full "
            "precision."
        )


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
