"""Quantised bases: what Axolotl is told to load, and whether it did.

Axolotl builds a bitsandbytes configuration for `adapter: lora` and `qlora` only; with any other adapter `load_in_4bit` loads a
full-precision base without a word. So the configuration is handed over through Axolotl's own `model_kwargs`, and the model that
comes back is counted.
"""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..errors import alternatives
from ..tuner.quantised import is_quantised
from . import parallel

LOAD_KEYS = ("load_in_4bit", "load_in_8bit")
SETTINGS = "bnb_config_kwargs (or model_kwargs.quantization_config)"  # where a YAML may hold them
# Model types whose 4-bit weights Axolotl stores as float32, since bfloat16 puts their loss off (not under DeepSpeed or FSDP).
FLOAT32_STORAGE = ("jamba", "qwen2_moe", "nemotron_h")
# Modules that must not be quantised, as Axolotl has them: {model type: (with load_in_4bit, with load_in_8bit)}.
SKIPPED = {"falcon_h1": (["out_proj"], ["out_proj"]), "jamba": ([], ["mamba"])}


def connect(data: dict[str, Any]) -> None:
    """Put the bitsandbytes configuration of `load_in_4bit` or `load_in_8bit` into `model_kwargs`.

    Raises:
        ValueError: if the keys contradict each other, or bitsandbytes is missing or too old.
    """
    keys = [key for key in LOAD_KEYS if data.get(key)]
    if not keys:
        return
    if len(keys) > 1:
        raise ValueError("load_in_4bit, load_in_8bit: both are true. What works: one of them.")
    (key,) = keys
    if data.get("gptq"):
        raise ValueError(
            f"{key}: true does not go with `gptq: true`, which loads a checkpoint as it is. What works: one of them."
        )
    _check_bitsandbytes(key)
    place = "model_kwargs" if "model_kwargs" in data else "overrides_of_model_kwargs"
    model_kwargs = dict(data.get(place) or {})
    chosen = dict(data.get("bnb_config_kwargs") or {}) | dict(model_kwargs.get("quantization_config") or {})
    if (method := chosen.get("quant_method", "bitsandbytes")) != "bitsandbytes":
        raise ValueError(
            f"{key}: true asks for bitsandbytes, model_kwargs.quantization_config for {method!r}. What works: one of them."
        )
    if _quantised_before(data):  # transformers takes the checkpoint's own settings, and check_base looks at the outcome
        if chosen:
            raise ValueError(
                f"{SETTINGS}: {chosen} has no effect on base_model: {data['base_model']!r}, which is quantised already. "
                "What works: leave it out, or the base in full precision."
            )
        return
    settings: dict[str, Any] = {"quant_method": "bitsandbytes", key: True}
    if key == "load_in_4bit":
        settings |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    _check_settings(settings | chosen)
    model_kwargs["quantization_config"] = settings | chosen
    data[place] = model_kwargs


def complete(cfg: Any) -> None:
    """Add what is known only once the base's configuration has been read; keys the YAML sets stay as they are.

    Axolotl's loader holds the same dictionary, so the change reaches it.
    """
    if not (key := asked(cfg)):
        return
    settings = (cfg.overrides_of_model_kwargs or {}).get("quantization_config") or {}
    four_bit = key == "load_in_4bit"
    if four_bit:
        sharded = cfg.deepspeed or cfg.fsdp or cfg.fsdp_config
        usual = "float32" if cfg.model_config_type in FLOAT32_STORAGE and not sharded else "bfloat16"
        settings.setdefault("bnb_4bit_compute_dtype", str(cfg.torch_dtype).removeprefix("torch."))
        parallel.check_quant_storage(cfg, settings.setdefault("bnb_4bit_quant_storage", parallel.quant_storage(cfg, usual)))
    if skipped := SKIPPED.get(cfg.model_config_type, ([], []))[0 if four_bit else 1]:
        settings.setdefault("llm_int8_skip_modules", skipped)


def check_experts_asked(data: dict[str, Any]) -> None:
    """Refuse `quantize_moe_experts` without a quantised base, as Axolotl does for LoRA.

    Raises:
        ValueError: naming what works.
    """
    if not any(data.get(key) for key in LOAD_KEYS):
        raise ValueError(
            "quantize_moe_experts: true needs a quantised base. What works: `load_in_4bit: true` or `load_in_8bit: true`."
        )


def check_experts_device(cfg: Any) -> None:
    """Refuse `quantize_moe_experts` where Axolotl would leave the experts as they are: it quantises them on NVIDIA GPUs alone.

    Raises:
        ValueError: if there is no such GPU here.
    """
    if cfg.quantize_moe_experts and not (torch.cuda.is_available() and torch.version.cuda):
        raise ValueError(
            "quantize_moe_experts: true needs an NVIDIA GPU, and there is none here: the experts would stay in full precision. "
            "What works: a machine with one, or leave it out."
        )


