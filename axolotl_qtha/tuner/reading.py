"""Adapters of modules that read the same input: what the first computes of it, the others take."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Found = tuple[Tensor, Tensor | None]  # z and, with a branch, W_Q q


class Reading:
    """What a group of adapters computes of its input: kept until the last of them has had it, or another input comes.

    One is used again only for the same tensor object, unchanged, with gradients on or off as before; so a block that is computed
    again by gradient checkpointing computes it again, once. Compiled, each adapter computes it by itself: torch.compile knows
    equal operators when it sees them.
    """

    def __init__(self) -> None:
        self.members: list[nn.Module] = []
        self._drop()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (), {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members = state["members"]

    def _drop(self) -> None:
        self._x: Callable[[], Tensor | None] = lambda: None
        self._key: tuple[int, bool] = (-1, False)
        self._found: Found | None = None
        self._left = set[int]()

    def of(self, adapter: nn.Module, x: Tensor, compute: Callable[[], Found]) -> Found:
        """Return z and W_Q q of x (.., d) for one of the adapters."""
        if torch.compiler.is_compiling():
            return compute()
        key = (0 if x.is_inference() else x._version, torch.is_grad_enabled())
        if self._found is not None and self._x() is x and self._key == key and id(adapter) in self._left:
            found = self._found
            self._left.discard(id(adapter))
            if not self._left:
                self._drop()
            return found
        self._drop()  # first, for its memory
        found = compute()
        self._left = {id(member) for member in self.members} - {id(adapter)}
        if self._left:
            self._x, self._key, self._found = weakref.ref(x), key, found
        return found


def _restored() -> Reading:
    return Reading()


@dataclass
class Shared:
    """What an adapter has from adapters of other layers."""

    owners: dict[str, nn.Module] = field(default_factory=dict)  # of its flat tensors, by the tensors' names
    reading: Reading | None = None  # where others read its input
