"""One operator from z to h: what `bottleneck.py` draws, with its casts, the bound on the angles, and all circuits of a token.

It keeps z for backward and computes the rest again: the state vectors are needed there anyway, and give <Z> with them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..circuit import torch_engine
from ..circuit.operators import differentiable, operator
from . import join_kernel, rings
from .bottleneck import bounded, fused
from .joint import Joint, joint_of
from .side import precise

TENSORS = "Tensor z, Tensor fusion, Tensor angles, Tensor? scale"
BRANCH_TENSORS = "Tensor z, Tensor w_q, Tensor angles, Tensor? scale"
OTHERS = "int qubits, int layers, str gate_order, int ring, str activation, bool bounded, bool product, float gain"


def _empty_grad(grad: Tensor, z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, *others: Any) -> Any:
    return z.new_empty(z.shape), torch.empty_like(fusion), torch.empty_like(angles), _like(scale, angles)


def _like(scale: Tensor | None, angles: Tensor) -> Tensor:
    """Return an empty tensor for the gradient of the scale; of no entries, where there is none."""
    return angles.new_empty(0) if scale is None else torch.empty_like(scale)


@operator(f"join({TENSORS}, {OTHERS}) -> Tensor", lambda z, *others: z.new_empty(z.shape))
def _join(z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, *others: Any) -> Tensor:
    joint = joint_of(*others)
    with torch_engine.exactly(z.device.type):
        if _on_kernel(z, joint):
            return join_kernel.forward(_rows(z), *_whole(fusion, angles, scale), joint).view(z.shape)
        run = _Run(z, angles, scale, joint)
        return fused(run.z, run.values(), *_matrices(fusion, run.z), joint.gain, joint.product).to(z.dtype).view(z.shape)


@operator(f"join_grad(Tensor grad, {TENSORS}, {OTHERS}) -> (Tensor, Tensor, Tensor, Tensor)", _empty_grad)
def _join_grad(grad: Tensor, z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    joint = joint_of(*others)
    with torch_engine.exactly(z.device.type):
        if _on_kernel(z, joint):
            found = join_kernel.backward(_rows(grad), _rows(z), *_whole(fusion, angles, scale), joint)
            return _returned(found, z, fusion, angles, scale)
        run = _Run(z, angles, scale, joint)
        grad = grad.reshape(run.z.shape).to(run.z.dtype)
        w_c, w_q = _matrices(fusion, run.z)
        of_branch_path = grad * (run.z @ w_c.T * joint.gain) if joint.product else grad
        q, of_z, *of_branch = run.gradients(of_branch_path @ (w_q * joint.gain))
        direct, of_fusion = _fused_grad(grad, run.z, q, fusion, joint)
        return (of_z.add_(direct).to(z.dtype).view(z.shape), of_fusion, *of_branch)


@operator(f"branch({BRANCH_TENSORS}, {OTHERS}) -> Tensor", lambda z, *others: z.new_empty(z.shape))
def _branch(z: Tensor, w_q: Tensor, angles: Tensor, scale: Tensor | None, *others: Any) -> Tensor:
    joint = joint_of(*others)
    with torch_engine.exactly(z.device.type):
        if _on_kernel(z, joint):
            return join_kernel.forward(_rows(z), *_whole(_alone(w_q), angles, scale), replace(joint, product=False)).view(z.shape)
        run = _Run(z, angles, scale, joint)
        return _scaled(run.values(), _matrix(w_q, run.z).T, joint.gain).to(z.dtype).view(z.shape)


@operator(f"branch_grad(Tensor grad, {BRANCH_TENSORS}, {OTHERS}) -> (Tensor, Tensor, Tensor, Tensor)", _empty_grad)
def _branch_grad(grad: Tensor, z: Tensor, w_q: Tensor, angles: Tensor, scale: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    joint = joint_of(*others)
    with torch_engine.exactly(z.device.type):
        if _on_kernel(z, joint):
            fusion = _alone(w_q)
            found = join_kernel.backward(_rows(grad), _rows(z), *_whole(fusion, angles, scale), replace(joint, product=False))
            of_z, of_fusion, *of_branch = _returned(found, z, fusion, angles, scale)
            return (of_z, of_fusion[w_q.numel() :], *of_branch)
        run = _Run(z, angles, scale, joint)
        grad, matrix = grad.reshape(run.z.shape).to(run.z.dtype), _matrix(w_q, run.z) * joint.gain
        q, of_z, *of_branch = run.gradients(grad @ matrix)
        of_w_q = _scaled(grad.T, q, joint.gain)
        return (of_z.to(z.dtype).view(z.shape), of_w_q.flatten().to(w_q.dtype), *of_branch)


@operator(f"fuse(Tensor z, Tensor path, Tensor w_c, {OTHERS}) -> Tensor", lambda z, *others: z.new_empty(z.shape))
def _fuse(z: Tensor, path: Tensor, w_c: Tensor, *others: Any) -> Tensor:
    with torch_engine.exactly(z.device.type):
        flat, inner = (x.reshape(-1, x.shape[-1]).to(precise(w_c).dtype) for x in (z, path))
        joint, matrix = joint_of(*others), _matrix(w_c, flat)
        h = _scaled(flat, matrix.T, joint.gain) * inner if joint.product else torch.addmm(inner, flat, matrix.T, alpha=joint.gain)
        return h.to(z.dtype).view(z.shape)


@operator(
    f"fuse_grad(Tensor grad, Tensor z, Tensor path, Tensor w_c, {OTHERS}) -> (Tensor, Tensor, Tensor)",
    lambda grad, z, path, w_c, *others: (z.new_empty(z.shape), path.new_empty(path.shape), torch.empty_like(w_c)),
)
def _fuse_grad(grad: Tensor, z: Tensor, path: Tensor, w_c: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch_engine.exactly(z.device.type):
        of_h, flat, inner = (x.reshape(-1, x.shape[-1]).to(precise(w_c).dtype) for x in (grad, z, path))
        joint, matrix = joint_of(*others), _matrix(w_c, flat)
        of_path = of_h * _scaled(flat, matrix.T, joint.gain) if joint.product else of_h
        of_h = of_h * inner if joint.product else of_h
        of_z, of_w_c = _scaled(of_h, matrix, joint.gain), _scaled(of_h.T, flat, joint.gain)
        of_path = of_path.to(path.dtype, copy=not joint.product)  # an operator may not return what it was given
        return of_z.to(z.dtype).view(z.shape), of_path.view(path.shape), of_w_c.flatten().to(w_c.dtype)


_run_join, _run_branch, _run_fuse = (
    differentiable(*pair) for pair in ((_join, _join_grad, 4), (_branch, _branch_grad, 4), (_fuse, _fuse_grad, 3))
)


def join(z: Tensor, fusion: Tensor, angles: Tensor, scale: Tensor | None, joint: Joint) -> Tensor:
    """Return h (.., r) for z (.., r), in z's dtype; differentiable.

    Computed in float32, float64 where the parameters are, without autocast or TF32.

    Args:
        z: what the first matrix gives, in any dtype.
        fusion: W_C and then W_Q, flat (2 r r), as stored.
        angles: those of the circuits, flat (rows * r), in radians; or the weights of a classical network.
        scale: (r), or None: z is multiplied by it before it becomes angles.
        joint: everything else.

    Raises:
        NonFiniteAngle: if (on a CPU) an angle is NaN or infinite.
    """
    result: Tensor = _run_join(z, fusion, angles, scale, *joint.arguments)
    return result


def branch(z: Tensor, w_q: Tensor, angles: Tensor, scale: Tensor | None, joint: Joint) -> Tensor:
    """Return W_Q q (.., r), in z's dtype: the half of `join` that several may have in common. For W_Q, flat (r r), see `join`."""
    result: Tensor = _run_branch(z, w_q, angles, scale, *joint.arguments)
    return result


