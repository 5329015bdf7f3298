"""Trainer callbacks that keep a run from misleading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner.adapter import QTHAAdapter
from ..tuner.layer import whole
from .checkpoints import ONE_RANKS_SHARD


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
        if adapters and all(_is_no_op(adapter) for adapter in adapters):
            raise ValueError(
                "lora_model_dir: None leaves evaluate an untrained adapter, that is the base model. What works: "
                "`--lora-model-dir` with the output_dir of a training, or no `adapter:` to measure the base."
            )
        self._settled = True  # one look is enough


def _is_no_op(adapter: QTHAAdapter) -> bool:
    with whole(adapter):
        return adapter.is_no_op()


class DropOneRanksShard(TrainerCallback):
    """Takes a file out of FSDP2's checkpoints that holds one rank's part of the adapter.

    Accelerate 1.13 writes it (`save_fsdp_model` with adapter_only), and on resuming would load it in place of the whole adapter.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remove the file from the checkpoint just written."""
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / ONE_RANKS_SHARD).unlink(missing_ok=True)
