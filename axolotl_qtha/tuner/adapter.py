"""QTHAAdapter: the trainable part of one adapted layer, the picture of `layer.py` without the frozen weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from ..errors import IncompleteAdapter
from .bottleneck import Bottleneck, Circuit, prepared
from .config import QTHAConfig
from .fold_cache import Fold, Kept
from .mpo import decompose, fold_columns, fold_rows
from .sizes import AdapterShape, ansatz

# With core_gain `balanced`, a step changes a tensor, relative to its size, by this share of what it changes LoRA's A by.
GAIN_SHARE = 0.3


class QTHAAdapter(nn.Module):
    """One adapter of one layer: maps x (.., d) to the change of the layer's output (.., o).

    Parameters are float32 unless the model is cast. The two large matrices and the circuit are computed in float32 (float64 for
    a float64 model), whatever the dtype of x; the products with x and h in x's dtype. The matrices are folded from the cores in
    every forward; in eval mode without gradients, as in `generate()`, they are kept until a tensor changes (`fold_cache.py`).

    They are stored flat, in row-major order: FSDP2 shards the first axis and pads it to a multiple of the ranks, and the first
    axis of a first core has size 1. `stored` and `effective` give them their shapes.
    """

    def __init__(self, config: QTHAConfig, shape: AdapterShape, seed: int, weight: Tensor | None = None) -> None:
        """Initialise as an exact no-op.

        Args:
            config: the adapter's configuration.
            shape: its sizes on this layer.
            seed: seed of the initial values.
            weight: the frozen weight (out_features, in_features), for `init: tt_svd`.
        """
        super().__init__()
        self.config, self.shape, self.kept = config, shape, Kept()
        self.seen: Callable[[Tensor], None] | None = None  # is shown z (.., r) of each forward pass: training/diagnostics
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.gains: dict[str, float] = {}
        self.shapes: dict[str, torch.Size] = {}
        generator = torch.Generator().manual_seed(seed)
        r = shape.rank
        if shape.mpo_a is None or shape.mpo_b is None:
            self._add("a", _normal((r, shape.in_features), shape.in_features**-0.5, generator))
            self._add("b", torch.zeros(shape.out_features, r))
        else:
            self._init_cores(config, shape, generator, weight)
        for name in ("w_c", "w_q") if shape.has_branch else ("w_c",):
            fusion = (2 * torch.rand(r, r, generator=generator) - 1) * math.sqrt(6 / r)  # kaiming_uniform_, as the authors
            self._add(name, fusion, self._gain(math.sqrt(2 / r), shape.in_features))
        if config.quantum == "silu":
            self._add("units", _normal((shape.branch_rows, r), 3**-0.5, generator))
        elif config.has_circuit:
            angles = (2 * torch.rand(shape.branch_rows, r, generator=generator) - 1) * math.pi
            self._add("angles", angles, trained=shape.trains_branch)
        if shape.learns_scale:
            self._add("scale", torch.ones(r))
        self._scale_z()
        self.register_state_dict_post_hook(_check_saved)
        self.register_load_state_dict_pre_hook(_check_loaded)

    def _init_cores(self, config: QTHAConfig, shape: AdapterShape, generator: torch.Generator, weight: Tensor | None) -> None:
        assert shape.mpo_a is not None
        assert shape.mpo_b is not None
        mid, r = shape.mpo_a.outputs.padded, shape.rank
        w_a = _normal((r, mid), mid**-0.5, generator)
        w_b = _normal((mid, r), r**-0.5, generator)
        directions: dict[str, list[Tensor]] = {}
        if config.init == "tt_svd" and weight is not None:
            left, right = _leading_directions(weight, mid, generator)
            directions = {"mpo_a": decompose(right, shape.mpo_a), "mpo_b": decompose(left, shape.mpo_b)}
            w_a, w_b = torch.eye(r, mid), torch.eye(mid, r)
        for name, mpo, size in (("mpo_a", shape.mpo_a, shape.in_features), ("mpo_b", shape.mpo_b, shape.out_features)):
            for k, core_shape in enumerate(mpo.core_shapes):
                left_bond, _, inputs, right_bond = core_shape
                std = (inputs * math.sqrt(left_bond * right_bond)) ** -0.5
                core = _normal(core_shape, std, generator)
                if name in directions:
                    core = directions[name][k]
                    core = core * (std / core.square().mean().sqrt().clamp_min(1e-30))
                last = name == "mpo_b" and k == len(mpo.core_shapes) - 1
                # The core that starts at zero starts as LoRA's B does, so it needs no gain.
                self._add(f"{name}_{k}", torch.zeros_like(core) if last else core, 1.0 if last else self._gain(std, size))
        self._add("w_a", w_a, self._gain(mid**-0.5, shape.in_features))
        self._add("w_b", w_b, self._gain(r**-0.5, shape.out_features))

    def _gain(self, std: float, size: int) -> float:
        """Return the constant that a tensor is divided by before it is stored.

        Adam moves every entry by the learning rate, whatever its size. The entries of LoRA's A are small, of standard
        deviation 1/sqrt(3 size), so A learns fast; the entries of a core are much larger.

        Args:
            std: standard deviation of the tensor's entries.
            size: in_features or out_features, whichever is on the tensor's side.
        """
        return max(1.0, GAIN_SHARE * std * math.sqrt(3 * size)) if self.config.core_gain == "balanced" else 1.0

    def _add(self, name: str, value: Tensor, gain: float = 1.0, trained: bool = True) -> None:
        self.gains[name], self.shapes[name] = gain, value.shape
        flat = (value / gain).flatten()
        if trained:
            self.register_parameter(name, nn.Parameter(flat))
        else:  # a buffer: frozen parameters are dropped from sharded saves
            self.register_buffer(name, flat)

    def _scale_z(self) -> None:
        """Scale the rows of the map to z, so that z starts with unit variance for uncorrelated unit-variance x."""
        rows = self.stored("a" if self.shape.mpo_a is None else "w_a")
        if rows.device.type == "meta":
            return
        with torch.no_grad():
            rows.div_(self.fold_a().norm(dim=1, keepdim=True).clamp_min(1e-30))

    def state_names(self) -> dict[str, Tensor]:
        """Return the tensors a saved adapter holds for this layer, by name."""
        return dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False))

    def is_no_op(self) -> bool:
        """Return whether the adapter changes nothing, as before training; its parameters must be whole."""
        zero = "b" if self.shape.mpo_b is None else f"mpo_b_{self.config.num_cores - 1}"
        return not bool(getattr(self, zero).any())

    def stored(self, name: str) -> Tensor:
        """Return a matrix, core or the angles as they are stored and trained, in their shape; writing to it writes to them."""
        value: Tensor = getattr(self, name)
        return value.view(self.shapes[name])

    def effective(self, name: str) -> Tensor:
        """Return a matrix, core or the angles as they act (their gain applied), in computing precision."""
        value = _precise(self.stored(name))
        return value if self.gains[name] == 1 else value * self.gains[name]

    def cores(self, name: str) -> list[Tensor]:
        """Return the effective cores of `mpo_a` or `mpo_b`."""
        return [self.effective(f"{name}_{k}") for k in range(self.config.num_cores)]

    def fold_a(self) -> Tensor:
        """Return A = W_A MPO_A, (r, d)."""
        if self.shape.mpo_a is None:
            return self.effective("a")
        return fold_rows(self.effective("w_a"), self.cores("mpo_a"), self.shape.in_features)

    def fold_b(self, fusion: Tensor | None = None) -> Tensor:
        """Return (alpha / r) * MPO_B W_B, (o, r); times `fusion` (r, r), if given."""
        w_b = self.effective("b" if self.shape.mpo_b is None else "w_b") * self.config.scaling
        w_b = w_b if fusion is None else w_b @ fusion
        if self.shape.mpo_b is None:
            return w_b
        return fold_columns(self.cores("mpo_b"), w_b, self.shape.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the change of the output, (.., o), in the dtype of the products with x."""
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            fold = self._fold(x)
        else:
            fold = self.kept.get(self._tensors(), self.shapes, x, self._fold)
        z = F.linear(self.dropout(x) if self.config.dropout else x, fold.a)
        if not torch.compiler.is_compiling() and self.seen is not None:  # in this order: a guard on `seen` would compile anew
            self.seen(z)
        h = z if fold.join is None else fold.join(z)
        return F.linear(h, fold.b if fold.b.dtype == h.dtype else fold.b.to(h.dtype))

    def _fold(self, x: Tensor, kept: bool = False) -> Fold:
        """Compute all that depends on x's dtype and device only; if it is `kept`, for use without gradients."""
        with maybe_autocast(x.device.type, enabled=False):  # also knows the meta device
            if not self.shape.has_branch:
                return Fold(self.fold_a().to(x.dtype), self.fold_b(self.effective("w_c")))
            join = self.bottleneck()
            return Fold(self.fold_a().to(x.dtype), self.fold_b(), prepared(join) if kept else join)

    def bottleneck(self) -> Bottleneck:
        """Return the function from z (.., r) to h (.., r); for an adapter with a branch."""
        product = self.config.quantum == "qwthn"
        return Bottleneck(self.effective("w_c"), self.effective("w_q"), self._branch(), product)

    def _branch(self) -> Callable[[Tensor], Tensor]:
        """Return the function from z to q (.., r): <Z_i> of the circuit, or its classical twin."""
        if self.config.quantum == "silu":
            return partial(_silu_rings, units=self.effective("units"), size=self.config.circuit_qubits)
        scale = self.effective("scale") if self.config.angle_scale == "learned" else None
        bounded = self.config.angle_scale == "tanh"
        return Circuit(self.effective("angles"), ansatz(self.config), self.config.simulation, scale, bounded)

    def _tensors(self) -> dict[str, Tensor | None]:
        """Return the adapter's tensors; unlike `state_names`, within a microsecond."""
        return {**self._parameters, **self._buffers}

    def drop_kept(self) -> None:
        """Forget the folded matrices. Needed by hand only after writing to a parameter's `.data` in eval mode."""
        self.kept.drop(self._tensors(), self.shapes)

    def train(self, mode: bool = True) -> QTHAAdapter:
        """Set training or eval mode."""
        self.drop_kept()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> QTHAAdapter:
        self.drop_kept()  # what moves or casts the tensors may write to their `.data`
        return super()._apply(*args, **kwargs)


