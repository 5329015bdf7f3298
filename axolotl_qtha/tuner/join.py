"""One operator from z to h: what `bottleneck.py` draws, with its casts, the bound on the angles, and all circuits of a token.

It keeps z for backward and computes the rest again: the state vectors are needed there anyway, and give <Z> with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..circuit import torch_engine
from ..circuit.ansatz import Ansatz
from ..circuit.operators import differentiable, operator
from .fold import precise


@dataclass(frozen=True)
class Joint:
    """What the operator is told beside tensors."""

    ansatz: Ansatz | None  # of each circuit; None: the classical network `silu`
    ring: int = 0  # units of its rings
    bounded: bool = False  # z enters as pi * tanh(z / pi)
    product: bool = False  # h is the product of the two paths, not the sum
    gain: float = 1.0  # of W_C and W_Q

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The operator's arguments after the tensors."""
        circuit = (0, 0, "") if self.ansatz is None else (self.ansatz.qubits, self.ansatz.layers, self.ansatz.gate_order)
        return (*circuit, self.ring, self.bounded, self.product, self.gain)


@lru_cache(maxsize=64)
def _joint(qubits: int, layers: int, gate_order: Any, ring: int, bounded: bool, product: bool, gain: float) -> Joint:
    return Joint(Ansatz(qubits, layers, gate_order) if qubits else None, ring, bounded, product, gain)


TENSORS = "Tensor z, Tensor fusion, Tensor angles, Tensor? scale"
OTHERS = "int qubits, int layers, str gate_order, int ring, bool bounded, bool product, float gain"


def _empty_grad(grad: Tensor, z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, *others: Any) -> Any:
    of_scale = fusion.new_empty(0) if scale is None else torch.empty_like(scale)
    return z.new_empty(z.shape), torch.empty_like(fusion), torch.empty_like(angles), of_scale


@operator(f"join({TENSORS}, {OTHERS}) -> Tensor", lambda z, *others: z.new_empty(z.shape))
def _join(z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, *others: Any) -> Tensor:
    joint = _joint(*others)
    with torch_engine.exactly(z.device.type):
        run = _Run(z, fusion, angles, scale, joint)
        q = run.values()
        linear = run.z @ run.w_c.T
        h = linear * (q @ run.w_q.T) if joint.product else linear.addmm_(q, run.w_q.T)
        return h.to(z.dtype).view(z.shape)


