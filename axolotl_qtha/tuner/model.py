"""QTHAModel: the PEFT tuner that places QTHA adapters on a model, and refuses where it cannot."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    register_peft_method,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import refusal
from .adapter import QTHAAdapter
from .adapter_file import check_whole_modules
from .backends import prepare
from .config import QTHAConfig
from .earlier import MARK, converted, is_earlier
from .layer import QTHALayer, QTHALinear, refuse_nonlinear_merge, refuse_quantised_merge, refuse_tied_merge
from .mixed import mixed
from .peft_type import QTHA
from .quantised import keep_trainable
from .reading import Reading, Shared
from .share import Owned, Owners, owners
from .sizes import ansatz, resolve
from .targets import select_targets

CONTAINER = "qtha_adapter"
RESIZED = (".modules_to_save.weight", ".original_module.weight")


class QTHAModel(BaseTuner):
    """Adds QTHA adapters to a frozen model; made by `get_peft_model(model, QTHAConfig(...))`."""

    prefix = "qtha_"
    tuner_layer_cls = QTHALayer
    _owners: dict[str, Owners]  # of the adapter that is being added
    _layer_configs: dict[tuple[int, float], QTHAConfig]  # of it, where patterns give layers a rank or alpha of their own
    _followed: set[str]  # layers of it that are the first of several to read their input
    target_module_mapping = cast(dict[str, list[str]], TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_loaded_file)
        self.register_load_state_dict_post_hook(_share_again)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast(QTHAConfig, peft_config)
        if config.target_modules is None:  # PEFT's own default for LoRA
            kind = model_config.get("model_type")
            if (modules := self.target_module_mapping.get(str(kind))) is None:
                why = f"is left to PEFT, which knows no default for LoRA on `model_type: {kind}`"
                raise refusal("target_modules", None, why, "`target_modules: all-linear`, or a list of the names of layers")
            config.target_modules = modules if isinstance(modules, str) else cast(list[str], set(modules))
        if not config.target_modules:
            raise refusal("target_modules", config.target_modules, "names no module", "`target_modules: all-linear`")
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check every target and settle bond_dim and mid_dim, before any layer is replaced."""
        config = cast(QTHAConfig, peft_config)
        if (stored := config.__dict__.pop("stored", None)) is not None:
            check_whole_modules(stored, model, config.modules_to_save or ())
        keep_trainable(model)
        targets = select_targets(config, model)
        self._owners = {} if not config.share else owners(config.share, targets)
        self._followed = {own.together for name, own in self._owners.items() if own.together != name}
        settled = resolve(config, list(targets.values()))
        config.bond_dim, config.mid_dim = settled.bond_dim, settled.mid_dim
        self._layer_configs = {}
        if config.has_circuit and next(model.parameters()).device.type != "meta":
            for circuit in {ansatz(config.of_layer(name)) for name in targets}:
                prepare(circuit, config.simulation)

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
        config = self._of_layer(cast(QTHAConfig, peft_config), current_key)
        assert config.seed is not None
        seed = config.seed + zlib.crc32(current_key.encode())  # the same on every rank, another on every layer
        owned, shared = self._sharing(current_key, adapter_name, config)
        if isinstance(target, QTHALinear):
            target.update_layer(adapter_name, config, seed, owned, shared)
            return
        quantisation = get_quantization_kwargs(self.model)
        layer = QTHALinear(target, adapter_name, config, seed, owned, shared, name=current_key, **quantisation)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _of_layer(self, config: QTHAConfig, name: str) -> QTHAConfig:
        """Return the configuration of a layer; layers of the same rank and alpha have the same object."""
        own = config.of_layer(name)
        return own if own is config else self._layer_configs.setdefault((own.rank, own.alpha), own)

    def _sharing(self, name: str, adapter_name: str, config: QTHAConfig) -> tuple[Owned, Shared | None]:
        """Return what the layer of this name has of its own, and what it has from layers before it."""
        if not config.share:
            return Owned(), None
        own = self._owners[name]
        sources = {"angles": own.branch, "units": own.branch, "scale": own.branch, "cores": own.a}
        sources |= {"cores_a": own.a, "cores_b": own.b, "fusion_q": own.branch}

        def at(name: str) -> QTHAAdapter:
            return cast(QTHAAdapter, self.model.get_submodule(name).qtha_adapter[adapter_name])

        others = {tensor: at(source) for tensor, source in sources.items() if source != name}
        shared = Shared({tensor: owner for tensor, owner in others.items() if tensor in owner.sizes})
        if own.together != name:
            shared.reading = at(own.together).shared.reading
        elif name in self._followed:
            shared.reading = Reading()
        return own.owned(name), shared

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast; where PyTorch makes new parameters (to and from the meta device), have layers share them again."""
        result = super()._apply(fn, recurse)
        _share_again(self)
        return result

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge linear adapters into full-precision weights; refused as a whole where one is not linear or quantised."""
        self._refuse_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._refuse_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Refuse PEFT's weighted sum of adapters, which is none of the same kind and size.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "add_weighted_adapter: a weighted sum of QTHA adapters is no QTHA adapter: a circuit is not linear, and the bonds of "
            "tensor networks add up. What works: all of them active, `model.base_model.set_adapter([...])`, which adds their "
            "outputs; or with `quantum: none` each as a LoRA (`peft.convert_to_lora`), and LoRA's add_weighted_adapter."
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether the adapter can be converted to LoRA: it is linear (`quantum: none`)."""
        layers = (module for module in self.modules() if isinstance(module, QTHALayer))
        return all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    def _refuse_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Refuse a merge of all layers, so that none is merged where one cannot be."""
        refuse_tied_merge(self.model)
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.peft_config:
                refuse_nonlinear_merge(name, cast(QTHAConfig, self.peft_config[name]))
        for module in self.modules():
            if isinstance(module, QTHALayer):
                refuse_quantised_merge(module)
        for module in self.modules() if safe_merge else ():
            if isinstance(module, QTHALinear):
                with onload_layer(module):
                    module.merged_weight(adapter_names or self.active_adapters, safe_merge)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Run a forward or generate, with `adapter_names` each sequence with its own adapter."""
        if (names := kwargs.get("adapter_names")) is None:
            yield  # and no context: torch.compile would stop for it
            return
        with mixed(self.model, names, list(self.peft_config), kwargs):
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


def agree_on_circuits(model: nn.Module) -> None:
    """Refuse circuits of the user's own that are not the same on all ranks, each of which has called the function itself.

    To be called on every rank.

    Raises:
        ValueError: naming `circuit`, on ranks whose circuits are not rank 0's.
    """
    configs = [module.config for module in model.modules() if isinstance(module, QTHAAdapter) and module.config.circuit]
    mine = [ansatz(config) for config in configs]
    box = [mine if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    if box[0] != mine:
        why = f"gives another circuit on rank {dist.get_rank()} than on rank 0"
        raise refusal(
            "circuit", configs[0].circuit, why, "a function of its arguments alone: random numbers from a seed of its own"
        )


def _check_loaded_file(model: QTHAModel, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse a state dict that holds an adapter only in part, or of other modules, or nothing this model has."""
    if is_earlier(state_dict):
        _convert_earlier(model, state_dict, prefix)
    members = list(_members(model, prefix))
    for member, owner in members:  # one copy is enough, that of the owner
        given_twice = state_dict.pop(member, None)
        if given_twice is not None and not _equal(given_twice, state_dict.get(owner)):
            raise ValueError(
                f"{member} and {owner} are one tensor in this model (`qtha: {{share: ...}}`), and two in these weights. "
                "What works: the `share:` that they were trained with."
            )
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
    tied = {prefix + name: tensor for name, tensor in model.named_parameters(remove_duplicate=False)}  # a head, by both names
    _check_tensors(own | tied, state_dict)
    for name, value in state_dict.items():
        if isinstance(target := own.get(name), DTensor) and not isinstance(value, DTensor):  # FSDP2: each rank takes its shard
            state_dict[name] = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    state_dict.update({member: state_dict[owner] for member, owner in members if owner in state_dict})


