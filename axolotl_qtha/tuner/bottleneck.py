"""From z to h: what a token's r numbers pass through between the two matrices of an adapter.

```
 z (.., r) --+--encode--circuit--> q (.., r) --W_Q--+
             |                                     (+)--> h (.., r)
             +-----------------W_C-----------------+
```

The circuit's angles and the two matrices are the same for all tokens. `prepared` makes use of that where they do not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from ..circuit import native, torch_engine
from ..circuit.ansatz import Ansatz
from ..circuit.simulation import Simulation
from .backends import expectation_values

if TYPE_CHECKING:
    from qiskit import QuantumCircuit


@dataclass
class Circuit:
    """A circuit and how z enters it."""

    angles: Tensor  # (rows, r), in radians
    ansatz: Ansatz
    simulation: Simulation
    scale: Tensor | None = None  # (r): z is multiplied by it
    bounded: bool = False  # z enters as pi * tanh(z / pi)

    def __call__(self, z: Tensor) -> Tensor:
        """Return q = <Z_i>, (.., r)."""
        return expectation_values(self.encode(z), self.angles, self.ansatz, self.simulation)

    def encode(self, z: Tensor) -> Tensor:
        """Return the encoding angles in radians, (.., r)."""
        z = z if self.scale is None else z * self.scale
        return bounded(z) if self.bounded else z

    @torch.no_grad()
    def bound(self, z: Any) -> list[QuantumCircuit]:
        """Return the Qiskit circuits that one token's z (r) drives, with their numbers bound: one for each block.

        Raises:
            ValueError: if z has another shape, or is NaN or infinite.
        """
        given = torch.as_tensor(z, dtype=self.angles.dtype, device=self.angles.device)
        blocks = self.angles.shape[1] // self.ansatz.angle_shape[1]
        if tuple(given.shape) != ((rank := blocks * self.ansatz.width),):
            raise ValueError(f"z has shape {tuple(given.shape)}. What works: the {rank} numbers of one token, z = A x.")
        parts = zip(self.encode(given).chunk(blocks), self.angles.chunk(blocks, dim=1), strict=True)
        return [self.ansatz.bound(*part) for part in parts]


@dataclass
class Bottleneck:
    """The picture above, as a function of z (.., r) in any dtype; computed in the dtype of its tensors, without autocast."""

    w_c: Tensor  # (r, r)
    w_q: Tensor  # (r, r)
    branch: Callable[[Tensor], Tensor]  # z to q
    product: bool = False  # h is the product of the two paths, not the sum
    gain: float = 1.0  # of both matrices

    def __call__(self, z: Tensor) -> Tensor:
        """Return h, (.., r), in z's dtype."""
        with maybe_autocast(z.device.type, enabled=False):
            precise = z.to(self.w_c.dtype)
            return self.fuse(precise, self.branch(precise)).to(z.dtype)

    def fuse(self, z: Tensor, q: Tensor) -> Tensor:
        """Join the linear path and the branch: h (.., r)."""
        rank = z.shape[-1]
        return fused(z.reshape(-1, rank), q.reshape(-1, rank), self.w_c, self.w_q, self.gain, self.product).view(z.shape)


def fused(z: Tensor, q: Tensor, w_c: Tensor, w_q: Tensor, gain: float, product: bool) -> Tensor:
    """Return h (tokens, r) of z and q (tokens, r): the two paths, summed or multiplied; in as few launches as there can be.

    Args:
        z: what the linear path takes.
        q: what the branch gives.
        w_c: the linear path's matrix, (r, r), as stored.
        w_q: the branch's, (r, r), as stored.
        gain: of both.
        product: whether h is the product of the paths.
    """
    linear = z @ w_c.T
    if product:
        return (linear * gain) * (q @ w_q.T * gain)
    return torch.addmm(linear, q, w_q.T, beta=gain, alpha=gain)


def prepared(bottleneck: Bottleneck) -> Callable[[Tensor], Tensor]:
    """Return the same function, up to rounding, for use without gradients and while its tensors keep their values.

    With one token, autograd, the operator for torch.compile and the tables of the angles take a hundred times as long as the
    circuit. On a CPU a few tokens take one call of the compiled engine from z to h.

    Raises:
        NonFiniteAngle: if (on a CPU) an angle is NaN or infinite.
    """
    circuit, dtype = bottleneck.branch, bottleneck.w_c.dtype
    if not isinstance(circuit, Circuit) or circuit.simulation.backend != "torch":
        return bottleneck
    kernel = torch_engine.fused(circuit.angles, circuit.ansatz)
    if kernel is None:
        return bottleneck
    angles, few = circuit.angles.detach(), None
    if on_cpu := angles.device.type == "cpu":
        torch_engine.check_finite(torch.zeros_like(angles), angles, circuit.ansatz)
    with torch_engine.exactly(angles.device.type):
        tables = kernel.Tables(angles, circuit.ansatz)
    if kernel is native:
        w_c, w_q = bottleneck.w_c * bottleneck.gain, bottleneck.w_q * bottleneck.gain
        few = native.Few(tables, w_c, w_q, circuit.scale, circuit.bounded, bottleneck.product)

    def run(z: Tensor) -> Tensor:
        if torch_engine.plain():
            return bottleneck(z)
        precise = z if z.dtype == dtype else z.to(dtype)  # which takes a microsecond to find nothing to do
        h = few(precise) if few is not None and precise.numel() <= few.numbers else None
        if h is None:
            with maybe_autocast(z.device.type, enabled=False):
                encoded = circuit.encode(precise).reshape(-1, z.shape[-1]).contiguous()
                if on_cpu:
                    torch_engine.check_finite(encoded, angles, circuit.ansatz)
                h = bottleneck.fuse(precise, kernel.run(encoded, tables).view(z.shape))
        return h if h.dtype == z.dtype else h.to(z.dtype)

    return run


def alone(bottleneck: Bottleneck, kept: bool) -> Callable[[Tensor], Tensor]:
    """Return the function from z to W_Q q (.., r), in z's dtype; if it is `kept`, for use as of `prepared`."""
    only = replace(bottleneck, w_c=torch.zeros_like(bottleneck.w_c), product=False)
    return prepared(only) if kept else only


def bounded(z: Tensor) -> Tensor:
    """Return pi * tanh(z / pi), in radians."""
    if not torch.is_grad_enabled():
        return _bounded(z)
    result: Tensor = _Bounded.apply(z)
    return result


def _bounded(z: Tensor) -> Tensor:
    return math.pi * torch.tanh(z / math.pi)


class _Bounded(torch.autograd.Function):
    """Keeps for backward only its result: the circuit keeps that too."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        angles = _bounded(z)
        ctx.save_for_backward(angles)
        return angles

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (angles,) = ctx.saved_tensors
        result: Tensor = grads[0] * (1 - (angles / math.pi).square())
        return result
