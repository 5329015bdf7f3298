"""Running text through a model, with a look at what passes through its adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tuner.adapter import QTHAAdapter
from ..tuner.layer import adapted_layers
from .calibration_text import Batch


def adapters_of(model: nn.Module, name: str = "default") -> dict[str, QTHAAdapter]:
    """Return the adapters of a PEFT model, by the name of the layer in the base model."""
    return {
        path: layer.qtha_adapter[name]  # type: ignore[misc]
        for path, layer in adapted_layers(model).items()
        if name in layer.qtha_adapter
    }


def input_device(model: nn.Module) -> torch.device:
    """Return where a model takes its input."""
    return cast(nn.Embedding, cast(PreTrainedModel, model).get_input_embeddings()).weight.device


@dataclass(frozen=True)
class Tokens:
    """What passes through an adapter, padding left out: x (N, d), z (N, r), h (N, r), and B h (N, o) as `change`."""

    x: Tensor
    z: Tensor
    h: Tensor
    change: Tensor
    source: Tensor  # x as the layer was given it


@dataclass
class Pass:
    """Runs text through a model, with a look at what its adapters do."""

    model: PreTrainedModel
    adapters: dict[str, QTHAAdapter]
    batches: Callable[[], Iterable[Batch]]  # of the text, from its start
    count: int  # how many there are

    @property
    def device(self) -> torch.device:
        """Return where the model takes its input."""
        return input_device(self.model)

    @torch.no_grad()
    def observe(self, observer: Callable[[str, Tokens], None], title: str, names: Iterable[str] | None = None) -> None:
        """Show `observer` all tokens that pass through the adapters of `names` (default: all)."""
        chosen = self.adapters if names is None else {name: self.adapters[name] for name in names}
        with _observed(chosen, observer) as seen:
            for batch in track(self.batches(), title, self.count, transient=True):
                seen.mask = batch.mask
                self.model(**batch.inputs(self.device), use_cache=False)


@dataclass
class _Seen:
    mask: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))


@contextmanager
def _observed(adapters: dict[str, QTHAAdapter], observer: Callable[[str, Tokens], None]) -> Iterator[_Seen]:
    """Have adapters show what passes through them; they compute the same."""
    seen = _Seen()

    def forward(name: str, join: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        z = F.linear(x, a.to(x.dtype))
        h = join(z.to(a.dtype))
        change = F.linear(h.to(z.dtype), b.to(z.dtype))
        # an expert's tokens come without their places: then padding counts as well
        kept = (seen.mask if seen.mask.shape == x.shape[:-1] else torch.ones(x.shape[:-1], dtype=torch.bool)).to(x.device)
        observer(name, Tokens(x[kept], z[kept].to(a.dtype), h[kept], change[kept], x))
        return change

    try:
        for name, adapter in adapters.items():
            parts = name, _join(adapter), *adapter.folds()
            adapter.forward = partial(forward, *parts)  # type: ignore[method-assign]
        yield seen
    finally:
        for adapter in adapters.values():
            adapter.__dict__.pop("forward", None)


def _join(adapter: QTHAAdapter) -> Callable[[Tensor], Tensor]:
    """Return the function from z (.., r) to h (.., r)."""
    return adapter.bottleneck() if adapter.shape.has_branch else partial(F.linear, weight=adapter.effective("w_c"))
