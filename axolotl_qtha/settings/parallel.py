"""Many GPUs: which settings of DeepSpeed and FSDP work with `adapter: qtha`, and what is set where the YAML says nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPLIT_MODEL = (
    "tensor_parallel_size",
    "expert_parallel_size",
    "context_parallel_size",
    "sequence_parallel_degree",  # the older name of context_parallel_size
)
DATA_PARALLEL = "data parallelism: DDP, `deepspeed:` (ZeRO-1, 2, 3) or FSDP2"
STORAGE = "bnb_config_kwargs: {bnb_4bit_quant_storage"


def connect(data: dict[str, Any]) -> None:
    """Refuse ways to share a run among GPUs that would fail or lose the adapter, and have FSDP2 write whole adapters.

    Args:
        data: Axolotl's configuration before validation; completed in place.

    Raises:
        ValueError: naming the YAML key (or the DeepSpeed file's), its value, and what works.
    """
    for key in SPLIT_MODEL:
        if (value := data.get(key) or 1) != 1:
            raise ValueError(
                f"{key}: {value!r} is not supported by `adapter: qtha` yet. What works: `{key}: 1`, with {DATA_PARALLEL}."
            )
    _check_deepspeed(data)
    _connect_fsdp(data)


def deepspeed_settings(value: Any) -> dict[str, Any]:
    """Return the settings that `deepspeed:` names: a JSON file, or the settings themselves; empty without.

    Raises:
        ValueError: if there is no such file, or it holds no JSON object.
    """
    if not value or isinstance(value, dict):
        return dict(value or {})
    path = Path(str(value))
    works = "a JSON file such as example_configs/deepspeed/zero2.json"
    if not path.is_file():
        beside = ", ".join(sorted(file.name for file in path.parent.glob("*.json"))) if path.parent.is_dir() else ""
        found = f" (in {str(path.parent)!r}: {beside})" if beside else ""
        raise ValueError(f"deepspeed: {str(value)!r} is no file{found}. What works: {works}.")
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"deepspeed: {str(value)!r} is not JSON ({error}). What works: {works}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed: {str(value)!r} holds a {type(settings).__name__}. What works: {works}.")
    return settings


def zero_stage(settings: dict[str, Any]) -> int:
    """Return the ZeRO stage of DeepSpeed's settings; 0 where nothing is sharded.

    >>> zero_stage({"zero_optimization": {"stage": 3}}), zero_stage({})
    (3, 0)

    Raises:
        ValueError: if it is none of 0, 1, 2, 3.
    """
    stage = (settings.get("zero_optimization") or {}).get("stage") or 0
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed: zero_optimization.stage is {stage!r}. What works: 1, 2 or 3.")
    return int(stage)


def _check_deepspeed(data: dict[str, Any]) -> None:
    settings = deepspeed_settings(data.get("deepspeed"))
    if not settings:
        return
    name = data["deepspeed"] if isinstance(data["deepspeed"], str) else "the settings"
    if data.get("fsdp") or data.get("fsdp_config"):
        raise ValueError(f"deepspeed: {name!r} and fsdp_config: both are set. What works: one of them.")
    if all((settings.get(kind) or {}).get("enabled") is True for kind in ("fp16", "bf16")):
        raise ValueError(
            f"deepspeed: {name!r} has fp16.enabled: true and bf16.enabled: true. What works: one of them, or `auto` for both, "
            "which follows the YAML's `bf16:` and `fp16:`."
        )
    if (size := (settings.get("tensor_parallel") or {}).get("autotp_size") or 0) > 1:
        raise ValueError(
            f"deepspeed: {name!r} has tensor_parallel.autotp_size: {size}, which is not supported by `adapter: qtha` yet. What "
            f"works: leave it out; {DATA_PARALLEL}."
        )
    if zero_stage(settings) == 3 and data.get("load_in_8bit"):
        raise ValueError(
            f"load_in_8bit: true does not work with ZeRO-3 (deepspeed: {name!r}), which shards weights of floating point only. "
            "What works: `load_in_4bit: true`, or `load_in_8bit: true` with ZeRO-1 or 2."
        )


def _connect_fsdp(data: dict[str, Any]) -> None:
    if not (data.get("fsdp") or data.get("fsdp_config")):
        return
    settings = {str(key).removeprefix("fsdp_"): value for key, value in (data.get("fsdp_config") or {}).items()}
    version = data.get("fsdp_version") or settings.get("version") or 1
    if str(version) != "2":
        raise ValueError(
            f"fsdp_version: {version!r} is not supported by `adapter: qtha`: FSDP1 flattens frozen and trained parameters "
            "into one. What works: `fsdp_version: 2` with an `fsdp_config:` block."
        )
    if data.get("load_in_8bit"):
        raise ValueError(
            "load_in_8bit: true does not work with FSDP2, which leaves the scales of 8-bit weights behind. What works: "
            "`load_in_4bit: true`, or `load_in_8bit: true` with DDP, ZeRO-1 or 2."
        )
    for key in ("state_dict_type", "final_state_dict_type"):
        value = settings.get(key) or data.get(f"fsdp_{key}")
        if value not in (None, "FULL_STATE_DICT"):
            raise ValueError(
                f"fsdp_config: {{{key}: {value}}} would leave checkpoints without an adapter that can be loaded. What works: "
                "FULL_STATE_DICT, or leave it out; an adapter is small enough for one file."
            )
    block = data.get("qtha") if isinstance(data.get("qtha"), dict) else {}
    if settings.get("cpu_ram_efficient_loading") and (block or {}).get("quantum") == "frozen":
        raise ValueError(
            "fsdp_config: {cpu_ram_efficient_loading: true} makes the frozen angles of `quantum: frozen` trainable. What works: "
            "`cpu_ram_efficient_loading: false`."
        )
    data["fsdp_config"] = {**(data.get("fsdp_config") or {}), "state_dict_type": "FULL_STATE_DICT"}


def quant_storage(cfg: Any, usual: str) -> str:
    """Return the dtype 4-bit weights are stored in: the model's own where they are sharded, else the `usual` one.

    ZeRO-3 gathers the parameters of a module as one buffer of one dtype.
    """
    sharded = zero_stage(deepspeed_settings(cfg.deepspeed)) == 3 or cfg.fsdp_config
    return str(cfg.torch_dtype).removeprefix("torch.") if sharded else usual


def check_quant_storage(cfg: Any, storage: Any) -> None:
    """Refuse 4-bit weights stored in another dtype than the rest, under ZeRO-3."""
    wanted = str(cfg.torch_dtype).removeprefix("torch.")
    if zero_stage(deepspeed_settings(cfg.deepspeed)) == 3 and str(storage).removeprefix("torch.") != wanted:
        raise ValueError(
            f"{STORAGE}: {storage}}} does not work with ZeRO-3, which gathers the weights of a layer as one dtype, here "
            f"{wanted}. What works: `{STORAGE}: {wanted}}}`, or leave it out."
        )
