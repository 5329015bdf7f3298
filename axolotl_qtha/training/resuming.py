"""A run that continues from a checkpoint has its adapter: what the trainer leaves out is loaded, and all is compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner.earlier import holds_earlier
from ..tuner.saving import WEIGHTS, saved_tensors

TRAINED = "default"  # the adapter that trainers train; saved in the folder itself, others in one of their name below it


def load_the_trained(trainer: Trainer) -> None:
    """Have the trainer load the trained adapter of a checkpoint in which another one lies beside it.

    There transformers loads those in the folders below alone: of GRPO with a `beta` the frozen reference. The trained adapter
    would begin anew, while the optimiser and the count of steps go on.
    """
    load = trainer._load_from_checkpoint

    def load_all(resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load(resume_from_checkpoint, model)
        folder, into = Path(resume_from_checkpoint), cast(PeftModel, trainer.model if model is None else model)
        if any(folder.glob(f"*/{WEIGHTS}")) and (folder / WEIGHTS).is_file():
            into.load_adapter(str(folder), TRAINED, is_trainable=True)

    trainer._load_from_checkpoint = load_all  # type: ignore[method-assign]


class CompareWithCheckpoint(TrainerCallback):
    """Stops a run whose adapters are not those of the checkpoint that it continues from."""

    def __init__(self, folder: Path) -> None:
        """Remember the checkpoint's folder."""
        self._folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Compare, after everything was loaded and before the first step.

        Raises:
            ValueError: naming the first tensor that differs, and what works.
        """
        if (name := first_difference(cast(PeftModel, model), self._folder)) is not None:
            raise ValueError(
                f"resume_from_checkpoint: {str(self._folder)!r}: after loading it, the adapter tensor {name} is not the one in "
                "its file: the run would go on from another adapter. What works: to start at step 0 with its adapter, by "
                f"`lora_model_dir: {self._folder}`, or anew, without `resume_from_checkpoint`."
            )


def first_difference(model: PeftModel, folder: Path) -> str | None:
    """Return the name of a tensor that a checkpoint's files hold otherwise than the model, or not at all; None if there is none.

    A tensor of which this rank holds a part (ZeRO-3, FSDP2) is not compared, nor a file of an earlier version, which names
    others; an adapter that the checkpoint does not have has nothing to be compared with.
    """
    for adapter in model.peft_config:
        place = folder if adapter == TRAINED else folder / adapter
        if not (place / WEIGHTS).is_file() or holds_earlier(place):
            continue
        saved = load_file(place / WEIGHTS)
        for name, tensor in _whole(saved_tensors(model, adapter)):
            if name not in saved or not torch.equal(saved[name].to(tensor.dtype), tensor.detach().cpu()):
                return name
    return None


def _whole(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if not hasattr(tensor, "ds_id") and not isinstance(tensor, DTensor):
            yield name, tensor
