"""Quantised tiny models: how each kind is made, read in full precision, and compared bit by bit."""

from importlib.util import find_spec

import bitsandbytes.functional
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, TorchAoConfig

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "bfloat16",
}
BITSANDBYTES = {
    "nf4": NF4,
    "nf4 in uint8": {**NF4, "bnb_4bit_quant_storage": "uint8"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}
FOUR_BIT = ("nf4", "nf4 in uint8")
# torchao's older tensors, which PEFT knows, and its newer ones, which it does not
TORCHAO = {"torchao 1": ("Int8WeightOnlyConfig", 1), "torchao 2": ("Int8WeightOnlyConfig", 2)}
INPUTS_TOO = {
    "torchao 1, inputs too": ("Int8DynamicActivationInt8WeightConfig", 1),
    "torchao 2, inputs too": ("Int8DynamicActivationInt8WeightConfig", 2),
}
OPTIONAL = {"hqq": "hqq", "gptq": "gptqmodel"}  # kind -> package, which the project does not ask for
KINDS = [*BITSANDBYTES, *TORCHAO, *OPTIONAL]
READABLE = [kind for kind in KINDS if kind != "gptq"]  # whose weights PEFT can read back


def settings(kind):
    """Return what `quantization_config` of transformers is for a kind, or None."""
    if kind in BITSANDBYTES:
        return dict(BITSANDBYTES[kind])
    if name := (TORCHAO | INPUTS_TOO).get(kind):
        from torchao.quantization import quant_api

        return TorchAoConfig(getattr(quant_api, name[0])(version=name[1]))
    return None


def quantised(folder, kind, dtype=torch.float32):
    """Load a saved model and quantise its linear layers."""
    if package := OPTIONAL.get(kind):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                model.set_submodule(name, hqq(module) if kind == "hqq" else gptq(module))
        return model.eval()
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(kind), dtype=dtype)


def hqq(layer):
    """Return an HQQ layer; transformers 5.16 does not load them ("not available yet")."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    quantisation = BaseQuantizeConfig(nbits=4, group_size=24)  # a number of groups that packs into pairs
    return HQQLinear(layer, quantisation, compute_dtype=layer.weight.dtype, device="cpu")


def gptq(layer, group=16):
    """Return a GPTQ layer of the nearest 4-bit numbers, without calibration."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    groups = nn.functional.pad(layer.weight.detach(), (0, -layer.in_features % group)).unflatten(1, (-1, group))
    scales = groups.abs().amax(-1) / 7
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    result = TorchLinear(bits=4, group_size=group, sym=True, desc_act=False, **sizes)
    result.pack_original(layer, scales, torch.full_like(scales, 8), torch.arange(layer.in_features) // group)
    result.post_init()
    return result


def weight_of(layer):
    """Return a quantised layer's weight (out_features, in_features), read by its own library, or None for any other layer."""
    kind = type(layer).__name__
    if kind == "Linear4bit":
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if kind == "Linear8bitLt":
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # moved at the first forward
        return bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, scales)
    if kind == "HQQLinear":
        return layer.dequantize()
    if kind == "TorchLinear":
        return layer.dequantize_weight().T
    if isinstance(layer, nn.Linear) and is_traceable_wrapper_subclass(layer.weight):
        return layer.weight.dequantize()
    return None


def dequantised(model):
    """Replace every quantised layer by an `nn.Linear` of the same numbers."""
    for name, layer in list(model.named_modules()):
        if (weight := weight_of(layer)) is not None:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data = weight.detach().float().clone()
            if layer.bias is not None:
                plain.bias.data = layer.bias.detach().clone()
            model.set_submodule(name, plain.requires_grad_(False))
    return model


def frozen(model):
    """Return copies of the bytes stored for the base: weights, scales and the rest."""
    stored = {}
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and "qtha_adapter" not in name:
            stored |= _inner(name.removeprefix("base_model.model.").replace(".base_layer.", "."), value.detach())
    # bytes, since 4-bit numbers stored in pairs as bfloat16 can look like NaN, which does not equal itself
    return {name: value.clone().reshape(-1).view(torch.uint8) for name, value in stored.items()}


def _inner(name, value):
    if not is_traceable_wrapper_subclass(value):
        return {name: value}
    inner = {}
    for attribute in value.__tensor_flatten__()[0]:
        inner |= _inner(f"{name}.{attribute}", getattr(value, attribute))
    return inner