def _silu_rings(z: Tensor, units: Tensor, size: int) -> Tensor:
    """A classical network wired as the circuits are: z enters every layer, each unit sees its two neighbours in its ring."""
    z, units = z.unflatten(-1, (-1, size)), units.unflatten(-1, (-1, size))  # (.., rings, size)
    q = z
    for into, after, before, bias in units.unflatten(0, (-1, 4)):
        q = F.silu(into * z + after * q.roll(1, -1) + before * q.roll(-1, -1) + bias)
    return q.flatten(-2)


def _precise(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) * std


def _leading_directions(weight: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the leading singular directions of a (o, d) weight: left (o, count) and right (count, d), zero-padded."""
    matrix = weight.detach().to("cpu", torch.float32)
    rank = min(count, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        u, _, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    left, right = matrix.new_zeros(matrix.shape[0], count), matrix.new_zeros(count, matrix.shape[1])
    left[:, :rank], right[:rank] = u[:, :rank], v[:, :rank].T
    return left, right


def _check_saved(module: QTHAAdapter, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Refuse to save a tensor that is not finite."""
    for name in module.state_names():
        value = state_dict.get(prefix + name)
        if value is not None and value.device.type != "meta" and not bool(torch.isfinite(value).all()):
            raise IncompleteAdapter(
                f"adapter tensor {prefix}{name} holds NaN or infinite values; it was not saved. What works: a smaller "
                "learning_rate or max_grad_norm, from the last good checkpoint."
            )


def _check_loaded(module: QTHAAdapter, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse tensors that are missing, unknown, of another shape, or not finite; forget what is kept of those before."""
    module.drop_kept()
    given = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    expected = module.state_names()
    if not given:  # a state dict of something else; QTHAModel checks whole files
        return
    if given != set(expected):
        raise ValueError(
            f"adapter {prefix[:-1]} does not fit: missing {sorted(set(expected) - given)}, "
            f"unknown {sorted(given - set(expected))}. "
            "What works: the `qtha:` settings the adapter was trained with (its adapter_config.json)."
        )
    for name, own in expected.items():
        value = state_dict[prefix + name]
        if value.shape != own.shape:
            raise ValueError(
                f"adapter tensor {prefix}{name} has shape {tuple(value.shape)}, this model needs {tuple(own.shape)}, flat for "
                f"{tuple(module.shapes[name])}. "
                "What works: the base model and `qtha:` settings the adapter was trained with."
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"adapter tensor {prefix}{name} holds NaN or infinite values; nothing was loaded. "
                "What works: an earlier checkpoint."
            )
