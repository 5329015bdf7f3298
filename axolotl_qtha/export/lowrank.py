"""A plain LoRA of each adapted layer, and PEFT's files of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ..tuner.config import QTHAConfig
from ..tuner.layer import PREFIX
from ..tuner.saving import WEIGHTS
from .whole import Whole


@dataclass
class LowRank:
    """What is added to a layer's output: B A x + c; float32, the scaling alpha / r included in B and c."""

    a: Tensor  # (r, d)
    b: Tensor  # (o, r)
    bias: Tensor | None = None  # (o), c

    def __call__(self, x: Tensor) -> Tensor:
        """Return the change of the output, (.., o), in the dtype of x (.., d)."""
        bias = None if self.bias is None else self.bias.to(x)
        return F.linear(F.linear(x, self.a.to(x)), self.b.to(x), bias)

    def widened(self, rank: int) -> LowRank:
        """Return the same with rows and columns of zeros up to `rank`."""
        more = rank - len(self.a)
        return LowRank(F.pad(self.a, (0, 0, 0, more)), F.pad(self.b, (0, more)), self.bias)


def targets(layers: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Return the shortest names that choose `layers` among a model's `modules`: their endings, or else their whole names."""
    wanted = set(layers)
    endings = {name.rsplit(".", 1)[-1] for name in wanted}
    chosen = {name for name in modules if name.rsplit(".", 1)[-1] in endings}
    return sorted(endings if chosen == wanted else wanted)


def write(
    layers: dict[str, LowRank],
    config: QTHAConfig,
    whole: Whole,
    modules: Iterable[str],
    transposed: bool,
    folder: Path,
) -> LoraConfig:
    """Write a LoRA adapter that PEFT, vLLM and llama.cpp's converter read; all layers get the largest rank among them.

    Args:
        layers: by the name of the layer in the base model.
        config: of the QTHA adapter.
        whole: tensors that take the place of the base's.
        modules: names of all modules of the base model.
        transposed: whether the layers are GPT-2's Conv1D.
        folder: where to; it exists.
    """
    rank = max(len(layer.a) for layer in layers.values())
    alpha = config.alpha if rank == config.rank else rank
    alpha = int(alpha) if float(alpha).is_integer() else rank
    has_bias = any(layer.bias is not None for layer in layers.values())
    # a head with a low rank is inside of PEFT's layer
    inside = {f"{name}.weight": f"{name}.base_layer.weight" for name in layers}
    tensors = {f"{PREFIX}{inside.get(name, name)}": tensor for name, tensor in whole.tensors.items()}
    for name, layer in layers.items():
        layer = layer.widened(rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (layer.b * (rank / alpha)).contiguous()
        if has_bias:
            bias = torch.zeros(len(layer.b)) if layer.bias is None else layer.bias
            tensors[f"{PREFIX}{name}.lora_B.bias"] = bias * (rank / alpha)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        lora_bias=has_bias,
        target_modules=targets(layers, modules),
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=transposed,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    lora.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return lora
