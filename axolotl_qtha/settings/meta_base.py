"""The base model on the meta device, as Axolotl would load it: sizes and dtypes, no weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
import yaml
from axolotl.loaders.utils import load_model_config
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import set_zero3_state
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

from .quantization import complete

FUSED, SDPA = "qtha_plan_fused", "qtha_plan_sdpa"  # stand-ins for attention kernels, which the meta device has none of


class UnknownBase(ValueError):
    """The base's configuration cannot be read, or no model be built from it."""


def read_yaml(path: Path) -> DictDefault:
    """Return a validated Axolotl configuration, without asking what this machine's GPUs can do, nor for the base.

    Raises:
        ValueError: if the file is not a configuration with `adapter: qtha`.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({error}). What works: an Axolotl configuration.") from error
    if not isinstance(raw, dict) or raw.get("adapter") != "qtha":
        found = raw.get("adapter") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"adapter: {found!r} in {path} is none of ours. What works: an Axolotl YAML with `adapter: qtha`.")
    return validated(raw)


def validated(raw: dict[str, Any]) -> DictDefault:
    """Return a configuration as Axolotl validates it, with the plugins it names."""
    cfg = DictDefault(raw)
    output_dir = cfg.pop("output_dir", None)  # plugins are told of none, since nothing is written: it may be read-only
    prepare_plugins(cfg)
    if output_dir is not None:
        cfg["output_dir"] = output_dir
    return validate_config(cfg)


def read_config(path: Path) -> DictDefault:
    """Return a validated Axolotl configuration, completed from the base's own.

    Raises:
        ValueError: if the file is not a configuration with `adapter: qtha`, or the base's configuration cannot be read.
    """
    return completed(read_yaml(path))


def completed(cfg: DictDefault) -> DictDefault:
    """Return a validated configuration completed from the base's own.

    Raises:
        UnknownBase: if the base's configuration cannot be read.
    """
    cfg.torch_dtype = _dtype(cfg)
    cfg.model_config_type = base_config(cfg).model_type
    complete(cfg)
    return cfg


def _dtype(cfg: DictDefault) -> torch.dtype:
    """Return the dtype Axolotl loads the base in; `bf16: auto` is taken as a GPU that has it."""
    if cfg.bf16 or cfg.bfloat16:
        return torch.bfloat16
    return torch.float16 if cfg.fp16 or cfg.float16 else torch.float32


def base_config(cfg: DictDefault) -> Any:
    """Return the base's transformers configuration.

    Raises:
        UnknownBase: if it cannot be read.
    """
    name = cfg.base_model_config or cfg.base_model
    try:
        return load_model_config(cfg)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnknownBase(
            f"base_model: {name!r}: its config.json cannot be read ({reason.strip().rstrip('.')}). What works: a folder with a "
            "config.json, or a name on the Hugging Face Hub, with a network and, where it is gated, `hf auth login`."
        ) from error


def _quantisation_settings(cfg: DictDefault, config: Any) -> dict[str, Any]:
    """Return how the base is quantised: the checkpoint's own settings, else those of the YAML, else nothing."""
    given = (cfg.overrides_of_model_kwargs or {}).get("quantization_config")
    settings = getattr(config, "quantization_config", None) or given or {}
    return dict(settings) if isinstance(settings, dict) else settings.to_dict()


def meta_base(cfg: DictDefault) -> PreTrainedModel:
    """Return the base without weights: linear layers to be quantised are `QuantisedLinear`, attention a stand-in.

    As on a loaded model, `config.quantization_config` says how it is quantised, if it is.

    Raises:
        UnknownBase: if the model cannot be built from its configuration alone.
    """
    config = base_config(cfg)
    settings = _quantisation_settings(cfg, config)
    attention = cfg.attn_implementation or "sdpa"
    attention = attention if attention == "eager" else SDPA if attention == "sdpa" else FUSED
    try:
        model = _build(cfg, config, attention)
        if settings:
            _quantise(model, settings)
            model.config.quantization_config = settings
        if cfg.quantize_moe_experts:
            _quantise_experts(model, settings)
    except Exception as error:
        raise UnknownBase(
            f"base_model: {cfg.base_model!r} cannot be built from its config.json ({error}). What works: a causal language model "
            "that transformers knows, or `trust_remote_code: true` for one with code of its own."
        ) from error
    model.config.use_cache = False
    return model