def check_base(cfg: Any, model: PreTrainedModel) -> int:
    """Return the number of quantised layers of the base just loaded.

    Raises:
        ValueError: if `load_in_4bit` or `load_in_8bit` was asked for and no layer is of that kind, or the head cannot be; or
            `quantize_moe_experts`, and no expert is.
    """
    if cfg.quantize_moe_experts and not getattr(model, "_moe_experts_quantized", False):  # Axolotl's mark
        raise ValueError(
            "quantize_moe_experts: true, but no expert of the base that was loaded is quantised: Axolotl quantises fused ones, "
            "weights of three dimensions whose name contains `expert`. What works: a base with such experts, or leave it out."
        )
    key = asked(cfg)
    if key is None:
        return sum(is_quantised(module, model) for module in model.modules())
    import bitsandbytes

    kind = bitsandbytes.nn.Linear4bit if key == "load_in_4bit" else bitsandbytes.nn.Linear8bitLt
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not layers:
        raise ValueError(
            f"{key}: true, but no layer of the base that was loaded is a {kind.__name__}: it would train in full precision. "
            f"{_skipping(model)}What works: a base with linear layers that are not skipped, without a quantisation of its own of "
            f"another kind; or `{key}: false`."
        )
    for name, layer in layers.items():
        if layer.weight is model.get_input_embeddings().weight:
            raise ValueError(
                f"{name}: its weight is the embedding's and cannot be quantised. {_skipping(model)}These names take the place of "
                f"those that transformers skips by itself. What works: `llm_int8_skip_modules: {[*_skipped(model), name]}`."
            )
    return len(layers)


def check_targets(cfg: Any, layers: dict[str, nn.Module], model: nn.Module) -> list[str]:
    """Return the adapted layers that stayed in full precision because the configuration names them.

    Args:
        cfg: Axolotl's configuration.
        layers: the frozen layers that carry adapters, by name.
        model: the model they belong to.

    Raises:
        ValueError: if a layer stayed in full precision without being named, or all did.
    """
    key = asked(cfg)
    full = [name for name, layer in layers.items() if not is_quantised(layer, model)]
    if key is None or not full:
        return []
    unnamed = [name for name in full if should_convert_module(name, _skipped(model))]
    if unnamed:
        leaf = unnamed[0].rsplit(".", 1)[-1]
        raise ValueError(
            f"{key}: true, but {len(unnamed)} of {len(layers)} adapted layers stayed in full precision: {unnamed[:3]}. What "
            f"works: leave them out with `qtha: {{exclude_modules: [{leaf}]}}`, or say that it is meant with "
            f"`bnb_config_kwargs: {{llm_int8_skip_modules: [{leaf}]}}`."
        )
    if len(full) == len(layers):
        raise ValueError(
            f"{key}: true, but all {len(layers)} adapted layers stayed in full precision. {_skipping(model)}What works: fewer "
            f"names in llm_int8_skip_modules, other target_modules, or `{key}: false`."
        )
    return full


def asked(cfg: Any) -> str | None:
    """Return which of `LOAD_KEYS` a configuration sets, None for neither."""
    return next((key for key in LOAD_KEYS if cfg[key]), None)


def _skipped(model: nn.Module) -> list[str]:
    """Return the names that the loaded model's own quantisation leaves out, be they from the YAML or a quantised checkpoint."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    return list(getattr(settings, "llm_int8_skip_modules", None) or [])


def _skipping(model: nn.Module) -> str:
    skipped = _skipped(model)
    return f"llm_int8_skip_modules is {skipped}. " if skipped else ""


def _quantised_before(data: dict[str, Any]) -> bool:
    """Return whether the base is a quantised checkpoint."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(data["base_model"], revision=data.get("revision_of_model"))
    except (KeyError, OSError):  # Axolotl says what is wrong with it
        return False
    return bool(config.get("quantization_config"))


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse keys that transformers would ignore, and values that would fail while the base is loaded."""
    from transformers import BitsAndBytesConfig

    known = sorted(set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"})
    for name, value in settings.items():
        if name not in (*known, "quant_method"):
            works = alternatives(name, known)
            raise ValueError(f"{SETTINGS}: {{{name}: {value!r}}} would be ignored by transformers. What works: {works}.")
    if (kind := settings.get("bnb_4bit_quant_type", "nf4")) not in ("nf4", "fp4"):
        raise ValueError(f"{SETTINGS}: {{bnb_4bit_quant_type: {kind!r}}} is not known. What works: `nf4`, `fp4`.")
    try:
        BitsAndBytesConfig(**{name: value for name, value in settings.items() if name != "quant_method"})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{SETTINGS}: {settings} is refused by transformers: {error}. What works: the types named in its "
            "BitsAndBytesConfig, such as `bnb_4bit_compute_dtype: bfloat16`."
        ) from error


def _check_bitsandbytes(key: str) -> None:
    """Refuse a bitsandbytes that is missing or not of the version this package was built for."""
    wanted = next(
        requirement
        for requirement in map(Requirement, metadata.requires("axolotl-qtha") or [])
        if requirement.name == "bitsandbytes"
    )
    install = f"`pip install '{wanted.name}{wanted.specifier}'`"
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise ValueError(f"{key}: true needs bitsandbytes, which is not installed. What works: {install}.") from None
    if not wanted.specifier.contains(version, prereleases=True):
        raise ValueError(f"{key}: true needs bitsandbytes{wanted.specifier}, version {version} is here. What works: {install}.")
