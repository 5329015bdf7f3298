"""QTHAAdapter: the trainable part of one adapted layer, the picture of `layer.py` without the frozen weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from ..errors import IncompleteAdapter, refusal
from . import rings
from .bottleneck import Bottleneck, Circuit, alone, prepared
from .config import QTHAConfig
from .fold import fold
from .fold_cache import Fold, Kept, product_dtype
from .initial import values
from .join import branch, fuse, join
from .joint import Joint
from .reading import Shared
from .side import precise, sides
from .sizes import AdapterShape, ansatz
from .table import table, tensor_sizes

if TYPE_CHECKING:
    from qiskit import QuantumCircuit


class QTHAAdapter(nn.Module):
    """One adapter of one layer: maps x (.., d) to the change of the layer's output (.., o).

    Parameters are float32 unless the model is cast. The two large matrices and the circuit are computed in float32 (float64 for
    a float64 model), whatever the dtype of x; the products with x and h in x's dtype. The matrices are folded from the cores in
    every forward; in eval mode without gradients, as in `generate()`, they are kept until a tensor changes (`fold_cache.py`).

    The tensors are flat, and few: `table.py` says what lies where. `stored` and `effective` give each part its shape.
    """

    cores: Tensor
    cores_a: Tensor
    cores_b: Tensor
    fusion: Tensor
    fusion_q: Tensor
    angles: Tensor
    units: Tensor
    scale: Tensor

    def __init__(
        self, config: QTHAConfig, shape: AdapterShape, seed: int, weight: Tensor | None = None, shared: Shared | None = None
    ) -> None:
        """Initialise as an exact no-op.

        Args:
            config: the adapter's configuration.
            shape: its sizes on this layer.
            seed: seed of the initial values.
            weight: the frozen weight (out_features, in_features), for `init: tt_svd`.
            shared: what it has from adapters of other layers, see `take_shared`.
        """
        super().__init__()
        self.config, self.shape, self.kept = config, shape, Kept()
        self.shared = shared or Shared()
        self.seen: Callable[[Tensor], None] | None = None  # is shown z (.., r) of each forward pass: training/diagnostics
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.table = table(config, shape)
        self.sizes = tensor_sizes(self.table)
        initial = values(config, shape, self.table, seed, weight)
        for name in self.sizes:
            parts = [(initial[key] / part.gain).flatten() for key, part in self.table.items() if part.tensor == name]
            if name == "angles" and not shape.trains_branch:  # a buffer: frozen parameters are dropped from sharded saves
                self.register_buffer(name, torch.cat(parts))
            else:
                self.register_parameter(name, nn.Parameter(torch.cat(parts)))
        of_sides = self.table, shape.rank, shape.in_features, shape.out_features, config.scaling
        self._sides, self._fused_sides = sides(*of_sides, fused=False), sides(*of_sides, fused=True)
        self._plain = shape.mpo_a is None and "cores_a" in self.sizes  # full matrices in tensors of their own: nothing to fold
        self._scaled = self._plain and shape.has_branch and config.quantum != "qwthn"  # h, not B, is times alpha / r
        self._joint = self._joined("w_c") if shape.has_branch else None
        self._joint_q = self._joined("w_q") if shape.has_branch else None
        self._scale_z()
        self.register_state_dict_post_hook(_check_saved)
        self.register_load_state_dict_pre_hook(_check_loaded)

    def _joined(self, name: str) -> Joint:
        """Return what the operator from z to h needs to know, with the gain of one of its matrices."""
        config, gain = self.config, self.table[name].gain * (self.config.scaling if self._scaled else 1.0)
        if not config.has_circuit:
            return Joint(None, gain=gain, ring=config.circuit_qubits, activation=config.quantum)
        bounded, product = config.angle_scale == "tanh", config.quantum == "qwthn"
        return Joint(ansatz(config), bounded=bounded, product=product, gain=gain)

    def _scale_z(self) -> None:
        """Scale the rows of the map to z, so that z starts with unit variance for uncorrelated unit-variance x."""
        rows = self.stored("a" if self.shape.mpo_a is None else "w_a")
        if rows.device.type == "meta":
            return
        with torch.no_grad():
            rows.div_(self.fold_a().norm(dim=1, keepdim=True).clamp_min(1e-30))

    def take_shared(self) -> None:
        """Use the tensors of the adapters that own them: once it is where its layer is, and again after loading."""
        for name, owner in self.shared.owners.items():
            # not by setattr: while PEFT loads with low_cpu_mem_usage, what is registered is replaced by a copy without data
            held = self._parameters if name in self._parameters else self._buffers
            held[name] = getattr(owner, name)

    def state_names(self) -> dict[str, Tensor]:
        """Return the tensors a saved adapter holds for this layer, by name; those that it shares are its owner's."""
        return {name: tensor for name, tensor in self._tensors().items() if tensor is not None and name not in self.shared.owners}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the tensors of `state_names` that are trained."""
        return {name: cast(nn.Parameter, tensor) for name, tensor in self.state_names().items() if tensor.requires_grad}

    def is_no_op(self) -> bool:
        """Return whether the adapter changes nothing, as before training; its parameters must be whole."""
        return not bool(self.stored("b" if self.shape.mpo_b is None else f"mpo_b_{self.config.num_cores - 1}").any())

    def stored(self, name: str) -> Tensor:
        """Return a matrix, core or the angles as they are stored and trained, in their shape; writing to it writes to them."""
        part = self.table[name]
        tensor: Tensor = getattr(self, part.tensor)
        return tensor[part.start : part.start + part.size].view(part.shape)

    def effective(self, name: str) -> Tensor:
        """Return a matrix, core or the angles as they act (their gain applied), in computing precision."""
        value, gain = precise(self.stored(name)), self.table[name].gain
        return value if gain == 1 else value * gain

    def fold_a(self) -> Tensor:
        """Return A = W_A MPO_A, (r, d)."""
        return self.folds()[0]

    def fold_b(self, fused: bool = False) -> Tensor:
        """Return (alpha / r) * MPO_B W_B, (o, r); times W_C, if it is to be fused."""
        return self.folds(fused)[1]

    def folds(self, fused: bool = False) -> tuple[Tensor, Tensor]:
        """Return both, from one call of the operator, in computing precision."""
        a, b = self._folded(precise(self.fusion).dtype, fused)
        return a, b.T

    def _folded(self, dtype: torch.dtype, fused: bool = False) -> list[Tensor]:
        """Return A (r, d) and the transposed B (r, o)."""
        return [matrix for name in self._sides for matrix in self._side(name, dtype, fused)]

    def _side(self, name: str, dtype: torch.dtype, fused: bool) -> list[Tensor]:
        """Return what the tensor of this name holds of A and B, folded."""
        w_c, by_tensor = None, self._sides
        if fused:  # without a branch all of `fusion`: no view, whose backward would be two operators more
            w_c, by_tensor = self.fusion[: self.shape.rank**2] if self.shape.has_branch else self.fusion, self._fused_sides
        return fold(getattr(self, name), w_c, by_tensor[name], dtype)

    def _ready(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A (r, d) and the transposed B (r, o) for the products with tokens; B without alpha / r, where h has it."""
        fused = not self.shape.has_branch
        if not self._plain:
            a, b = self._folded(dtype, fused)
            return a, b
        a = self.cores_a.view(self.shape.rank, -1).to(dtype)
        if self._scaled:
            return a, self.cores_b.view(-1, self.shape.rank).to(dtype).T
        (b,) = self._side("cores_b", dtype, fused)
        return a, b

    def forward(self, x: Tensor) -> Tensor:
        """Return the change of the output, (.., o), in the dtype of the products with x."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or self.training or torch.is_grad_enabled():
            made = self._fold(x)
        else:
            made = self.kept.get(self._tensors(), self.sizes, x, self._fold)
        if self.shared.reading is None:
            z = self._bottom(x, made)
            h = z if made.join is None else made.join(z)
        else:
            z, path = self.shared.reading.of(self, x, lambda: self._branched(x, made))
            h = z if path is None else self._fused(z, path)
        if not torch.compiler.is_compiling() and self.seen is not None:  # in this order: a guard on `seen` would compile anew
            self.seen(z)
        return h @ (made.b if made.b.dtype == h.dtype else made.b.to(h.dtype))

    def _bottom(self, x: Tensor, made: Fold) -> Tensor:
        """Return z, (.., r)."""
        return F.linear(self.dropout(x) if self.config.dropout else x, made.a)

    def _branched(self, x: Tensor, made: Fold) -> tuple[Tensor, Tensor | None]:
        """Return z and W_Q q, (.., r) each, which modules that read the same input have in common."""
        z = self._bottom(x, made)
        return z, None if made.join is None else made.join(z)

    def _fold(self, x: Tensor, kept: bool = False) -> Fold:
        """Compute all that depends on x's dtype and device only; if it is `kept`, for use without gradients."""
        a, b = self._ready(product_dtype(x))
        if self._joint is None:
            return Fold(a, b)
        if not kept and self.config.quantum_backend == "torch":
            return Fold(a, b, self._join if self.shared.reading is None else self._only_branch)
        with maybe_autocast(x.device.type, enabled=False):  # also knows the meta device
            join = self._bottleneck(self._joint.gain)
            if self.shared.reading is not None:
                return Fold(a, b, alone(join, kept))
            return Fold(a, b, prepared(join) if kept else join)

    def _join(self, z: Tensor) -> Tensor:
        """Return h (.., r) for z (.., r)."""
        assert self._joint is not None
        # joining two small tensors takes a GPU fewer launches than two operators for the large ones
        fusion = torch.cat((self.fusion, self._as_w_c(self.fusion_q))) if "fusion_q" in self.sizes else self.fusion
        return join(z, fusion, *self._branch_tensors(), self._joint)

    def _only_branch(self, z: Tensor) -> Tensor:
        """Return W_Q q (.., r) for z (.., r)."""
        assert self._joint_q is not None
        return branch(z, self.fusion_q, *self._branch_tensors(), self._joint_q)

    def _fused(self, z: Tensor, path: Tensor) -> Tensor:
        """Return h (.., r) of z and W_Q q."""
        assert self._joint is not None
        return fuse(z, path, self.fusion, self._joint)

    def _branch_tensors(self) -> tuple[Tensor, Tensor | None]:
        """Return the angles, or the weights of a classical network, and the scale."""
        return self.units if self.config.is_classical else self.angles, self.scale if self.shape.learns_scale else None

    def bottleneck(self) -> Bottleneck:
        """Return the function from z (.., r) to h (.., r); for an adapter with a branch."""
        return self._bottleneck(self.table["w_c"].gain)

    def _bottleneck(self, gain: float) -> Bottleneck:
        w_c, w_q = (precise(self.stored(name)) for name in ("w_c", "w_q"))
        return Bottleneck(w_c, self._as_w_c(w_q), self._branch(), self.config.quantum == "qwthn", gain)

    def _as_w_c(self, w_q: Tensor) -> Tensor:
        """Return W_Q as it would be stored with W_C's gain."""
        ratio = self.table["w_q"].gain / self.table["w_c"].gain
        return w_q if ratio == 1 else w_q * ratio

    def _branch(self) -> Callable[[Tensor], Tensor]:
        """Return the function from z to q (.., r): <Z_i> of the circuit, or a classical network."""
        if self.config.is_classical:
            units, size = self.effective("units"), self.config.circuit_qubits
            return partial(rings.values, units=units, size=size, activation=self.config.quantum)
        scale = self.effective("scale") if self.config.angle_scale == "learned" else None
        bounded = self.config.angle_scale == "tanh"
        return Circuit(self.effective("angles"), ansatz(self.config), self.config.simulation, scale, bounded)

    def to_qiskit(self, z: Any) -> list[QuantumCircuit]:
        """Return the trained circuits of one token as Qiskit has them, all numbers bound: one for each block of the rank.

        Args:
            z: the token's r numbers as the map A gives them, z = A x (`fold_a() @ x`), an array or tensor; the adapter's own
                scale or tanh makes them angles in radians here.

        Raises:
            ValueError: if the adapter runs no circuit, or z has another shape.
        """
        if not self.config.has_circuit:
            raise refusal("quantum", self.config.quantum, "runs no circuit", "`quantum: qtha`, `frozen` or `qwthn`")
        return cast(Circuit, self._branch()).bound(z)

    def _tensors(self) -> dict[str, Tensor | None]:
        """Return the adapter's tensors; unlike `state_names`, within a microsecond."""
        return {**self._parameters, **self._buffers}

    def drop_kept(self) -> None:
        """Forget the folded matrices. Needed by hand only after writing to a parameter's `.data` in eval mode."""
        self.kept.drop(self._tensors(), self.sizes)

    def train(self, mode: bool = True) -> QTHAAdapter:
        """Set training or eval mode."""
        self.drop_kept()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> QTHAAdapter:
        self.drop_kept()  # what moves or casts the tensors may write to their `.data`
        return super()._apply(*args, **kwargs)


def _check_saved(module: QTHAAdapter, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Leave out what another adapter owns; refuse to save a tensor that is not finite."""
    for name in module.shared.owners:
        state_dict.pop(prefix + name, None)
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
    expected = {name: tensor for name, tensor in module._tensors().items() if tensor is not None}
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
                f"adapter tensor {prefix}{name} has shape {tuple(value.shape)}, this model needs {tuple(own.shape)}. "
                "What works: the base model and `qtha:` settings the adapter was trained with."
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"adapter tensor {prefix}{name} holds NaN or infinite values; nothing was loaded. "
                "What works: an earlier checkpoint."
            )
