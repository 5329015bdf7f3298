"""Which layers of a model get an adapter, and which cannot carry one."""

from __future__ import annotations

import re
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import alternatives, refusal
from .arguments import refuse_unmatched
from .config import QTHAConfig
from .fitting import settle
from .layer import QTHALinear, layer_sizes
from .quantised import is_quantised
from .share import LayerSize, owned
from .uncalled import reader

HEADED = ("SEQ_CLS", "TOKEN_CLS")  # tasks whose head PEFT trains in full: it adds to `modules_to_save` every name it knows
HEADS = ("classifier", "score")


def select_targets(config: QTHAConfig, model: nn.Module) -> dict[str, LayerSize]:
    """Return the size of every layer an adapter will be placed on, and what it has of its own, by name.

    In the configuration `all-linear` is replaced by the names it stands for, `mpo: auto` and `share: {layers: auto}` by what the
    budget makes of them.

    Raises:
        ValueError: if a name matches nothing, or a layer cannot carry an adapter.
    """
    candidates = _candidates(model)
    _expand_all_linear(config, model)
    matched = [name for name in candidates if check_target_module_exists(config, name)]
    _check_matches(config, candidates, matched)
    refuse_unmatched({key: getattr(config, key) for key in ("rank_pattern", "alpha_pattern")}, matched)
    ranks = {name: rank for name in matched if (rank := config.of_layer(name).rank) != config.rank}
    found = {name: layer_sizes(_supported(name, candidates[name], model)) for name in matched}
    sizes = {name: LayerSize(*size, rank=ranks.get(name)) for name, size in found.items()}
    if config.mpo == "auto" and len({_device(candidates[name]) for name in matched}) > 1:
        config.mpo = "tt"  # tensors that layers share are on one device
    settle(config, sizes)
    return owned(config.share, sizes) if config.share else sizes


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules an adapter may be placed on: all but the insides of layers that have one already.

    What dequantises experts is a module too, with a parameter's name, below `parametrizations`.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        name: module
        for name, module in model.named_modules()
        if name and not name.startswith(inside or ("\0",)) and ".parametrizations" not in name
    }


def _expand_all_linear(config: QTHAConfig, model: nn.Module) -> None:
    """Replace `all-linear` by names, keeping to layers_to_transform (PEFT would ignore it for full names)."""
    if not (isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"):
        return
    _maybe_include_all_linear_layers(config, model)
    # PEFT names nn.Linear and its subclasses, but for the head; HQQ's, GPTQ's and AWQ's layers are none
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    others = {
        name
        for name, module in _candidates(model).items()
        if module is not head and not _is_linear(module) and is_quantised(module, model)
    }
    # trained in full; PEFT itself leaves out the head of SEQ_CLS alone
    full = (*(config.modules_to_save or ()), *(HEADS if config.task_type in HEADED else ()))
    named = {name for name in {*config.target_modules, *others} if not (full and name.endswith(full))}
    called = {name for name in named if reader(model, name) is None}
    if not called:
        raise refusal("target_modules", "all-linear", "finds no linear layer that can carry an adapter", "the layers by name")
    config.target_modules = cast(list[str], called)
    if config.layers_to_transform is not None:
        wanted = _indices(config)
        kept = {name for name in config.target_modules if _layer_index(name, config) in wanted}
        config.target_modules = cast(list[str], kept)  # PEFT keeps names as a set
        if not config.target_modules:
            raise refusal(
                "layers_to_transform", config.layers_to_transform, "matches no layer", _layers(config, _candidates(model))
            )


def _check_matches(config: QTHAConfig, candidates: dict[str, nn.Module], matched: list[str]) -> None:
    """Refuse names in target_modules, exclude_modules and layers_to_transform that match nothing."""
    leaves = {name.rsplit(".", 1)[-1] for name, module in candidates.items() if _is_linear(module)}
    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key)
        wanted = [value] if isinstance(value, str) else sorted(value or [])
        for name in wanted:
            pattern = name if isinstance(value, str) else rf"(.*\.)?{re.escape(name)}"
            if not any(re.fullmatch(pattern, candidate) for candidate in candidates):
                raise refusal(key, name, "matches no module of the model", alternatives(name.rsplit(".", 1)[-1], leaves))
    if config.layers_to_transform is not None:
        missing = _indices(config) - {_layer_index(name, config) for name in matched}
        if missing:
            raise refusal("layers_to_transform", sorted(missing), "matches no adapted layer", _layers(config, candidates))
    if not matched:
        raise refusal(
            "target_modules",
            sorted(config.target_modules or []),
            "leaves no module: exclude_modules and modules_to_save take them all",
            ", ".join(f"`{leaf}`" for leaf in sorted(leaves)),
        )


def _indices(config: QTHAConfig) -> set[int | None]:
    value = config.layers_to_transform
    return {value} if isinstance(value, int) else set(value or [])


def _layer_index(name: str, config: QTHAConfig) -> int | None:
    """Return the index of the transformer layer a module belongs to, found as PEFT does."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns or [r"[^.]*"]:
        if found := re.match(rf".*?\.{pattern}\.(\d+)\.", name):
            return int(found.group(1))
    return None


def _layers(config: QTHAConfig, candidates: dict[str, nn.Module]) -> str:
    present = sorted({index for name in candidates if (index := _layer_index(name, config)) is not None})
    return f"indices {present[0]} to {present[-1]}" if present else "no layers_to_transform: the model has no numbered layers"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, QTHALinear))


def _frozen(module: nn.Module) -> nn.Module:
    """Return the frozen layer under an adapted one, or the module itself."""
    return module.get_base_layer() if isinstance(module, QTHALinear) else module


def _supported(name: str, module: nn.Module, model: nn.Module) -> nn.Module:
    """Return the frozen layer itself, or refuse a kind of layer that cannot carry an adapter."""
    layer = _frozen(module)
    # torch's attention reads this layer's weight without calling it, so an adapter there would do nothing
    linear = isinstance(layer, (nn.Linear, Conv1D)) and not isinstance(layer, NonDynamicallyQuantizableLinear)
    if not linear and not is_quantised(layer, model):
        raise refusal(
            "target_modules",
            name,
            f"is a {type(layer).__name__}, which cannot carry an adapter",
            "linear layers (nn.Linear, GPT-2's Conv1D, quantised ones PEFT knows); train others in full with modules_to_save",
        )
    if kind := reader(model, name):
        leaf = name.rsplit(".", 1)[-1]
        raise refusal(
            "target_modules",
            name,
            f"is a layer whose weight {kind} reads without calling it, so an adapter there would do nothing",
            f"`all-linear`, which leaves such layers out; `exclude_modules: [{leaf}]`; or {_called(model)} by name",
        )
    return layer


def _called(model: nn.Module) -> str:
    """Return the last names of the linear layers that can carry an adapter."""
    modules = _candidates(model)
    leaves = {name.rsplit(".", 1)[-1] for name, module in modules.items() if _is_linear(module) and reader(model, name) is None}
    return ", ".join(f"`{leaf}`" for leaf in sorted(leaves))