@operator(f"join_grad(Tensor grad, {TENSORS}, {OTHERS}) -> (Tensor, Tensor, Tensor, Tensor)", _empty_grad)
def _join_grad(
    grad: Tensor, z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    joint = _joint(*others)
    with torch_engine.exactly(z.device.type):
        run = _Run(z, fusion, angles, scale, joint)
        grad = grad.reshape(run.z.shape).to(run.z.dtype)
        of_linear, of_branch = grad, grad
        if joint.product:
            of_branch = grad * (run.z @ run.w_c.T)
        q, of_z, of_angles, of_scale = run.gradients(of_branch @ run.w_q)
        if joint.product:
            of_linear = grad * (q @ run.w_q.T)
        of_z.addmm_(of_linear, run.w_c)
        of_fusion = torch.cat([(of_linear.T @ run.z).flatten(), (of_branch.T @ q).flatten()]) * joint.gain
        scales = of_z.new_empty(0) if scale is None or of_scale is None else of_scale.to(scale.dtype)
        return of_z.to(z.dtype).view(z.shape), of_fusion.to(fusion.dtype), of_angles.flatten().to(angles.dtype), scales


_run = differentiable(_join, _join_grad, 4)


def join(z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, joint: Joint) -> Tensor:
    """Return h (.., r) for z (.., r), in z's dtype; differentiable.

    Computed in float32, float64 where `fusion` is, without autocast or TF32.

    Args:
        z: what the first matrix gives, in any dtype.
        fusion: W_C and then W_Q, flat (2 r r), as stored.
        angles: those of the circuits, flat (rows * r), in radians; or the weights of `silu`.
        scale: (r), or None: z is multiplied by it before it becomes angles.
        joint: everything else.

    Raises:
        NonFiniteAngle: if (on a CPU) an angle is NaN or infinite.
    """
    result: Tensor = _run(z, fusion, angles, scale, *joint.arguments)
    return result


class _Run:
    """The operator's tensors, (tokens, r) and (r, r), in computing precision."""

    def __init__(self, z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, joint: Joint) -> None:
        r = z.shape[-1]
        self.joint, dtype = joint, precise(fusion).dtype
        self.z = z.reshape(-1, r).to(dtype)
        self.w_c, self.w_q = (fusion.to(dtype) * joint.gain).view(2, r, r)
        self.angles = angles.to(dtype).view(-1, r)
        self.scale = None if scale is None else scale.to(dtype)

    def values(self) -> Tensor:
        """Return q, (tokens, r)."""
        if self.joint.ansatz is None:
            return silu_rings(self.z, self.angles, self.joint.ring)
        return torch_engine.values(self._encoded(), self.angles, self.joint.ansatz)

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q, and the gradients of sum(grad * q) for z, the angles and the scale."""
        if self.joint.ansatz is None:
            return *_rings_gradients(grad, self.z, self.angles, self.joint.ring), None
        encoded = self._encoded()
        q, of_z, of_angles = torch_engine.values_and_gradients(grad.contiguous(), encoded, self.angles, self.joint.ansatz)
        if self.joint.bounded:
            of_z *= 1 - (encoded / math.pi).square_()
        if self.scale is None:
            return q, of_z, of_angles, None
        of_scale = (of_z * self.z).sum(0)
        return q, of_z * self.scale, of_angles, of_scale

    def _encoded(self) -> Tensor:
        angles = self.z if self.scale is None else self.z * self.scale
        return torch.tanh(angles / math.pi).mul_(math.pi) if self.joint.bounded else angles.contiguous()


def silu_rings(z: Tensor, units: Tensor, size: int) -> Tensor:
    """Return q (.., r) of z (.., r): a classical network wired as the circuits are, in rings of `size` units.

    z enters every layer, each unit sees its two neighbours in its ring. Units are (4 * layers, r): of each layer the weights of z
    and of both neighbours, and a bias.
    """
    return _rings(z, units, size)[-1]


def _rings(z: Tensor, units: Tensor, size: int) -> list[Tensor]:
    """Return z and the layers after it."""
    layers = [z]
    for rows in units.unflatten(0, (-1, 4)):
        layers.append(F.silu(_ring(z, layers[-1], rows, size)))
    return layers


def _ring(z: Tensor, q: Tensor, rows: Tensor, size: int) -> Tensor:
    into, after, before, bias = rows
    return into * z + after * _rolled(q, 1, size) + before * _rolled(q, -1, size) + bias


def _rolled(x: Tensor, by: int, size: int) -> Tensor:
    """Return the values of each unit's neighbour in its ring."""
    return x.unflatten(-1, (-1, size)).roll(by, -1).flatten(-2)


def _rings_gradients(grad: Tensor, z: Tensor, units: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, and the gradients of sum(grad * q) for z and the units."""
    layers, of_z, of_units = _rings(z, units, size), torch.zeros_like(z), torch.empty_like(units)
    for index in range(len(layers) - 2, -1, -1):
        q, rows = layers[index], units[4 * index : 4 * index + 4]
        inner = _ring(z, q, rows, size)
        sigmoid = torch.sigmoid(inner)
        grad = grad * sigmoid * (1 + inner * (1 - sigmoid))
        around = z, _rolled(q, 1, size), _rolled(q, -1, size)
        of_units[4 * index : 4 * index + 4] = torch.stack([*((grad * x).sum(0) for x in around), grad.sum(0)])
        of_z += grad * rows[0]
        grad = _rolled(grad * rows[1], -1, size) + _rolled(grad * rows[2], 1, size)
    return layers[-1], of_z + grad, of_units