def _check_tensors(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Refuse tensors that have no place in the model, or do not fill theirs.

    Raises:
        ValueError: naming the first.
    """
    works = "What works: the complete adapter folder, on the base model and with the `qtha:` settings it was trained with."
    # PEFT writes a resized embedding that is trained in three forms, of which it reads one
    unknown = [name for name in given if name not in own and not name.endswith(RESIZED)]
    if unknown:
        raise ValueError(f"{len(unknown)} tensors of the weights have no place in this model: {sorted(unknown)[:3]}. {works}")
    for name, value in given.items():
        shape = getattr(own.get(name), "ds_shape", getattr(own.get(name), "shape", None))
        whole = ".modules_to_save." in name  # adapters look at their own
        if whole and shape is not None and tuple(shape) != tuple(getattr(value, "ds_shape", value.shape)):
            raise ValueError(f"{name} has shape {tuple(value.shape)} in the weights, {tuple(shape)} in this model. {works}")


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    """Return whether two tensors hold the same, as far as they hold anything."""
    if other is None or tensor is other or "meta" in (tensor.device.type, other.device.type):
        return other is not None
    return tensor.shape == other.shape and torch.equal(tensor, other.to(tensor.device))


def _members(model: QTHAModel, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the names of tensors that adapters have from others, each with the name that its owner has for it."""
    paths = {id(module): f"{prefix}{name}." for name, module in model.named_modules() if isinstance(module, QTHAAdapter)}
    for module in model.modules():
        if isinstance(module, QTHAAdapter):
            for tensor, owner in module.shared.owners.items():
                yield paths[id(module)] + tensor, paths[id(owner)] + tensor


def _share_again(model: QTHAModel, _: Any = None) -> None:
    """Have adapters share tensors again, after each has been given a tensor of its own."""
    for module in model.modules():
        if isinstance(module, QTHAAdapter):
            module.take_shared()


def _convert_earlier(model: QTHAModel, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Put the flat tensors of today in the place of those that an earlier version saved."""
    for name, module in model.named_modules():
        path = f"{prefix}{name}."
        if isinstance(module, QTHAAdapter) and path + MARK[1:] in state_dict:
            given = [key for key in state_dict if key.startswith(path)]
            tensors = {key.removeprefix(path): state_dict.pop(key) for key in given}
            state_dict.update({path + key: value for key, value in converted(tensors, module.table, path[:-1]).items()})
