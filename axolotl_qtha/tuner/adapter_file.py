"""The file of a saved adapter, before it is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

PREFIX = "base_model.model."
FLOATING = ("F64", "F32", "F16", "BF16")  # as safetensors names what a training writes; others would be cast, and mean nothing


def check_adapter_file(folder: Path) -> frozenset[str] | None:
    """Refuse a truncated, corrupt or foreign `adapter_model.safetensors` in `folder`; return its tensors' names, None without it.

    Raises:
        ValueError: if the file's header cannot be read, it holds no QTHA tensors, or some that are not floating-point.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is corrupt or truncated ({error}). What works: an adapter folder copied whole, or an earlier "
            "checkpoint-* folder of the run."
        ) from error
    if not any("qtha_adapter" in name for name in names):
        raise ValueError(
            f"{path} holds no QTHA adapter: its tensors are {names[:3]}... What works: a folder written by `adapter: qtha`."
        )
    if strangers := [name for name in names if not name.startswith(PREFIX)]:
        raise ValueError(
            f"{path}: {len(strangers)} tensors have no place in an adapter: {strangers[:3]}. What works: a folder written by "
            "`adapter: qtha`."
        )
    for name, dtype in dtypes.items():
        if dtype not in FLOATING:
            raise ValueError(
                f"{path}: {name} is stored as {dtype}, and no training writes that. What works: tensors in {', '.join(FLOATING)}."
            )
    return frozenset(names)


def check_whole_modules(stored: Iterable[str], model: nn.Module, modules: Iterable[str]) -> None:
    """Refuse an adapter's file in which a module is missing that was trained in full.

    Args:
        stored: names of the file's tensors.
        model: the base.
        modules: `modules_to_save`.

    Raises:
        ValueError: naming the first tensor.
    """
    there = set(stored)
    ends = tuple(modules)  # as PEFT compares them
    for path, module in model.named_modules() if ends else ():
        if not path.endswith(ends):
            continue
        for key in module.state_dict():
            names = (f"{PREFIX}{path}.{key}", f"{PREFIX}{path}.modules_to_save.{key}")
            if there.isdisjoint(names):
                raise ValueError(
                    f"modules_to_save: {path} was trained with the adapter, whose file holds no {names[0]}. What works: the "
                    "complete adapter folder."
                )
