"""Checkpoints of a training run: which are complete, which fit the run, and how another number of ranks reads them."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from axolotl.utils.distributed import get_world_size
from axolotl.utils.logging import get_logger

from ..settings.parallel import deepspeed_settings, zero_stage
from ..tuner.adapter_file import check_adapter_file
from ..tuner.earlier import holds_earlier
from ..tuner.peft_type import QTHA
from ..tuner.saving import SCRATCH
from . import deepspeed_states, manifest, unpickling
from .deepspeed_states import UNIVERSAL
from .ranks import once

INCOMPLETE = "incomplete-"  # how the names of checkpoints begin that were set aside
# Accelerate 1.13 leaves it in FSDP2's checkpoints (`save_fsdp_model` with adapter_only): one rank's part of the adapter, which on
# resuming it would load in place of the whole one.
ONE_RANKS_SHARD = "pytorch_model_fsdp.bin"
LOG = get_logger(__name__)

KINDS = {"deepspeed": "`deepspeed:`", "fsdp": "`fsdp_version: 2`", "plain": "neither `deepspeed:` nor `fsdp_config:`"}


def prepare(folder: Path, output_dir: str | Path, deepspeed: Any, fsdp: bool, was_read: bool = False) -> dict[str, Any] | None:
    """Check the checkpoint that a run continues from, and have it ready for this number of ranks; to be called on every rank.

    Args:
        folder: the checkpoint.
        output_dir: of the run.
        deepspeed: value of `deepspeed:`.
        fsdp: whether FSDP2 shares the run.
        was_read: whether all its files were read and compared already, as `set_aside_incomplete` does with the latest.

    Returns:
        The settings DeepSpeed needs instead of its own to read a checkpoint that was converted, else None.

    Raises:
        ValueError: if it is not complete, of another kind, or would run code.
    """
    settings = deepspeed_settings(deepspeed)
    ours = "deepspeed" if settings else "fsdp" if fsdp else "plain"
    once(lambda: check(folder, output_dir, ours, zero_stage(settings), was_read))
    once(lambda: unpickling.refuse_unsafe(folder, deepspeed=ours == "deepspeed"))
    if ours != "deepspeed" or ranks_of(folder) in (None, get_world_size()):
        return None
    LOG.info(f"{folder} was written by {ranks_of(folder)} ranks, there are {get_world_size()} now: converting.")
    once(lambda: convert(folder))  # several nodes have one output_dir
    return for_another_number_of_ranks(settings)


def refuse_others(output_dir: str | Path) -> None:
    """Refuse to write over an adapter of another method, or to take its checkpoints for broken ones of ours.

    Raises:
        ValueError: naming the folder and the method.
    """
    for folder in (Path(output_dir), *of_run(output_dir)):
        try:
            method = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if method != QTHA.value:
            raise ValueError(
                f"output_dir: {str(output_dir)!r} holds the adapter of a {method} training ({folder / 'adapter_config.json'}), "
                f"which would be overwritten. What works: another folder, `output_dir: {str(output_dir).rstrip('/')}-qtha`."
            )


def of_run(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, the latest last, complete or not."""
    found = (path for path in Path(output_dir).glob("checkpoint-*") if path.name.rsplit("-", 1)[-1].isdigit())
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Return after which step a checkpoint was written, by its name."""
    return int(folder.name.rsplit("-", 1)[-1])


def fault(folder: Path, whole: bool = False) -> str | None:
    """Return why a checkpoint is not complete, or None.

    Its manifest says so. One without (of an earlier version, or of LoRA) is judged by its files: transformers writes the adapter,
    the optimiser's states and the random generators, and `trainer_state.json` last; a run that was killed in between leaves a
    folder that has the name of a checkpoint.

    Args:
        folder: the checkpoint.
        whole: read all files, and compare them with what was written.
    """
    if why := manifest.fault(folder, whole):
        return why
    if any(folder.glob(f"**/{SCRATCH}*")):
        return "its adapter was being saved"
    for name in ("trainer_state.json", "adapter_config.json"):
        try:
            json.loads((folder / name).read_text())
        except (OSError, ValueError):
            return f"{name} is missing or cut off"
    try:
        check_adapter_file(folder)
    except ValueError as error:
        return str(error)
    if not (folder / "adapter_model.safetensors").is_file():
        return "adapter_model.safetensors is missing"
    for path in folder.rglob("*"):  # PyTorch's files are archives, with the table of contents at the end
        inside = path.relative_to(folder)
        converted = inside.parts[0].endswith(UNIVERSAL)  # made anew where it was not finished
        if path.suffix in (".pt", ".pth", ".bin") and not converted and not zipfile.is_zipfile(path):
            return f"{inside} is cut off"
    if (folder / ONE_RANKS_SHARD).exists():
        return f"{ONE_RANKS_SHARD} was not yet taken out"
    return _missing_rank(folder)


def _missing_rank(folder: Path) -> str | None:
    """Return which rank's file is missing, as far as the numbers of those present tell."""
    generators = {int(path.stem.rsplit("_", 1)[-1]) for path in folder.glob("rng_state_*.pth")}
    states = [int(found[1]) for path in _optimiser_states(folder) if (found := re.search(r"zero_pp_rank_(\d+)_", path.name))]
    ranks = max([*generators, *states], default=0) + 1
    if generators or ranks > 1:  # one rank alone has no number
        ranks = max(ranks, 2)
        if missing := sorted(set(range(ranks)) - generators):
            return f"rng_state_{missing[0]}.pth is missing"
    if states and (missing := sorted(set(range(ranks)) - set(states))):
        return f"the optimiser's states of rank {missing[0]} are missing"
    if kind(folder) == "deepspeed" and not (folder / "latest").is_file():
        return "latest is missing"
    return None


