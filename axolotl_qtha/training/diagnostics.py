"""What the parts of an adapter do while it is trained, in the trainer's log and wherever Axolotl reports to.

Measured every `diagnostics_steps` steps, over the layers with an adapter; each is left out where it does not exist:

* `qtha/quantum_share`: ||W_Q q|| / ||W_C z||, root mean squares over a sample of tokens, mean over layers; and of each layer
  of the transformer by itself, `qtha/quantum_share/layer_0` and so on. Not for `quantum: none`, nor `qwthn`, a product.
* `qtha/z_variance`: variance of <Z> over the tokens, mean over qubits and layers. 0: the circuit says the same of each token.
* `qtha/wrapped`: share of the angles of RY(z) that are beyond pi before `angle_scale: tanh` bounds them, or wrap around.
* `qtha/effective_rank`: exp of the entropy of the singular values of B W_C A, normalised to a sum of 1 (Roy and Vetterli,
  EUSIPCO 2007); mean over layers. From r x r matrices: B W_C A itself is never built.
* `qtha/grad_norm_angles`, `_cores`, `_classical`: norms of the gradients that the optimiser gets (after clipping), over all
  layers: of the circuit's angles, of the tensor networks' cores, and of the matrices A, B, W_A, W_B, W_C, W_Q.

The model computes the same with and without. The tokens are those of the step's first micro-batch, their z from its forward pass,
everything else from the weights at the step's end; circuits run on the exact simulator, whatever `quantum_backend` says.
Under ZeRO-3 and FSDP2, which leave a part of each tensor on each rank, only `wrapped` is there; under other DeepSpeed stages no
gradient norms are; with torch.compile nothing of the tokens is. What is NaN or infinite is left out, and stops no training. No
rank waits for another.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..circuit.torch_engine import expectation_values
from ..tuner.adapter import QTHAAdapter
from ..tuner.bottleneck import Bottleneck, Circuit
from ..tuner.layer import QTHALayer
from ..tuner.table import CIRCUIT

if TYPE_CHECKING:
    from transformers import Trainer

TOKENS = 256  # of each layer
SHARE = "qtha/quantum_share"
PARTS = dict.fromkeys(CIRCUIT, "angles")  # other tensors are cores (mpo_*) or classical


class Diagnostics(TrainerCallback):
    """Measures at every `steps`-th step, the first included, and adds to the row of the log that has its loss."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        """Take over the trainer's `log`: what a callback adds in `on_log` comes too late for `log_history`.

        Args:
            trainer: the one the callback is added to.
            steps: between two measurements; 1: each step.
        """
        self._steps, self._adapters = steps, dict[str, QTHAAdapter]()
        self._z: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._found: dict[str, float] = {}
        self._log = trainer.log
        trainer.log = self._log_found  # type: ignore[method-assign]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Have the adapters show their z in this step."""
        if model is None or state.global_step % self._steps:
            return
        self._z, self._norms, self._adapters = {}, {}, dict(active_adapters(model))
        for name, adapter in self._adapters.items():
            adapter.seen = self._keeper(name)

    def _keeper(self, name: str) -> Any:
        def keep(z: Tensor) -> None:
            if name not in self._z and z.numel():  # a layer that is recomputed shows the same again; an expert may get no token
                self._z[name] = sample(z)

        return keep

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the norms of the gradients, on their devices."""
        if self._adapters:
            self._norms = gradient_norms(self._adapters.values())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure, and leave the adapters alone until the next time."""
        if not self._adapters:
            return
        for adapter in self._adapters.values():
            adapter.seen = None
        if state.is_world_process_zero:  # the others report nothing
            self._found = measure(self._adapters, self._z, self._norms)
        self._z, self._norms, self._adapters = {}, {}, {}

    def _log_found(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._found:  # the row of the steps
            logs |= self._found
            self._found = {}
        self._log(logs, *args, **kwargs)


def active_adapters(model: nn.Module) -> Iterator[tuple[str, QTHAAdapter]]:
    """Yield the adapters that are trained, by their own name and their layer's."""
    for name, layer in model.named_modules():
        if isinstance(layer, QTHALayer):
            for adapter in layer.active_adapters:
                if adapter in layer.qtha_adapter:
                    yield f"{adapter}.{name}", layer.qtha_adapter[adapter]  # type: ignore[misc]


def sample(z: Tensor) -> Tensor:
    """Return at most TOKENS rows of z (.., r), evenly spaced, as a copy of its own (tokens, r)."""
    flat = z.detach().reshape(-1, z.shape[-1])
    return flat[:: math.ceil(len(flat) / TOKENS)].to(torch.float32, copy=True)  # else all of z would be kept


def gradient_norms(adapters: Iterable[QTHAAdapter]) -> dict[str, Tensor]:
    """Return the norms of the gradients by part, as tensors; empty where gradients are not whole, or not here."""
    gradients: dict[str, list[Tensor]] = {}
    for adapter in adapters:
        own = adapter.state_names()  # a tensor that several share counts once
        for name, part in ((name, part) for name, part in adapter.table.items() if part.tensor in own):
            gradient = getattr(adapter, part.tensor).grad
            if type(gradient) is Tensor and gradient.numel() == adapter.sizes[part.tensor]:
                kind = PARTS.get(name, "cores" if name.startswith("mpo_") else "classical")
                gradients.setdefault(kind, []).append(gradient[part.start : part.start + part.size])
    return {f"qtha/grad_norm_{part}": _norm(found) for part, found in gradients.items()}


def _norm(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors)
    return torch.stack([norm.float().to(norms[0].device) for norm in norms]).norm()


@torch.no_grad()
def measure(adapters: dict[str, QTHAAdapter], z: dict[str, Tensor], norms: dict[str, Tensor]) -> dict[str, float]:
    """Return everything that is logged: measured for all layers at once, and read from the device once.

    Args:
        adapters: by their names.
        z: of some tokens of each, (tokens, r); none at all where the model is compiled.
        norms: of gradients, by their names in the log.
    """
    called = {name: adapter for name, adapter in adapters.items() if not z or name in z}
    columns: dict[str, list[Tensor]] = {}  # numbers of some layers, still on their device
    shares: list[str] = []
    for names in _alike(called, z):
        for key, value in _of_tokens([called[name] for name in names], torch.stack([z[name] for name in names])).items():
            columns.setdefault(key, []).append(value)
            shares += names if key == SHARE else []
    grams = [_grams(adapter) for adapter in called.values() if whole(adapter)]
    # One transfer for all.
    parts = [torch.cat([value.double() for value in values]) for values in columns.values()]
    parts += [torch.stack(grams).flatten()] if grams else []
    parts += [torch.stack(list(norms.values())).double()] if norms else []
    if not parts:
        return {}
    device = parts[0].device
    numbers = iter(torch.cat([part.to(device) for part in parts]).cpu().split([part.numel() for part in parts]))
    found: dict[str, float] = {}
    for key in columns:
        each = next(numbers)
        found[key] = float(each[each.isfinite()].mean())
        if key == SHARE:
            found |= _by_layer(key, dict(zip(shares, each.tolist(), strict=True)))
    if grams:
        each = next(numbers).reshape(-1, *grams[0].shape)
        found["qtha/effective_rank"] = float(effective_ranks(each[each.isfinite().flatten(1).all(1)]).mean())
    if norms:
        found |= dict(zip(norms, next(numbers).tolist(), strict=True))
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _alike(adapters: dict[str, QTHAAdapter], z: dict[str, Tensor]) -> list[list[str]]:
    """Return names of adapters whose tokens can be measured together."""
    groups: dict[Any, list[str]] = {}
    for name, adapter in adapters.items() if z else ():
        groups.setdefault((id(adapter.config), z[name].shape, z[name].device, whole(adapter)), []).append(name)
    return list(groups.values())


def whole(adapter: QTHAAdapter) -> bool:
    """Return whether this rank has an adapter's tensors in whole."""
    return all(
        type(tensor) in (Tensor, nn.Parameter) and not hasattr(tensor, "ds_id") and tensor.numel() == adapter.sizes[name]
        for name, tensor in adapter.state_names().items()
    )


def _of_tokens(adapters: list[QTHAAdapter], z: Tensor) -> dict[str, Tensor]:
    """Return what depends on tokens, (layers) each, for adapters of one configuration and their z (layers, tokens, r).

    The circuits of several layers are simulated as if they were those of one, side by side.
    """
    first, found = adapters[0], dict[str, Tensor]()
    config, layers = first.config, len(adapters)
    if config.has_circuit and (config.angle_scale != "learned" or whole(first)):
        angles = z * torch.stack([a.effective("scale") for a in adapters])[:, None] if config.angle_scale == "learned" else z
        found["qtha/wrapped"] = (angles.abs() > math.pi).float().mean((1, 2))
    if not first.shape.has_branch or not whole(first):
        return found
    joins = [adapter.bottleneck() for adapter in adapters]
    z = z.to(joins[0].w_c.dtype)
    q = _branches(joins, z.transpose(0, 1).flatten(1)).unflatten(1, (layers, -1)).transpose(0, 1)
    if config.has_circuit:
        found["qtha/z_variance"] = q.var(dim=1, correction=0).mean(1)
    if not joins[0].product:
        w_q, w_c = torch.stack([join.w_q.mT for join in joins]), torch.stack([join.w_c.mT for join in joins])
        found[SHARE] = (q @ w_q).norm(dim=(1, 2)) / (z @ w_c).norm(dim=(1, 2))
    return found


def _branches(joins: list[Bottleneck], z: Tensor) -> Tensor:
    """Return q, (tokens, layers * r), of z (tokens, layers * r); NaN where an angle is not finite, which the engine refuses."""
    branches = [join.branch for join in joins]
    if not isinstance(branches[0], Circuit):
        rings = cast("list[partial[Tensor]]", branches)
        return rings[0](z, units=torch.cat([ring.keywords["units"] for ring in rings], 1))
    circuits = cast(list[Circuit], branches)
    scales = [circuit.scale for circuit in circuits if circuit.scale is not None]
    angles = torch.cat([circuit.angles for circuit in circuits], 1)
    encoded = dataclasses.replace(circuits[0], scale=torch.cat(scales) if scales else None).encode(z)
    whole, columns = encoded.isfinite().all(0), angles.isfinite().all(0)
    each = encoded.shape[1] // angles.shape[1]  # of z for a column of angles: 1, or all that a circuit of the user's own takes
    finite = whole & columns.repeat_interleave(each)
    encoded, angles = encoded.where(whole, 0.0), angles.where(columns, 0.0)
    return expectation_values(encoded, angles, circuits[0].ansatz).where(finite, math.nan)


def _grams(adapter: QTHAAdapter) -> Tensor:
    """Return A A^T, W_C and B^T B, (3, r, r), float64."""
    a, b, w_c = (matrix.double() for matrix in (*adapter.folds(), adapter.effective("w_c")))
    return torch.stack([a @ a.T, w_c, b.T @ b])


def effective_ranks(grams: Tensor) -> Tensor:
    """Return the effective ranks of B W A, given A A^T, W and B^T B (layers, 3, r, r); 0 of a matrix that is zero.

    The squares of its singular values are the eigenvalues of R^T W^T (B^T B) W R, where R R^T = A A^T.
    """
    gram_a, w, gram_b = grams.unbind(1)
    values, vectors = torch.linalg.eigh(gram_a)
    root = vectors * values.clamp_min(0).sqrt()[:, None]
    inner = w @ root
    singular = torch.linalg.eigvalsh(inner.mT @ gram_b @ inner).clamp_min(0).sqrt()
    total = singular.sum(-1, keepdim=True)
    shares = singular / total.where(total > 0, torch.ones_like(total))
    ranks = torch.special.entr(shares).sum(-1).exp()
    return ranks.where(total[:, 0] > 0, torch.zeros_like(ranks))


def _by_layer(key: str, values: dict[str, float]) -> dict[str, float]:
    """Return means over the adapters of each layer of the transformer."""
    layers: dict[str, list[float]] = {}
    for name, value in values.items():
        if not math.isfinite(value):
            continue
        index = re.search(r"\.(\d+)\.", name)
        layers.setdefault(f"layer_{index.group(1)}" if index else name.rsplit(".", 1)[-1], []).append(value)
    return {f"{key}/{layer}": sum(each) / len(each) for layer, each in layers.items()}
