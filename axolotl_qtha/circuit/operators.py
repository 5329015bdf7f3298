"""Custom operators: what torch.compile, torch.export and the planner's meta device take as one, instead of what is inside.

Defined through `torch.library`'s lower half: a call of `torch.library.custom_op` takes twice as long, and a training step makes
hundreds. Gradients come from an `autograd.Function` around an operator, see `differentiable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMESPACE = "axolotl_qtha"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Run = Callable[..., Any]


def operator(schema: str, fake: Run) -> Callable[[Run], Run]:
    """Make an operator of a function that returns new tensors, in a tuple if several, and changes none.

    Args:
        schema: its name and arguments as `torch.library` writes them, e.g. "double(Tensor x) -> Tensor".
        fake: takes the same arguments and returns empty results, for tensors without data.

    Returns:
        A decorator; what it returns calls the operator. Autograd does not see into it. Under `torch.func.vmap` it runs once for
        each sample.
    """
    name = schema.partition("(")[0]

    def register(function: Run) -> Run:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        call: Run = getattr(getattr(torch.ops, NAMESPACE), name).default
        torch.library.register_vmap(f"{NAMESPACE}::{name}", lambda info, dims, *args: _each(call, info.batch_size, dims, args))
        return call

    return register


def _each(call: Run, count: int, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Call an operator for each sample of a batch, and stack its results."""

    def of(arg: Any, dim: Any, index: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [of(part, own, index) for part, own in zip(arg, dim, strict=True)]
        return arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg

    found = [call(*(of(arg, dim, index) for arg, dim in zip(args, dims, strict=True))) for index in range(count)]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(each) for each in zip(*found, strict=True)), tuple(0 for _ in found[0])


def _tuple(found: Any) -> Any:
    return tuple(found) if isinstance(found, list) else found


def differentiable(forward: Run, backward: Run, tensors: int) -> Run:
    """Return a function that calls one operator, and another for its gradients.

    Args:
        forward: the operator, of some tensors (or None) and then other values.
        backward: takes the gradients of its results, then the arguments of `forward`; returns the gradients of its tensors. So
            nothing but the tensors is kept.
        tensors: how many tensors `forward` takes.

    Returns:
        A function of `forward`'s arguments. Its gradients cannot be differentiated once more.
    """

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.save_for_backward(*args[:tensors])
            ctx.others = args[tensors:]
            return _tuple(forward(*args))

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> Any:
            found = backward(*grads, *ctx.saved_tensors, *ctx.others)
            found = (found,) if isinstance(found, Tensor) else found
            kept = (grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad, strict=False))
            return (*kept, *(None for _ in ctx.others))

    class Transformed(torch.autograd.Function):  # for torch.func's transforms; a call takes twice as long
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return _tuple(forward(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs[:tensors])
            ctx.others = inputs[tensors:]

        backward = Plain.__dict__["backward"]

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return Transformed.apply(*args)
        return Plain.apply(*args)

    return call
