"""An export opened from its folder as who gets it opens it, by transformers and PEFT, and compared with what was measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.progress import track
from torch import nn

from ..errors import refusal
from ..tuner.quantised import keep_trainable
from .measure import Kept, ModelError, Tally, log_probabilities

ROUNDING = {torch.float32: 1e-5}  # KL, nats per token, that summing in another order may cost
HALF = 1e-2  # in 16 bits, where each merged weight is rounded to 8 or 11 of them


@dataclass(frozen=True)
class Opener:
    """How the base of an adapter is opened: what a program needs that has never heard of QTHA."""

    cls: Any  # the base's class in transformers
    base: str  # its folder or name
    source: dict[str, Any]  # what its files are found and read with: revision, trust_remote_code
    dtype: torch.dtype
    overrides: dict[str, Any]  # of its configuration
    quantization: Any  # transformers' quantization_config, where it is quantised while it is loaded
    tied: bool  # by its configuration
    vocabulary: int | None = None  # rows of the adapter's embedding, where they are not as many as the base's

    @property
    def quantised(self) -> bool:
        """Return whether the base was quantised while it was loaded."""
        return self.quantization is not None

    def full(self) -> Opener:
        """Return the same without quantisation."""
        return replace(self, quantization=None)

    def lora(self, folder: Path) -> nn.Module:
        """Return the base with the LoRA of a folder, by PEFT."""
        quantised = {"quantization_config": self.quantization} if self.quantised else {}
        model = self._open(self.base, **self.source, **self.overrides, **quantised)
        keep_trainable(model)  # else what was measured would be compared with scales that the CPU's own form rounds
        if self.vocabulary is not None:
            model.resize_token_embeddings(self.vocabulary, mean_resizing=False)
        return PeftModel.from_pretrained(model, str(folder)).eval()

    def merged(self, folder: Path) -> nn.Module:
        """Return the model of a folder."""
        return self._open(str(folder), **{key: value for key, value in self.source.items() if key == "trust_remote_code"})

    def _open(self, name: str, **settings: Any) -> Any:
        # what is too large for the GPU stays in memory or in its file
        places = {"device_map": "auto"} if torch.cuda.is_available() else {}
        return self.cls.from_pretrained(name, dtype=self.dtype, **settings, **places).eval()


@dataclass
class Written:
    """What the folder of an export gives, beside what was measured before it was written."""

    model: ModelError  # beside the model with the QTHA adapter
    kl: float  # KL(what was measured || what was written), nats per token
    largest: float  # largest difference of their log-probabilities of the tokens that follow
    base: str  # what the written one is or stands on, in words


def compare(model: nn.Module, kept: Kept, base: str) -> Written:
    """Run the held-out text through what was opened."""
    beside_qtha, beside_export, largest = Tally(), Tally(), 0.0
    for batch, qtha, export in track(list(zip(kept.batches, kept.qtha, kept.export, strict=True)), "opening", transient=True):
        logs, targets = log_probabilities(model, batch).cpu(), batch.targets()
        beside_qtha.add(logs, qtha, targets)
        beside_export.add(logs, export, targets)
        off = float((logs - export).gather(1, targets[:, None]).abs().amax())
        largest = largest if off <= largest else off  # NaN too, which max() would drop
    return Written(beside_qtha.error(), beside_export.error().kl, largest, base)


def rebased(model: nn.Module, kept: Kept) -> None:
    """Take what a model gives for what the written one is to equal."""
    kept.export = [log_probabilities(model, batch).cpu() for batch in track(kept.batches, "opening", transient=True)]


def check(written: Written, dtype: torch.dtype, kind: str) -> None:
    """Refuse a folder that does not give what was measured.

    Raises:
        ValueError: naming the format.
    """
    most = ROUNDING.get(dtype, HALF)
    if not written.kl <= most:
        raise refusal(
            "--format",
            kind,
            f"does not hold the model that was measured: opened from its files, {written.base} is off by a KL of {written.kl:.3g}"
            f" nats per token (at most {written.largest:.3g} in a log-probability), more than the {most:g} of rounding; nothing "
            "was written",
            f"`--format {'lora' if kind == 'merged' else 'merged'}`",
        )


@contextmanager
def opened(how: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """Give a model and forget it."""
    models = [how()]
    try:
        yield models[0]
    finally:
        models.clear()
        release()


def release() -> None:
    """Give memory back that models held which are gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
