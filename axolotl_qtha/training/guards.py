"""What keeps a run from misleading: refusals before it, and callbacks while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files.writable import why_unwritable
from ..tuner.adapter import QTHAAdapter
from ..tuner.config import QTHAConfig
from ..tuner.layer import refuse_nonlinear_merge, whole


def refuse_merge(config: QTHAConfig, yaml: str | Path, lora_model_dir: str | None, output_dir: str) -> None:
    """Refuse `axolotl merge-lora` of an adapter that is not linear, with the command that exports it.

    Args:
        config: the adapter.
        yaml: path of the configuration.
        lora_model_dir: folder of the trained adapter, if it is not `output_dir`.
        output_dir: of the training.

    Raises:
        ValueError: if no merged weight equals the adapter.
    """
    given = f" --lora-model-dir {lora_model_dir}" if lora_model_dir not in (None, output_dir) else ""
    command = f"axolotl qtha-export {yaml}{given} --format merged --out {Path(output_dir) / 'merged'}"
    works = f"`{command}`, which merges the closest linear adapter and says what that costs"
    refuse_nonlinear_merge("default", config, works)


def refuse_unwritable(output_dir: str | None) -> None:
    """Refuse an `output_dir` that cannot be written, before any work is done.

    Raises:
        ValueError: naming the key.
    """
    if output_dir and (why := why_unwritable(Path(output_dir))):
        raise ValueError(f"output_dir: {output_dir!r} {why}. What works: a folder on a disk that can be written to.")


def check_lora_model_dir(folder: str | None, inference: bool, trainer_makes_adapter: str | None) -> None:
    """Refuse a `lora_model_dir` that is missing, or that this command ignores.

    Args:
        folder: the key's value.
        inference: whether this is `axolotl inference`, which without a folder would answer with the bare base.
        trainer_makes_adapter: value of `rl` where the trainer makes an adapter of its own and leaves this one out; else None.

    Raises:
        ValueError: naming the key and what works.
    """
    if inference and not folder:
        raise ValueError("lora_model_dir: None gives inference no adapter. What works: `--lora-model-dir` with the output_dir.")
    if folder and trainer_makes_adapter is not None:
        raise ValueError(
            f"lora_model_dir: {folder!r} is not read with `rl: {trainer_makes_adapter}`. What works: without `rl:`, training on, "
            "evaluate and inference."
        )


class RefuseUntrainedEvaluation(TrainerCallback):
    """Stops `axolotl evaluate` of an adapter that was just made: it would measure the base model under another name."""

    def __init__(self) -> None:
        self._settled = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let a training run evaluate at its start."""
        self._settled = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Raise ValueError at the first batch of an evaluation outside training, if every adapter is still a no-op."""
        if self._settled or model is None:
            return
        adapters = [module for module in model.modules() if isinstance(module, QTHAAdapter)]
        if adapters and all([is_no_op(adapter) for adapter in adapters]):  # of all: gathering is for every rank
            raise ValueError(
                "lora_model_dir: None leaves evaluate an untrained adapter, that is the base model. What works: "
                "`--lora-model-dir` with the output_dir of a training, or no `adapter:` to measure the base."
            )
        self._settled = True  # one look is enough


def is_no_op(adapter: QTHAAdapter) -> bool:
    """Return whether an adapter changes nothing; to be called on every rank, where ZeRO-3 or FSDP2 has partitioned it."""
    with whole(adapter):
        return adapter.is_no_op()