def fuse(z: Tensor, path: Tensor, w_c: Tensor, joint: Joint) -> Tensor:
    """Return h (.., r) of z and W_Q q, in z's dtype: the other half. For W_C, flat (r r), see `join`."""
    result: Tensor = _run_fuse(z, path, w_c, *joint.arguments)
    return result


def _on_kernel(z: Tensor, joint: Joint) -> bool:
    """Return whether the GPU's kernel takes z (.., r)."""
    return not torch_engine.plain() and join_kernel.runs(z, joint)


def _rows(z: Tensor) -> Tensor:
    """Return z as (tokens, r), contiguous."""
    return z.reshape(-1, z.shape[-1]).contiguous()


def _whole(fusion: Tensor, angles: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return parameters as the kernel takes them."""
    return precise(fusion), precise(angles), None if scale is None else precise(scale)


def _returned(found: tuple[Tensor | None, ...], z: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
    """Return the kernel's gradients in the shape of z and the dtypes of the parameters; of no entries where there is none."""
    of_z, *shared = found
    assert of_z is not None
    pairs = zip(shared, parameters, strict=True)
    given = [z.new_empty(0) if own is None or like is None else own.to(like.dtype) for own, like in pairs]
    return (of_z.view(z.shape), *given)


@lru_cache(maxsize=64)
def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=dtype, device=device)