def _build(cfg: DictDefault, config: Any, attention: str) -> PreTrainedModel:
    name = cfg.type_of_model if cfg.type_of_model not in (None, "AutoModelForCausalLM") else None
    kind: Any = getattr(transformers, name) if name and not cfg.trust_remote_code else AutoModelForCausalLM
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it would ask for the weights
    if hasattr(kind, "from_config"):  # a class of transformers' that finds the model's own
        make, options = kind.from_config, {"trust_remote_code": bool(cfg.trust_remote_code)}
    else:
        make, options = kind._from_config, {}
    with torch.device("meta"), set_zero3_state():  # under ZeRO-3 transformers would partition it over the GPUs
        try:
            return cast(PreTrainedModel, make(config, dtype=cfg.torch_dtype, attn_implementation=attention, **options))
        except ValueError:  # a model with an attention of its own
            return cast(PreTrainedModel, make(config, dtype=cfg.torch_dtype, attn_implementation="eager", **options))


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is stored in few bits, and is dequantised whole each time it is used."""

    def __init__(self, layer: nn.Module, stored_bytes: int, dtype: torch.dtype) -> None:
        inputs, outputs = cast(int, layer.in_features), cast(int, layer.out_features)
        super().__init__(inputs, outputs, bias=getattr(layer, "bias", None) is not None, device="meta", dtype=dtype)
        self.stored_bytes = stored_bytes

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; the dequantised weight is not kept for backward."""
        result: Tensor = _Dequantised.apply(x, self.weight)
        return result if self.bias is None else result + self.bias


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, torch.empty_like(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ torch.empty_like(ctx.weight), None


def _quantise(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Replace what transformers would quantise; where the quantiser's package is missing, all linear layers but the head."""
    dtype = model.dtype
    before = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    try:
        quantizer = AutoHfQuantizer.from_config(AutoQuantizationConfig.from_dict(settings))
        quantizer.preprocess_model(model, device_map=None)
        changed = {name: m for name, m in model.named_modules() if name in before and type(m) is not nn.Linear}
    except ImportError:
        changed = {}
    if not changed:
        head = model.get_output_embeddings()
        changed = {name: m for name, m in model.named_modules() if name in before and m is not head}
    for name, module in changed.items():
        parent, _, leaf = name.rpartition(".")
        layer = QuantisedLinear(module, _stored_bytes(module.in_features, module.out_features, settings), dtype)
        setattr(model.get_submodule(parent), leaf, layer)


class _DequantisedExperts(nn.Module):
    """Gives a layer's experts, stored in few bits, in full precision: all of them, each time they are used."""

    @torch.no_grad()
    def forward(self, weight: Tensor) -> Tensor:
        return torch.empty_like(weight)


def _quantise_experts(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Have the fused experts stored in few bits, as Axolotl does while it loads them."""
    for name, weight in list(model.named_parameters()):
        if weight.ndim >= 3 and "expert" in name.lower():
            owner, _, leaf = name.rpartition(".")
            stored = _stored_bytes(weight.shape[-1], weight.numel() // weight.shape[-1], settings)
            register_parametrization(model.get_submodule(owner), leaf, _DequantisedExperts(), unsafe=True)
            cast(Any, weight).stored_bytes = stored


def _stored_bytes(inputs: int, outputs: int, settings: dict[str, Any]) -> int:
    """Return the bytes of a quantised (outputs, inputs) weight with its scales."""
    entries = inputs * outputs
    if settings.get("load_in_8bit"):
        return entries + 4 * outputs  # one float32 scale per row
    if settings.get("load_in_4bit"):
        blocks = math.ceil(entries / 64)
        if not settings.get("bnb_4bit_use_double_quant"):
            return entries // 2 + 4 * blocks + 64
        # absmax in 8 bits, with a float32 scale per 256 of them, the two code books and an offset
        return entries // 2 + blocks + 4 * math.ceil(blocks / 256) + 64 + 1024 + 4
    bits = int(settings.get("bits") or settings.get("nbits") or 8)
    group = int(settings.get("group_size") or settings.get("q_group_size") or 128)
    scales = math.ceil(entries / group) if group > 0 else outputs
    return entries * bits // 8 + scales * 2 + scales * bits // 8  # 16-bit scales, zero points in the weight's bits


class _Fused(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps for backward: its inputs, its output and one number per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _fused(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Fused.apply(q, k, v).transpose(1, 2).contiguous(), None


def _sdpa(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """With a mask, transformers repeats the keys and values of grouped-query attention before torch's kernel."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return _fused(module, q, k, v)


AttentionInterface.register(FUSED, _fused)
AttentionInterface.register(SDPA, _sdpa)
