"""LoRA with Axolotl's own fused kernels, which a user has instead: on a GPU Axolotl turns them on for `adapter: lora | qlora`.

All is done by Axolotl's functions; here they are put in place and taken away again, so that variants can take turns on one base.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

KEYS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
REPLACED = ("apply_qkv", "apply_o", "forward")  # what Axolotl sets on modules


def why_not(device: torch.device, bits: int) -> str:
    """Return why the kernels cannot run on a base of so many bits, empty if they can."""
    if device.type != "cuda":
        return "LoRA with Axolotl's fused kernels is left out: they need Triton on a CUDA device."
    if bits == 8:
        return "LoRA with Axolotl's fused kernels is left out: Axolotl does not turn them on for 8 bits."
    return ""


def one_layer(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the forward of one of PEFT's LoRA layers as Axolotl runs o_proj, for x (batch, tokens, d)."""
    from axolotl.kernels.lora import apply_lora_linear

    return partial(apply_lora_linear, layer)


class FusedKernels:
    """Axolotl's kernels for the projections of a decoder's attention and MLP; in place between `attach` and `detach`."""

    def __init__(self, model: PeftModel) -> None:
        from axolotl.monkeypatch import lora_kernels
        from axolotl.utils.dict import DictDefault

        self.model = model
        with TemporaryDirectory() as folder:  # Axolotl finds the class of the attention by the configuration of a base on disk
            cast(PreTrainedModel, model.get_base_model()).config.save_pretrained(folder)
            self.keys: Any = DictDefault({"base_model": folder, **dict.fromkeys(KEYS, True)})
            self.attention: Any = lora_kernels.get_attention_cls_from_config(self.keys)
            self.plain = self.attention.forward
            lora_kernels.patch_self_attn_lora(self.keys)
        self.fused = self.attention.forward
        self.detach()
        del self.attention._original_forward  # Axolotl's sign that the class is patched: it is not any more

    def attach(self) -> None:
        """Put the kernels in place; the base has its LoRA layers."""
        from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches

        self.attention.forward = self.fused
        apply_lora_kernel_patches(self.model, self.keys)

    def detach(self) -> None:
        """Take the kernels away."""
        self.attention.forward = self.plain
        for module in self.model.modules():
            for name in REPLACED:
                module.__dict__.pop(name, None)
