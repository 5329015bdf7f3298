"""Saves that a kill leaves whole: each file is checked as it lies on the disk before it takes the place of the old one."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor

from ..errors import IncompleteAdapter
from ..files.durable import flush, flush_all
from .adapter import QTHAAdapter

SCRATCH = ".saving-"  # folders in which a save was not finished
WEIGHTS = "adapter_model.safetensors"
READY = "complete"  # lies in such a folder once all files of the save do: what is left is to move them


def guard(model: PeftModel) -> None:
    """Have the model's `save_pretrained` write complete adapter folders, or raise `IncompleteAdapter`."""
    model.save_pretrained = partial(_save, model)  # type: ignore[method-assign]  # kept when FSDP2 changes the class


def _save(model: PeftModel, save_directory: str | Path, *args: Any, is_main_process: bool = True, **kwargs: Any) -> None:
    """Run PEFT's `save_pretrained` in a scratch folder inside `save_directory`, check what it wrote, then move it into place.

    Raises:
        IncompleteAdapter: if a tensor is missing, of another shape, or not finite; nothing is replaced then.
    """
    write: Any = partial(type(model).save_pretrained, model)
    if kwargs.get("state_dict") is not None:  # gathered by DeepSpeed or FSDP2, name by name
        shared = _shared_names(model)
        kwargs["state_dict"] = {name: tensor for name, tensor in kwargs["state_dict"].items() if name not in shared}
    if not is_main_process:
        write(str(save_directory), *args, is_main_process=False, **kwargs)
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{SCRATCH}*/{READY}"):  # an older save whose move failed: before this one, not over it
        finish_move(left.parent, folder)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
    try:
        if (card := folder / "README.md").is_file():  # PEFT adds to the one that is there
            shutil.copy2(card, scratch)
        write(str(scratch), *args, **kwargs)
        for adapter in model.peft_config:
            path = scratch / ("" if adapter == "default" else adapter) / WEIGHTS
            if path.is_file():  # not one of `selected_adapters` otherwise
                check(load_file(path), expected(model, adapter), folder)
        _move(scratch, folder)
    except BaseException:
        if not (scratch / READY).exists():  # else the next start finishes it
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def _shared_names(model: PeftModel) -> set[str]:
    """Return the names of tensors that an adapter has from another, which saves them."""
    adapters = [(path, module) for path, module in model.named_modules() if isinstance(module, QTHAAdapter)]
    return {f"{path}.{name}" for path, module in adapters for name in module.shared.owners}


def expected(model: PeftModel, adapter: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the saved adapter holds, by name; modules_to_save included."""
    return {name: _whole_shape(tensor) for name, tensor in saved_tensors(model, adapter).items()}


def saved_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return a model's tensors that a saved adapter holds, by their names in its file; modules_to_save included."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, QTHAAdapter) and path.endswith(f".{adapter}"):
            tensors, path = module.state_names(), path.removesuffix(f".{adapter}")
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter in (kept := getattr(module, "modules_to_save", {})):
            tensors = dict(kept[adapter].named_parameters())
        else:
            continue
        found |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    return found


def _whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape a tensor has when it is not partitioned by ZeRO-3; FSDP2's tensors know it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def check(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Refuse tensors that are not the whole adapter.

    Args:
        tensors: what would be saved, by name.
        shapes: what belongs into the file; further tensors (embeddings that were resized) are let through.
        folder: where it would be saved, for the message.

    Raises:
        IncompleteAdapter: naming the first tensors at fault.
    """
    faults = [f"{name} is missing" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape)) or not tensor.numel():
            faults.append(f"{name} has shape {tuple(tensor.shape)} instead of {shapes.get(name, 'any entries')}")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            faults.append(f"{name} holds NaN or infinite values")
    if faults:
        raise IncompleteAdapter(
            f"{str(folder)!r}: {len(faults)} of {len(shapes)} adapter tensors are not fit to be saved: {'; '.join(faults[:3])}. "
            "Nothing was written; what lay there before is as it was. What works: for NaN, an earlier checkpoint with a smaller "
            "learning_rate or max_grad_norm; for missing or empty tensors, saving on all ranks at once."
        )


def _move(source: Path, target: Path) -> None:
    """Move files into a folder, each at once; if that is interrupted, `finish_move` does the rest."""
    flush_all(source)
    (source / READY).touch()
    flush(source)
    finish_move(source, target)


def finish_move(source: Path, target: Path) -> bool:
    """Bring a save to its end that may have been killed while its files were moved; return whether there were all of them.

    Configuration and weights are two files, and what lies in the folder is of one save only once both were moved.

    Args:
        source: the scratch folder, which is gone when this returns.
        target: where it was to be saved.
    """
    if ready := (source / READY).is_file():
        for file in sorted(path for path in source.rglob("*") if path.is_file() and path != source / READY):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
        flush(target)
    shutil.rmtree(source, ignore_errors=True)
    return ready
