"""A resume runs no code from a checkpoint: whatever it would unpickle is looked through before.

transformers and Accelerate read optimiser, schedule, random generators and scaler with `torch.load(weights_only=True)`, which
refuses code by itself, but names neither the key of the YAML nor what works. Two things do run code: DeepSpeed's states
(`deepspeed_states`), and the sharded form of FSDP, whose `.metadata` is a plain pickle.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from . import deepspeed_states
from .deepspeed_states import refused, shown, unknown_classes

# What a resume reads of torch.save's files beside DeepSpeed's states; `training_args.bin` is none of them.
READ = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("pytorch_model*.bin", "adapter_model.bin", "*/adapter_model.bin"),
)
SHARDED = "*/.metadata"  # of torch.distributed.checkpoint
# The state of NumPy's random generator is an array; all of these only make one.
NUMPY = (
    *("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"),
    *("numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType"),
)


def refuse_unsafe(folder: Path, deepspeed: bool) -> None:
    """Refuse a checkpoint that would run code when a training goes on from it; also the best one that it names, read at the end.

    Args:
        folder: the checkpoint.
        deepspeed: whether DeepSpeed shares the run: it reads its states in both.

    Raises:
        ValueError: naming `resume_from_checkpoint`, the file, what is in it, and what works.
    """
    for place in _places(folder):
        for path in sorted(path for pattern in READ for path in place.glob(pattern)):
            try:
                unknown = unknown_classes(path, NUMPY)
            except ValueError as error:
                raise refused(place, path, str(error)) from error
            if unknown:
                raise refused(place, path, f"holds {shown(unknown)}, which no training writes there")
        for path in sorted(place.glob(SHARDED)):
            raise refused(place, path, "belongs to states that FSDP wrote as shards; `adapter: qtha` has it write whole ones")
        if deepspeed:
            deepspeed_states.refuse_unsafe(place)


def _places(folder: Path) -> list[Path]:
    """Return the checkpoint, and the best one so far, where its `trainer_state.json` names another that exists.

    With `load_best_model_at_end` that one is read when the training ends, wherever it is.
    """
    try:
        best = json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        best = None
    if not isinstance(best, str) or not os.path.isdir(best) or os.path.samefile(best, folder):
        return [folder]
    return [folder, Path(best)]
