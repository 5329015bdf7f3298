"""QTHALinear: a frozen linear layer with QTHA adapters.

```
 x (.., d) --MPO_A--> u (.., m) --W_A--> z (.., r) --+--circuit--> q = <Z_i> --W_Q--+
                                                     |                             (+)--> h (.., r)
                                                     +-------------W_C-------------+
 h --W_B--> v (.., m) --MPO_B--> (.., o)             y = y0 + (alpha / r) * MPO_B W_B h
```

Everything outside the circuit is linear and passes through r numbers, so tokens never go through the cores: A = W_A MPO_A
(r x d) and B = MPO_B W_B (o x r) are contracted once per forward, at a cost that does not depend on the number of tokens.

Source: arXiv 2503.12790, version 2 (QTHA; `quantum: qwthn` is version 1), with sizes and starting values of the authors' public
code. Numbers of the paper's equations are not known here.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..circuit.torch_engine import NonFiniteAngle
from ..errors import refusal
from .adapter import QTHAAdapter
from .config import QTHAConfig
from .mixed import rows
from .quantised import backend
from .reading import Shared
from .share import ALL, LayerSize, Owned
from .sizes import adapter_shape

PREFIX = "base_model.model."  # what PEFT puts before the names of the base's modules


class QTHALayer(BaseTunerLayer):
    """What PEFT needs to know of an adapted layer: its adapters by name."""

    adapter_layer_names = ("qtha_adapter",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, **quantisation: Any) -> None:
        self.base_layer = base_layer
        self.name = type(self).__name__  # in errors; its place in the model, once it has one
        self.quantization_backend = backend(self.get_base_layer(), **quantisation)
        self.qtha_adapter = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = layer_sizes(self.get_base_layer())

    def update_layer(
        self, adapter_name: str, config: QTHAConfig, seed: int, owned: Owned = ALL, shared: Shared | None = None
    ) -> None:
        """Add an adapter, or reset the one of this name; for `owned` and `shared` see `share.py` and `adapter.py`."""
        weight = self._dense_weight() if config.init == "tt_svd" else None
        shape = adapter_shape(config, self.in_features, self.out_features, owned)
        self._refuse_other_device(config, shared)
        adapter = QTHAAdapter(config, shape, seed, weight, shared)
        self.qtha_adapter[adapter_name] = adapter
        if adapter.shared.reading is not None:
            adapter.shared.reading.members.append(adapter)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        adapter.take_shared()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _refuse_other_device(self, config: QTHAConfig, shared: Shared | None) -> None:
        own = next(self.get_base_layer().parameters()).device
        for owner in shared.owners.values() if shared else ():
            there = cast(QTHAAdapter, owner).fusion.device
            if "meta" not in (own.type, there.type) and own != there:
                why = f"shares tensors of layers on {there} and on {own}"
                raise refusal(
                    "share", config.share and config.share.model_dump(), why, "one device for all layers, or no `share:`"
                )

    def _dense_weight(self) -> Tensor | None:
        """Return the frozen weight as (out_features, in_features), dequantised, or None on the meta device."""
        layer = self.get_base_layer()
        if any(parameter.device.type == "meta" for parameter in layer.parameters()):
            return None
        try:
            with whole(layer):
                weight = self.get_base_weight().detach().clone()
        except (TypeError, NotImplementedError) as error:
            raise refusal(
                "init", "tt_svd", f"reads the frozen weights, and {type(layer).__name__} cannot give them", "`init: kaiming`"
            ) from error
        if not weight.to(torch.float32).isfinite().all():  # float8 cannot be asked
            why = f"starts from the weight of {self.name}, which has NaN or infinity in it"
            raise refusal("init", "tt_svd", why, "a base whose weights are finite, or `exclude_modules` with that layer")
        return weight.T if isinstance(layer, Conv1D) else weight


class QTHALinear(nn.Module, QTHALayer):
    """A frozen `nn.Linear` (or GPT-2's `Conv1D`) with QTHA adapters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *adapter: Any, name: str | None = None, **quantisation: Any
    ) -> None:
        """Wrap a frozen layer.

        Args:
            base_layer: the layer.
            adapter_name: of its first adapter.
            adapter: further arguments of `update_layer`.
            name: of the layer in its model, for errors.
            quantisation: what PEFT's quantisation backends need to know of the model.
        """
        super().__init__()
        QTHALayer.__init__(self, base_layer, **quantisation)
        self.name = name or self.name
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, *adapter)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the layer's output (.., out_features) in the base layer's dtype.

        Args:
            x: (.., in_features).
            args: further arguments of the base layer.
            adapter_names: an adapter, or `__base__`, for each entry of the first axis; default: the active ones for all.
            kwargs: further arguments of the base layer.

        Raises:
            ValueError: if there are more or fewer names than entries, or adapters are merged.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.merged:
            if adapter_names is not None:
                works = "unmerge_adapter() first"
                raise ValueError(f"adapter_names: {self.name} has {self.merged_adapters} merged. What works: {works}.")
            return result
        if self.quantization_backend is not None:
            self._refuse_cut_gradient(x, result)
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            for name, own in rows(adapter_names, len(x), self.name).items():
                if name in self.qtha_adapter:  # not the base's, nor one without an adapter here
                    at = torch.tensor(own, device=x.device)
                    result = result.index_add(0, at, self._change(name, x[at]).to(result.dtype))
            return result
        for name in self.active_adapters:
            if name in self.qtha_adapter:
                result = result + self._change(name, x).to(result.dtype)
        return result

    def _change(self, name: str, x: Tensor) -> Tensor:
        """Return what an adapter adds; its errors name this layer."""
        try:
            change: Tensor = self.qtha_adapter[name](x)
        except NonFiniteAngle as error:
            raise NonFiniteAngle(f"{self.name}: {error}") from None
        return change

    def _refuse_cut_gradient(self, x: Tensor, result: Tensor) -> None:
        """Refuse to train on a frozen layer without a backward pass: the adapters before it would learn the wrong gradient."""
        if x.requires_grad and torch.is_grad_enabled() and not result.requires_grad:
            layer = self.get_base_layer()
            kind = f"{type(layer).__name__} with {type(getattr(layer, 'weight', None)).__name__}"
            raise ValueError(
                f"the base is quantised in a way that passes no gradient on ({kind}), so nothing before it can be trained. "
                "What works: a weight-only quantisation, such as `load_in_4bit: true` on the full-precision base."
            )

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the change of the weight that equals the adapter, in the base weight's layout.

        Raises:
            ValueError: unless the adapter is linear (`quantum: none`).
        """
        adapter: QTHAAdapter = self.qtha_adapter[adapter_name]  # type: ignore[assignment]
        refuse_nonlinear_merge(adapter_name, adapter.config)
        a, b = adapter.folds(fused=True)
        delta = b @ a
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether PEFT's `convert_to_lora` can convert the adapter: it is there, and linear (`quantum: none`)."""
        if adapter_name not in self.qtha_adapter:
            return False
        config = cast(QTHAAdapter, self.qtha_adapter[adapter_name]).config
        if config.quantum != "none":  # PEFT names the class of the layer, and no reason
            warnings.warn(
                f"adapter {adapter_name!r} has `quantum: {config.quantum}`, which is not linear: no LoRA equals it. What works: "
                "`axolotl qtha-export`, which fits one and says how well; or `quantum: none`.",
                stacklevel=2,
            )
        return config.quantum == "none"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add linear adapters into the frozen weight; with `safe_merge`, none if the sum holds NaN or infinity."""
        names = check_adapters_to_merge(self, adapter_names)
        if (merged := self.merged_weight(names, safe_merge)) is not None:
            self.set_base_weight(merged)
            self.merged_adapters += [name for name in names if name in self.qtha_adapter]

    def merged_weight(self, names: list[str], safe_merge: bool) -> Tensor | None:
        """Return the weight with adapters added that are not merged yet, in the base's layout; None if it has none of them.

        Raises:
            ValueError: if an adapter is not linear, the base quantised, or with `safe_merge` the weight holds NaN or infinity.
        """
        weight = None
        for name in names:
            if name not in self.qtha_adapter or name in self.merged_adapters:
                continue
            refuse_quantised_merge(self)
            weight = self.get_base_weight() if weight is None else weight
            weight = (weight + self.get_delta_weight(name)).to(weight.dtype)
            if safe_merge and not bool(weight.isfinite().all()):
                raise ValueError(
                    f"merging adapter {name!r} gives NaN or infinite weights in {self.name}; nothing was merged. "
                    "What works: an earlier checkpoint, or a smaller alpha where the base is in 16 bits."
                )
        return weight

    def unmerge(self) -> None:
        """Take merged adapters out of the weight again (up to rounding)."""
        while self.merged_adapters:
            weight = self.get_base_weight()
            self.set_base_weight((weight - self.get_delta_weight(self.merged_adapters.pop())).to(weight.dtype))


def whole(module: nn.Module) -> AbstractContextManager[Any]:
    """Gather a module's parameters if ZeRO-3 has partitioned them; to be called on every rank."""
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    result: AbstractContextManager[Any] = GatheredParameters(parameters)
    return result


