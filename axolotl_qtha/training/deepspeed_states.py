"""DeepSpeed's states of a checkpoint are checked before DeepSpeed reads them, for it runs whatever code is pickled in them.

DeepSpeed reads with `torch.load(weights_only=False)`, from the folder that the file `latest` names. A checkpoint may come from a
stranger: nothing of it is followed, read or deleted before it is known to hold tensors, plain values and the few classes that
DeepSpeed itself writes.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

UNIVERSAL = "_universal"  # how the folder of converted states ends
STEP = r"global_step\d{1,20}"
# The file that names a folder of states, and what may stand in it.
NAMED_BY = {"latest": STEP, "latest_universal": f"{STEP}{UNIVERSAL}"}
# What healthy states hold beside tensors and plain values: of ZeRO-1, 2 and 3, in 16 and 32 bits, offloaded or not. None of these
# does anything as it is unpickled.
CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
OPTIMISERS = "torchao.optim"  # its 8-bit, 4-bit and float8 states are classes, which PyTorch is told of once it is imported
NAMES_IN = ("param_shapes", "param_slice_mappings")  # parameters are named here, and the conversion makes a folder for each name


def refuse_unsafe(folder: Path) -> None:
    """Refuse a checkpoint whose DeepSpeed states would run code, or lead out of its folder; one without any passes.

    Args:
        folder: the checkpoint.

    Raises:
        ValueError: naming `resume_from_checkpoint`, the file, what is in it, and what works.
    """
    for marker in NAMED_BY:
        if (folder / marker).is_symlink():
            raise refused(folder, marker, "is a symbolic link")
        if (folder / marker).is_file():
            states = folder / state_name(folder, marker)
            if not states.is_dir() or states.is_symlink():
                raise refused(folder, marker, f"names {states.name}, which is no folder of the checkpoint's own")
            for path in sorted(states.rglob("*")):
                if path.is_symlink():
                    raise refused(folder, path, "is a symbolic link")
                if path.suffix == ".pt":
                    _check(folder, path)
    for path in folder.glob(f"global_step*{UNIVERSAL}"):  # a conversion would write there
        if path.is_symlink():
            raise refused(folder, path, "is a symbolic link")


def state_name(folder: Path, marker: str = "latest") -> str:
    """Return the name of the folder of states that a checkpoint's file `latest` or `latest_universal` names.

    Raises:
        ValueError: if it is no name that DeepSpeed gives.
    """
    with (folder / marker).open(errors="replace") as file:
        text = file.read(200)  # of more than that none is a name
    name = text.removesuffix("\n")  # as an editor leaves it; DeepSpeed writes none
    if not re.fullmatch(NAMED_BY[marker], name, re.ASCII):
        wanted = "global_step" + "..." + (UNIVERSAL if marker == "latest_universal" else "")
        raise refused(folder, marker, f"names {text[:60]!r}, which is not {wanted!r} with the number of a step")
    return name


def refused(folder: Path, path: Path | str, why: str) -> ValueError:
    """Return the error for a file of a checkpoint that is not read.

    Args:
        folder: the checkpoint.
        path: the file, or its name within.
        why: what is wrong with it.
    """
    inside = path.relative_to(folder) if isinstance(path, Path) else path
    return ValueError(
        f"resume_from_checkpoint: {str(folder)!r}: {str(inside)!r} {why}. It is not read: a checkpoint that was made so can run "
        "any code, or reach other files. What works: a checkpoint that a training of your own wrote, as files and no links "
        f"(`cp -rL`), or `lora_model_dir: {folder}` to start at step 0 with its adapter, which reads the safetensors file alone."
    )


def unknown_classes(path: Path, known: Iterable[str] = ()) -> list[str]:
    """Return the names of classes and functions in a file of torch.save's that are neither PyTorch's harmless ones nor known.

    Nothing of the file is run: its instructions are only looked through.

    Args:
        path: the file.
        known: names of further harmless ones, with their modules.

    Raises:
        ValueError: if it is no such file, or cannot be looked through.
    """
    try:
        found = set(get_unsafe_globals_in_checkpoint(path)) - set(known)
        if any(name.startswith(f"{OPTIMISERS}.") for name in found):
            importlib.import_module(OPTIMISERS)
            found = set(get_unsafe_globals_in_checkpoint(path)) - set(known)
    except Exception as error:  # of many kinds, where someone wrote the file by hand
        raise ValueError(f"cannot be looked through ({type(error).__name__})") from error
    return sorted(found)


def shown(names: Iterable[str]) -> str:
    """Return names from a file that a stranger may have written, for one line of a message."""
    return ", ".join(repr(name[:80])[1:-1] for name in list(names)[:3])


def _check(folder: Path, path: Path) -> None:
    """Refuse a file of states that is not whole, holds code, or names parameters that lead elsewhere."""
    allowed = [getattr(importlib.import_module(module), name) for module, names in CLASSES.items() for name in names]
    known = [f"{module}.{name}" for module, names in CLASSES.items() for name in names]
    try:
        if unknown := unknown_classes(path, known):
            raise ValueError(f"holds {shown(unknown)}, which DeepSpeed does not write")
        with safe_globals(allowed):  # meta: the tensors themselves are not read
            states = torch.load(path, map_location="meta", mmap=True, weights_only=True)
        if odd := [name for name in _names(states) if not _is_one_folder(name)]:
            raise ValueError(f"names a parameter {shown(odd)!r}, which is a path")
    except ValueError as error:
        raise refused(folder, path, str(error)) from error
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, AttributeError, IndexError, pickle.UnpicklingError) as error:
        raise refused(folder, path, f"cannot be read as tensors and plain values ({type(error).__name__})") from error


def _names(states: Any) -> Iterator[str]:
    """Yield the names that become folders in a conversion."""
    if isinstance(states, dict):
        for key in NAMES_IN:
            yield from _keys(states.get(key))
        yield from _names(states.get("optimizer_state_dict"))


def _keys(value: Any) -> Iterator[str]:
    """Yield every key of dictionaries and lists within each other."""
    inner: Iterable[Any] = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, dict):
        yield from map(str, value)
        inner = value.values()
    for item in inner:
        yield from _keys(item)


def _is_one_folder(name: str) -> bool:
    """Return whether a name, as a part of a path, is a folder right there."""
    return bool(name) and name not in (os.curdir, os.pardir) and not re.search(r"[\\/\0\n]", name)
