"""The time of a checkpoint: with its manifest, the flush of all files and the older checkpoint kept until then, and without.

Both save the same run by transformers' Trainer, in turns, into a folder that is new or holds a checkpoint of the same step.
Printed are medians, in milliseconds; "flush" is what it takes to have the files reach the disk, which the host leaves to the
system. The hashes are computed meanwhile.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ..terminal import console
from ..training import manifest
from ..training.saves import guard_checkpoints
from ..tuner.config import QTHAConfig
from ..tuner.saving import guard
from .arguments import parser, write_json

WIDTH, LAYERS = 512, 8


@dataclass(frozen=True)
class Times:
    """Medians of saves, in seconds: the host's alone, ours in all, and what of it flushes and hashes; bytes of a checkpoint."""

    host: float
    ours: float
    flush: float
    hash: float
    size: int

    @property
    def ratio(self) -> float:
        """Ours without the flush, to the host's."""
        return (self.ours - self.flush) / self.host


def measure(rank: int, repeats: int, replace: bool) -> Times:
    """Time saves of a Llama of `LAYERS` layers with adapters on all linear layers, after one step.

    Args:
        rank: of the adapters.
        repeats: saves of each kind, in turns.
        replace: whether there is a checkpoint of the same step.
    """
    with TemporaryDirectory() as name:
        trainers = {kind: _trainer(Path(name, kind), rank) for kind in ("host", "ours")}
        guard_checkpoints(trainers["ours"])
        taken: dict[str, list[float]] = {"host": [], "ours": [], "flush": [], "hash": []}
        with _timed(taken):
            for _ in range(repeats):
                for kind, trainer in trainers.items():
                    folder = Path(name, kind, "checkpoint-1")
                    if not replace:
                        shutil.rmtree(folder)
                    taken[kind].append(_seconds(partial(trainer._save_checkpoint, cast(Any, trainer.model), None)))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    hashes = sum(taken["hash"]) / repeats  # of several files a save
    host, ours, flush = (statistics.median(taken[kind]) for kind in ("host", "ours", "flush"))
    return Times(host, ours, flush, hashes, size)


def _trainer(folder: Path, rank: int) -> Trainer:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_attention_heads=8,
            num_hidden_layers=LAYERS,
            max_position_embeddings=64,
        )
    )
    model = cast(PeftModel, get_peft_model(base, QTHAConfig(rank=rank, target_modules="all-linear", task_type="CAUSAL_LM")))
    guard(model)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    arguments = TrainingArguments(str(folder), max_steps=1, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=cast(Any, rows))
    trainer.train()
    return trainer


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


class _timed:
    """Measures what a manifest flushes and hashes, meanwhile."""

    def __init__(self, taken: dict[str, list[float]]) -> None:
        self._taken, self._before = taken, (manifest.flush_all, manifest._digest)

    def __enter__(self) -> None:
        flush, digest = self._before

        def timed_flush(folder: Path) -> None:
            self._taken["flush"].append(_seconds(lambda: flush(folder)))

        def timed_digest(path: Path) -> str:
            begun = time.perf_counter()
            found = digest(path)
            self._taken["hash"].append(time.perf_counter() - begun)
            return found

        manifest.flush_all, manifest._digest = timed_flush, timed_digest

    def __exit__(self, *_: object) -> None:
        manifest.flush_all, manifest._digest = self._before


def main() -> None:
    """Print the times."""
    args = parser(__doc__, ranks=[8, 64], repeats=15).parse_args()
    found = []
    for rank in args.ranks:
        for replace in (False, True):
            times = measure(rank, args.repeats, replace)
            found.append({"rank": rank, "replace": replace, "ratio": times.ratio, **asdict(times)})
            where = "over one of the same step" if replace else "new"
            milliseconds = {name: f"{getattr(times, name) * 1e3:.1f}" for name in ("host", "ours", "flush", "hash")}
            told = ", ".join(f"{name} {value} ms" for name, value in milliseconds.items())
            console().print(f"rank {rank}, {times.size / 2**20:.1f} MiB, {where}: {told}; without flush {times.ratio:.2f} x host")
    write_json(args, found)


if __name__ == "__main__":
    main()