def adapted_layers(model: nn.Module) -> dict[str, QTHALayer]:
    """Return the layers of a PEFT model that carry adapters, by their names in the base model."""
    return {name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, QTHALayer)}


def adapted_sizes(model: PeftModel) -> list[LayerSize]:
    """Return the sizes of every layer of a PEFT model that carries its active adapter, and what each has of its own."""
    layers = (layer for layer in adapted_layers(model).values() if model.active_adapter in layer.qtha_adapter)
    shapes = (cast(QTHAAdapter, layer.qtha_adapter[model.active_adapter]).shape for layer in layers)
    return [LayerSize(shape.in_features, shape.out_features, shape.owned, shape.rank) for shape in shapes]


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) from the layer's attributes; a sharded weight's shape would not tell."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def refuse_nonlinear_merge(adapter_name: str, config: QTHAConfig, works: str | None = None) -> None:
    """Refuse to merge an adapter that no change of the weight can express.

    Args:
        adapter_name: its name.
        config: the adapter.
        works: what else the program that merges has to offer.

    Raises:
        ValueError: if it has a circuit, or the classical network that stands in for one.
    """
    if config.quantum != "none":
        offered = f"{works}; " if works else ""
        raise ValueError(
            f"adapter {adapter_name!r} has `quantum: {config.quantum}`, which is not linear in x: no merged weight equals it, "
            f"and none was written. What works: {offered}the adapter unmerged; or `qtha: {{quantum: none}}`, which merges "
            "exactly."
        )


