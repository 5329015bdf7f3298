"""Quantised layers as the adapters see them: how PEFT reads one, and which keep their gradient."""

from __future__ import annotations

from typing import Any, cast

from peft.import_utils import is_torchao_available
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend, TorchaoBackend
from torch import nn


def backend(layer: nn.Module, **quantisation: Any) -> QuantizationBackend | None:
    """Return how PEFT reads a quantised layer (bitsandbytes, HQQ, torchao, GPTQ, AWQ, ...), or None for any other."""
    if is_torchao_available():
        from torchao.utils import TorchAOBaseTensor

        if isinstance(getattr(layer, "weight", None), TorchAOBaseTensor):  # PEFT names torchao's older kinds only
            return TorchaoBackend(quantisation.get("get_apply_tensor_subclass"))
    return resolve_quantization_backend(layer, **quantisation)


def is_quantised(layer: nn.Module, model: nn.Module) -> bool:
    """Return whether the layer is quantised, in a way PEFT can read."""
    return backend(layer, **get_quantization_kwargs(cast(Any, model))) is not None


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for CPU inference.

    Its first forward in eval mode on a CPU with AVX512-BF16 would replace the weights by a form with scales rounded to bfloat16,
    which has no gradient and which sizes that are no multiple of the block do not survive.

    Raises:
        ValueError: if that has happened already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"{name}: bitsandbytes has repacked this 4-bit weight for CPU inference, as it does at the first forward "
                    "in eval mode; it has no gradient. What works: add the adapter to a freshly loaded base, before that."
                )
            module.support_avx512bf16_for_cpu = cast(Any, False)
