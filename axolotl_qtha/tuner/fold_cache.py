"""What an adapter computes from its own tensors alone (a `Fold`), kept from token to token while nothing is trained.

Folding costs the same for one token as for thousands, so `generate()` would pay for it anew with every token of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor | None]
Sizes = Mapping[str, int]

ORDINARY = (nn.Parameter, Tensor)  # no shard (DTensor), no stand-in (FakeTensor)

_version: Callable[[Any], int] = attrgetter("_version")
_pointer: Callable[[Any], int] = Tensor.data_ptr
_each_time: ContextVar[bool] = ContextVar("each_time", default=False)


class Fold(NamedTuple):
    """An adapter made ready for tokens x (.., d)."""

    a: Tensor  # (r, d), in x's dtype
    b: Tensor  # (r, o), transposed, times alpha / r, unless `join` has that; without a branch also times W_C
    join: Callable[[Tensor], Tensor] | None = None  # z (.., r) to h (.., r), where there is a branch; or to q, see `reading`


@contextmanager
def folding_each_time() -> Iterator[None]:
    """Neither use nor keep folds inside, to compare; those that are kept stay."""
    token = _each_time.set(True)
    try:
        yield
    finally:
        _each_time.reset(token)


class _Entry:
    """A fold, and what tells whether it is still that of its adapter."""

    fold: Fold

    def __init__(self, tensors: Tensors, x: Tensor) -> None:
        self.device, self.dtype, self.kind = x.device, x.dtype, x.device.type
        self.autocast = _autocast(self.kind)
        held = [tensor for tensor in tensors.values() if tensor is not None]
        self.ids, self.versions, self.pointers = list(map(id, held)), list(map(_version, held)), list(map(_pointer, held))
        # Kept alive, so that no other tensor takes the place of one at its id, nor other values at their address.
        self.alive = held, [tensor.detach() for tensor in held]

    def fits(self, tensors: Tensors, x: Tensor) -> bool:
        """Return whether the fold would come out the same again; takes 3 microseconds."""
        held = tensors.values()
        return (
            self.ids == list(map(id, held))
            and self.versions == list(map(_version, held))
            and self.pointers == list(map(_pointer, held))
            and self.dtype == x.dtype
            and self.device == x.device
            and self.autocast == _autocast(self.kind)
        )


class Kept:
    """The place of an adapter's fold, in eval mode without gradients; it takes as much memory as the two matrices of a LoRA.

    A fold is used again only while every tensor it was made of is the same object, at the same address, of the same version,
    which PyTorch counts up on writing. Writes that are not counted (through `.data`, as by DeepSpeed's optimisers) belong to
    training: train(), eval(), moving, casting and loading drop the fold.

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        self._sharded = False

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def __bool__(self) -> bool:
        """Return whether a fold is kept."""
        return self._entry is not None

    def drop(self, tensors: Tensors, sizes: Sizes) -> None:
        """Forget the fold; and note whether the tensors are sharded, which FSDP2's do not show inside a forward."""
        self._entry = None
        self._sharded = self._sharded or _sharded(tensors, sizes)

    def get(self, tensors: Tensors, sizes: Sizes, x: Tensor, make: Callable[[Tensor, bool], Fold]) -> Fold:
        """Return the fold for x (.., d), made by `make(x, kept)` if none is kept or may be."""
        if _each_time.get():
            return make(x, False)
        entry = self._entry  # once: another thread may drop it
        if entry is not None and entry.fits(tensors, x):
            return entry.fold
        self._entry = None  # first, for its memory
        if self._sharded or _sharded(tensors, sizes) or not _lasting(tensors, sizes, x):
            return make(x, False)
        entry = _Entry(tensors, x)
        # Ordinary tensors, also under inference_mode: they may be used outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            entry.fold = make(x, True)
        self._entry = entry
        return entry.fold


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products with x are computed."""
    autocast = _autocast(x.device.type)
    return x.dtype if autocast is None or x.dtype == torch.float64 else autocast


def _autocast(device_type: str) -> torch.dtype | None:
    """Return the dtype autocast computes products in, if it is on."""
    if device_type == "meta":  # which has none
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _sharded(tensors: Tensors, sizes: Sizes) -> bool:
    """Return whether a tensor is, or may become, on this rank in part only: writes to it when gathered raise no `_version`."""
    return any(
        tensor is None or type(tensor) not in ORDINARY or hasattr(tensor, "ds_id") or tensor.numel() != sizes[name]
        for name, tensor in tensors.items()
    )


def _lasting(tensors: Tensors, sizes: Sizes, x: Tensor) -> bool:
    """Return whether what is made of the tensors can be used again with inputs like x."""
    return (
        tensors.keys() == sizes.keys()  # else some are computed (torch's parametrizations) or copied for each forward
        and type(x) in ORDINARY
        and x.device.type != "meta"
        and not any(tensor.is_inference() for tensor in tensors.values() if tensor is not None)  # writes are not counted
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())  # a CUDA graph would keep its address
    )