def _alone(w_q: Tensor) -> Tensor:
    """Return W_C and W_Q with which h is W_Q q."""
    return torch.cat((_zeros(w_q.numel(), w_q.dtype, w_q.device), w_q))


def _matrix(flat: Tensor, z: Tensor) -> Tensor:
    """Return W_C or W_Q, (r, r), as it is stored, in the dtype of z (tokens, r)."""
    return flat.to(z.dtype).view(z.shape[1], z.shape[1])


def _scaled(first: Tensor, second: Tensor, gain: float) -> Tensor:
    """Return gain times a product of two matrices, in one launch."""
    return torch.addmm(first.new_empty(1, 1), first, second, beta=0, alpha=gain)


def _matrices(fusion: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return W_C and W_Q, (r, r), as they are stored, in the dtype of z (tokens, r)."""
    w_c, w_q = fusion.to(z.dtype).view(2, z.shape[1], z.shape[1])
    return w_c, w_q


def _fused_grad(grad: Tensor, z: Tensor, q: Tensor, fusion: Tensor, joint: Joint) -> tuple[Tensor, Tensor]:
    """Return the gradients of z, by way of W_C alone, and `fusion`."""
    w_c, w_q = _matrices(fusion, z)
    of_linear = of_branch = grad * joint.gain
    if joint.product:
        of_linear, of_branch = of_linear * (q @ w_q.T * joint.gain), of_branch * (z @ w_c.T * joint.gain)
    of_fusion = torch.empty(2, *w_c.shape, dtype=z.dtype, device=z.device)
    torch.mm(of_linear.T, z, out=of_fusion[0])
    torch.mm(of_branch.T, q, out=of_fusion[1])
    return of_linear @ w_c, of_fusion.flatten().to(fusion.dtype)


class _Run:
    """The branch's tensors, (tokens, r) and (rows, r), in computing precision."""

    def __init__(self, z: Tensor, angles: Tensor, scale: Tensor | None, joint: Joint) -> None:
        r = z.shape[-1]
        self.joint, self.given, dtype = joint, (angles, scale), precise(angles).dtype
        self.z = z.reshape(-1, r).to(dtype)
        self.angles = angles.to(dtype).view(-1, r if joint.ansatz is None else joint.ansatz.columns(r))
        self.scale = None if scale is None else scale.to(dtype)

    def values(self) -> Tensor:
        """Return q, (tokens, r)."""
        if self.joint.ansatz is None:
            return rings.values(self.z, self.angles, self.joint.ring, self.joint.activation)
        return torch_engine.values(self._encoded(), self.angles, self.joint.ansatz)

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, and the gradients of sum(grad * q) for z (tokens, r), and as they are given: angles, scale."""
        angles, scale = self.given
        if self.joint.ansatz is None:
            q, of_z, of_angles = rings.gradients(grad, self.z, self.angles, self.joint.ring, self.joint.activation)
            return q, of_z, of_angles.flatten().to(angles.dtype), _like(scale, angles)
        encoded = self._encoded()
        q, of_z, of_angles = torch_engine.values_and_gradients(grad.contiguous(), encoded, self.angles, self.joint.ansatz)
        if self.joint.bounded:
            of_z *= 1 - (encoded / math.pi).square_()
        of_scale = _like(scale, angles)
        if self.scale is not None:
            of_scale = (of_z * self.z).sum(0).to(of_scale.dtype)
            of_z = of_z * self.scale
        return q, of_z, of_angles.flatten().to(angles.dtype), of_scale

    def _encoded(self) -> Tensor:
        angles = self.z if self.scale is None else self.z * self.scale
        return bounded(angles) if self.joint.bounded else angles.contiguous()
