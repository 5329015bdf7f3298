"""Saves of a run that a kill leaves whole: checkpoints with a manifest, the older one of the same name kept until then.

What a process that was killed left behind has names that begin with a dot, and goes, or comes back, at the next start (`tidy`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from axolotl.utils.distributed import barrier
from axolotl.utils.logging import get_logger
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from ..files.durable import TRYING
from ..tuner.saving import SCRATCH, finish_move
from . import manifest
from .checkpoints import INCOMPLETE, ONE_RANKS_SHARD, fault, of_run, set_aside, step_of

REPLACED, GOING = ".replaced-", ".going-"  # a checkpoint until its successor is complete; folders that are being deleted
# Of the trainer's settings, those that change what is trained.
TOLD = (
    *("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_grad_norm", "weight_decay", "lr_scheduler_type", "warmup_steps", "seed", "data_seed", "optim"),
)
LOG = get_logger(__name__)


def guard_checkpoints(trainer: Trainer) -> None:
    """Have the trainer's checkpoints be complete when they say so, and the older ones go only then."""
    write = trainer._save_checkpoint

    def save(model: Any, trial: Any, **kwargs: Any) -> None:
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        main, step, settings = trainer.is_world_process_zero(), trainer.state.global_step, settings_of(trainer.args)
        with _replacing(folder) if main else nullcontext():
            if main:
                manifest.begin(folder, step, settings)
            barrier()  # no rank writes into the folder that is moved away
            with _afterwards(trainer) as push:
                write(model, trial, **kwargs)
            barrier()  # until every rank has written its part
            if main:
                (folder / ONE_RANKS_SHARD).unlink(missing_ok=True)
                manifest.finish(folder, step, settings)
        if push:
            trainer._push_from_checkpoint(str(folder))
        if main and trainer.args.should_save:
            rotate(folder, trainer.args.save_total_limit, trainer.state.best_model_checkpoint)

    trainer._save_checkpoint = save  # type: ignore[method-assign]


def settings_of(arguments: TrainingArguments) -> dict[str, Any]:
    """Return the settings of a run that its manifests tell."""
    found = {name: getattr(arguments, name) for name in TOLD} | {"world_size": arguments.world_size}
    return {name: getattr(value, "value", value) for name, value in found.items()}


def changed_settings(folder: Path, arguments: TrainingArguments) -> str | None:
    """Return which settings a run has otherwise than the one that wrote the checkpoint it continues from; None if none."""
    written = manifest.read(folder)
    here = settings_of(arguments)
    told = [
        f"{name} {written.settings[name]!r} -> {value!r}"
        for name, value in here.items()
        if written is not None and name in written.settings and written.settings[name] != value
    ]
    return ", ".join(told) or None


@contextmanager
def _replacing(folder: Path) -> Iterator[None]:
    """Move a checkpoint of the same name away until its successor is complete; have it come back if that is not saved."""
    old = folder.with_name(REPLACED + folder.name)
    if folder.exists():
        folder.rename(old)
    try:
        yield
    except BaseException:
        remove(folder)
        if old.exists():
            old.rename(folder)
        raise
    remove(old)


@contextmanager
def _afterwards(trainer: Trainer) -> Iterator[list[str]]:
    """Have the trainer neither delete nor push checkpoints meanwhile; the list is not empty if it wanted to push."""
    asked: list[str] = []
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    trainer._push_from_checkpoint = asked.append  # type: ignore[method-assign, assignment]
    try:
        yield asked
    finally:
        trainer.args.save_total_limit = limit
        del trainer._push_from_checkpoint


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, but neither the newest nor the best; first what was set aside.

    A checkpoint that was set aside counts, and goes anyway once there is a complete one of its step or a later one.
    """
    output_dir = newest.parent
    _drop_set_aside(output_dir, newest, len(of_run(output_dir)), limit)
    if not limit or limit < 1:
        return
    others = [path for path in of_run(output_dir) if path != newest]
    latest = max((path.stat().st_mtime_ns for path in others), default=0)
    if latest >= newest.stat().st_mtime_ns:
        LOG.warning(f"{newest} is older than other checkpoints by the clock, which went backwards: it is kept as the newest.")
        os.utime(newest, ns=(latest + 10**9, latest + 10**9))
    found = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    kept = {newest, *([Path(best)] if best else [])}
    for folder in [path for path in found if path not in kept][: max(len(found) - max(limit, len(kept)), 0)]:
        remove(folder)


def remove(folder: Path) -> None:
    """Delete a folder; one that is half deleted when the process is killed has no name that anything looks for."""
    if folder.exists():
        going = folder.with_name(f"{GOING}{folder.name}")  # no new folder, for which a full disk may have no room
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def tidy(output_dir: Path, limit: int | None) -> list[str]:
    """Bring what processes that were killed left in an `output_dir` to its end; to be called by its owner, before anything else.

    Args:
        output_dir: the folder.
        limit: `save_total_limit`.

    Returns:
        What was done, in sentences.
    """
    told = []
    for folder in output_dir.glob(f"{TRYING}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in output_dir.glob(f"{GOING}*"):
        shutil.rmtree(folder, ignore_errors=True)
        told.append(f"{folder}, half deleted when a process was killed, is deleted")
    for scratch in output_dir.glob(f"{SCRATCH}*"):
        ready = finish_move(scratch, output_dir)
        told.append(f"{scratch}, a save that was killed, is {'finished' if ready else 'deleted: it was not complete'}")
    for old in output_dir.glob(f"{REPLACED}checkpoint-*"):
        folder = output_dir / old.name.removeprefix(REPLACED)
        if folder.exists() and fault(folder) is None:
            remove(old)
            told.append(f"{old} is deleted: what replaces it is complete")
            continue
        remove(folder)
        old.rename(folder)
        told.append(f"{folder} is back as it was before a save that was killed")
    for folder in of_run(output_dir):
        if (why := manifest.fault(folder)) == manifest.WRITING:
            told.append(f"{set_aside(folder)} is not complete ({why}): a run was stopped while it was written. It is not used")
    complete = [path for path in of_run(output_dir) if fault(path) is None]
    return told + _drop_set_aside(output_dir, complete[-1] if complete else None, len(complete), limit)


def _drop_set_aside(output_dir: Path, latest: Path | None, count: int, limit: int | None) -> list[str]:
    """Delete checkpoints that were set aside: those that a complete one has passed, and the oldest beyond `save_total_limit`.

    Args:
        output_dir: of the run.
        latest: the last complete checkpoint.
        count: checkpoints that are not set aside.
        limit: `save_total_limit`.

    Returns:
        What was deleted and why, in sentences.
    """
    told, aside = [], sorted(output_dir.glob(f"{INCOMPLETE}*checkpoint-*"), key=step_of)
    for number, folder in enumerate(aside):
        passed = latest is not None and step_of(folder) <= step_of(latest)
        if passed or (limit and limit > 0 and count + len(aside) - number > limit):
            remove(folder)
            told.append(
                f"{folder} is deleted: {f'{latest.name} is complete' if latest and passed else f'save_total_limit: {limit}'}"
            )
    return told
