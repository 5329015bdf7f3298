"""QTHAModel: the PEFT tuner that places QTHA adapters on a model, and refuses where it cannot."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import get_quantization_kwargs, register_peft_method
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import alternatives, refusal
from .adapter import QTHAAdapter
from .backends import prepare
from .config import QTHAConfig
from .earlier import MARK, converted, is_earlier
from .layer import QTHALayer, QTHALinear, layer_sizes, refuse_nonlinear_merge, refuse_quantised_merge
from .peft_type import QTHA
from .quantised import is_quantised, keep_trainable
from .sizes import ansatz, resolve

CONTAINER = "qtha_adapter"


class QTHAModel(BaseTuner):
    """Adds QTHA adapters to a frozen model; made by `get_peft_model(model, QTHAConfig(...))`."""

    prefix = "qtha_"
    tuner_layer_cls = QTHALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_loaded_file)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if not cast(QTHAConfig, peft_config).target_modules:
            raise refusal("target_modules", None, "names no module", "`target_modules: all-linear`")
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check every target and settle bond_dim and mid_dim, before any layer is replaced."""
        config = cast(QTHAConfig, peft_config)
        keep_trainable(model)
        settled = resolve(config, list(select_targets(config, model).values()))
        config.bond_dim, config.mid_dim = settled.bond_dim, settled.mid_dim
        if config.has_circuit and next(model.parameters()).device.type != "meta":
            prepare(ansatz(config), config.simulation)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(QTHAConfig, peft_config)
        assert config.seed is not None
        seed = config.seed + zlib.crc32(current_key.encode())  # the same on every rank, another on every layer
        if isinstance(target, QTHALinear):
            target.update_layer(adapter_name, config, seed)
            return
        layer = QTHALinear(target, adapter_name, config, seed, **get_quantization_kwargs(self.model))
        layer.name = current_key
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge linear adapters into full-precision weights; refused as a whole where one is not linear or quantised."""
        self._refuse_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._refuse_merge(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _refuse_merge(self, adapter_names: list[str] | None) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.peft_config:
                refuse_nonlinear_merge(name, cast(QTHAConfig, self.peft_config[name]))
        for module in self.modules():
            if isinstance(module, QTHALayer):
                refuse_quantised_merge(module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse the one argument of PEFT's forward and generate that would otherwise be dropped."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']!r}: QTHA runs one set of adapters per batch. "
                "What works: set_adapter before each batch."
            )
        yield


def register() -> None:
    """Make PEFT know the method; a second call does nothing."""
    if QTHA not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="qtha", config_cls=QTHAConfig, model_cls=QTHAModel)


def synchronise(model: nn.Module) -> None:
    """Give every rank the adapters of rank 0. Each has made its own from the same seed, but not bit for bit the same on all CPUs.

    To be called on every rank, before the model is sharded.
    """
    adapters = [module for module in model.modules() if isinstance(module, QTHAAdapter)]
    tensors = [tensor for adapter in adapters for tensor in adapter.state_names().values()]
    # as objects: these go over any backend, from and to whatever device the adapters are on
    box = [[tensor.detach().cpu() for tensor in tensors] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    with torch.no_grad():
        for tensor, value in zip(tensors, box[0], strict=True):
            tensor.copy_(value)


def select_targets(config: QTHAConfig, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (in_features, out_features) of every layer an adapter will be placed on, by name.

    `all-linear` in the configuration is replaced by the names it stands for.

    Raises:
        ValueError: if a name matches nothing, or a layer cannot carry an adapter.
    """
    candidates = _candidates(model)
    _expand_all_linear(config, model)
    matched = [name for name in candidates if QTHAModel._check_target_module_exists(config, name)]
    _check_matches(config, candidates, matched)
    return {name: layer_sizes(_supported(name, candidates[name], model)) for name in matched}


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
    config.target_modules = cast(list[str], set(config.target_modules) | others)
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


def _supported(name: str, module: nn.Module, model: nn.Module) -> nn.Module:
    """Return the frozen layer itself, or refuse a kind of layer that cannot carry an adapter."""
    layer = module.get_base_layer() if isinstance(module, QTHALinear) else module
    # torch's attention reads this layer's weight without calling it, so an adapter there would do nothing
    linear = isinstance(layer, (nn.Linear, Conv1D)) and not isinstance(layer, NonDynamicallyQuantizableLinear)
    if not linear and not is_quantised(layer, model):
        raise refusal(
            "target_modules",
            name,
            f"is a {type(layer).__name__}, which cannot carry an adapter",
            "linear layers (nn.Linear, GPT-2's Conv1D, quantised ones PEFT knows); train others in full with modules_to_save",
        )
    return layer


def _check_loaded_file(model: QTHAModel, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse a state dict that holds an adapter only in part, or of other modules, or nothing this model has."""
    if is_earlier(state_dict):
        _convert_earlier(model, state_dict, prefix)
    own = {prefix + name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    if state_dict and own.keys().isdisjoint(state_dict):
        raise ValueError(
            f"these weights belong to another model or method: none of {sorted(state_dict)[:3]}... is in this one. "
            "What works: a folder written by `adapter: qtha` for the same base model."
        )
    for adapter in model.peft_config:
        marker = f".{CONTAINER}.{adapter}."
        given = {name for name in state_dict if marker in name}
        expected = {name for name in own if marker in name}
        if given and given != expected:
            raise ValueError(
                f"adapter {adapter!r} does not fit this model: {len(expected - given)} tensors are missing "
                f"{sorted(expected - given)[:3]}, {len(given - expected)} have no place {sorted(given - expected)[:3]}. "
                "What works: the complete adapter folder, on the base model and with the `qtha:` settings it was trained with."
            )
    for name, value in state_dict.items():
        if isinstance(target := own.get(name), DTensor) and not isinstance(value, DTensor):  # FSDP2: each rank takes its shard
            state_dict[name] = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def _convert_earlier(model: QTHAModel, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Put the flat tensors of today in the place of those that an earlier version saved."""
    for name, module in model.named_modules():
        path = f"{prefix}{name}."
        if isinstance(module, QTHAAdapter) and path + MARK[1:] in state_dict:
            given = [key for key in state_dict if key.startswith(path)]
            tensors = {key.removeprefix(path): state_dict.pop(key) for key in given}
            state_dict.update({path + key: value for key, value in converted(tensors, module.table, path[:-1]).items()})