def refuse_tied_merge(model: nn.Module) -> None:
    """Refuse to merge into a weight that another module has too, as a head does that is tied to the embedding.

    Raises:
        ValueError: naming both.
    """
    holders: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if ".original_module." not in name:  # a copy is trained in its place, and takes it when merged
            holders.setdefault(id(weight), []).append(name)
    for name, module in model.named_modules():
        if not isinstance(module, QTHALayer):
            continue
        own = id(getattr(module.get_base_layer(), "weight", None))
        if others := [holder for holder in holders.get(own, []) if not holder.startswith(f"{name}.")]:
            raise ValueError(
                f"{name} has the weight of {others[0].rsplit('.', 1)[0]} (`tie_word_embeddings`), which merging into it would "
                "change as well; nothing was merged. What works: `axolotl qtha-export CONFIG --format merged --out FOLDER`, "
                "which unties them."
            )


def refuse_quantised_merge(layer: QTHALayer) -> None:
    """Refuse to merge into a quantised weight, where rounding to a few bits would take most of the adapter away again."""
    if layer.quantization_backend is not None:
        raise ValueError(
            f"the base is quantised ({layer.quantization_backend.backend_name}): merging would round the adapter to its bits; "
            "nothing was merged. What works: the adapter on the full-precision base, loaded without quantisation, and merged "
            "there; where the base is a quantised checkpoint, on the one it was made from."
        )