def _optimiser_states(folder: Path) -> list[Path]:
    return list(folder.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))


def ranks_of(folder: Path) -> int | None:
    """Return how many ranks wrote a DeepSpeed checkpoint; None for any other."""
    return len(_optimiser_states(folder)) or None


def kind(folder: Path) -> str | None:
    """Return what wrote a checkpoint's optimiser states, a key of `KINDS`; None if there are none."""
    if any(folder.glob("global_step*")):
        return "deepspeed"
    if (folder / "optimizer.bin").is_file():
        return "fsdp"
    return "plain" if (folder / "optimizer.pt").is_file() else None


def set_aside_incomplete(output_dir: str | Path) -> list[tuple[Path, str]]:
    """Rename incomplete checkpoints, so that none is taken for the latest; return the new names and what is wrong with each."""
    moved, found = [], False
    for folder in reversed(of_run(output_dir)):
        if why := fault(folder, whole=not found):  # the latest, which the run will go on from, is read
            moved.append((set_aside(folder), why))
        found = found or why is None
    return moved


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint, so that nothing takes it for one; return the new name."""
    place, count = folder.with_name(f"{INCOMPLETE}{folder.name}"), 1
    while place.exists():
        count += 1
        place = folder.with_name(f"{INCOMPLETE}{count}-{folder.name}")
    folder.rename(place)
    return place


def check(folder: Path, output_dir: str | Path, ours: str, stage: int, was_read: bool = False) -> None:
    """Refuse to continue from a checkpoint that is not complete, or was written by another way to share a run.

    Args:
        folder: what `resume_from_checkpoint` names.
        output_dir: where other checkpoints of the run are.
        ours: how this run is shared, a key of `KINDS`.
        stage: this run's ZeRO stage.
        was_read: as for `prepare`.

    Raises:
        ValueError: naming the fault, and what works.
    """
    key = f"resume_from_checkpoint: {str(folder)!r}"
    if not folder.is_dir():
        raise ValueError(f"{key} is no folder. What works: {_others(output_dir, folder)}.")
    if not (folder / "trainer_state.json").is_file() and not re.fullmatch(r"checkpoint-\d+", folder.name):
        raise ValueError(
            f"{key} is no checkpoint: it has no trainer_state.json. What works: {_others(output_dir, folder)}, or "
            "`lora_model_dir:` to train an adapter on from step 0."
        )
    if why := fault(folder, whole=not was_read):
        raise ValueError(f"{key} is not complete: {why}. What works: {_others(output_dir, folder)}.")
    theirs = kind(folder)
    if theirs is not None and holds_earlier(folder):
        raise ValueError(
            f"{key} was written by an earlier version, with a tensor for each core and matrix; its optimiser's states do not fit "
            f"today's. What works: `lora_model_dir: {folder}` to start at step 0 with its adapter."
        )
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"{key} was written with {KINDS[theirs]}, the YAML has {KINDS[ours]}: the optimiser's states would be left out. What "
            f"works: {KINDS[theirs]}, or `lora_model_dir: {folder}` to start at step 0 with its adapter."
        )
    sharded = any(folder.glob("global_step*/zero_pp_rank_*_model_states.pt"))
    if theirs == "deepspeed" and sharded != (stage == 3):
        written = "ZeRO-3" if sharded else "ZeRO-1 or 2"
        raise ValueError(
            f"{key} was written with {written}, `deepspeed:` names stage {stage}: DeepSpeed cannot turn one into the other. What "
            f"works: {written}, or `lora_model_dir: {folder}` to start at step 0 with its adapter."
        )


def _others(output_dir: str | Path, folder: Path) -> str:
    complete = [path for path in of_run(output_dir) if path != folder and fault(path) is None]
    return f"the last complete one, {str(complete[-1])!r}" if complete else "to start anew, as no checkpoint here is complete"


def for_another_number_of_ranks(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with which DeepSpeed reads a checkpoint that `convert` has converted."""
    return {**deepspeed, "checkpoint": {**(deepspeed.get("checkpoint") or {}), "load_universal": True}}


def convert(folder: Path) -> None:
    """Write DeepSpeed's universal form beside the states of each rank, once: one file a parameter, for any number of ranks.

    Raises:
        ValueError: if the states would run code, or lead out of the checkpoint.
        OSError: if what a killed conversion left cannot be removed: DeepSpeed would read it as well.
    """
    deepspeed_states.refuse_unsafe(folder)
    marker = folder / "latest_universal"
    if marker.is_file():
        return
    from deepspeed.checkpoint.ds_to_universal import main

    step = deepspeed_states.state_name(folder)
    output = folder / f"{step}{UNIVERSAL}"
    if output.exists():  # of a conversion that was killed
        shutil.rmtree(output)
    main(
        Namespace(
            input_folder=str(folder / step),
            output_folder=str(output),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
