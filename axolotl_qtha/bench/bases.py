"""Frozen layers and whole bases with random weights, made on the device: nothing is downloaded.

A base is made layer by layer, so that a 7B shape never exists in full precision.
"""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

SHAPES: dict[str, PreTrainedConfig] = {
    "small": LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}


def random_base(config: PreTrainedConfig, bits: int, device: torch.device) -> PreTrainedModel:
    """Return a decoder with random weights on the device, its linear layers but the head in `bits` bits (4, 8 or 16)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, random_linear(module, bits, device, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            parent, _, leaf = name.rpartition(".")
            value = torch.randn(parameter.shape, device=device, dtype=dtype) * config.initializer_range
            setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.ones_like(value) if "norm" in name else value, False))
    model.tie_weights()
    rotary = model.model.rotary_emb  # its tables are made from the configuration, which the meta device could not
    with device:
        model.model.rotary_emb = type(rotary)(config=config)
    model.config.use_cache = False
    # As transformers' loader says it; without this PEFT takes its LoRA layer for full precision, which copies inputs.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    return cast(PreTrainedModel, model)


def random_linear(layer: nn.Linear, bits: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen layer of another's sizes with random weights on the device, in `bits` bits (4, 8 or 16)."""
    bias = layer.bias is not None
    weight = torch.randn(layer.out_features, layer.in_features, dtype=dtype, device=device) * 0.02
    sizes = (layer.in_features, layer.out_features, bias)
    new: Any
    if bits == 4:
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", quant_storage=dtype, device="meta")
        quantised: Any = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", quant_storage=dtype, module=new)
        new.weight = quantised.to(device)
    elif bits == 8:
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        quantised = bnb.nn.Int8Params(weight.to("cpu", torch.float16), requires_grad=False)
        new.weight = quantised.to(device)
    else:
        new = nn.Linear(*sizes, device="meta")
        new.weight = nn.Parameter(weight, False)
    if bias:
        new.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=device), False)
    return cast(nn.Linear, new)


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, and of the scales of 4-bit weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
