"""Adapter files of the time before the flat tensors of `table.py`: a tensor for each core and matrix."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .table import Part

MARK = ".w_c"  # ends the name of a tensor that every adapter of that time has, and none of today


def is_earlier(names: Iterable[str]) -> bool:
    """Return whether these are the names of such a file's tensors."""
    return any(name.endswith(MARK) for name in names)


def holds_earlier(folder: Path) -> bool:
    """Return whether a folder's adapter file is of that time."""
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return is_earlier(file.keys())


def converted(tensors: dict[str, Tensor], table: dict[str, Part], name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors as they are today, from those of that time, one behind the other.

    Args:
        tensors: by the names of the parts, flat.
        table: the parts.
        name: of the adapter, in errors.

    Raises:
        ValueError: if some are missing, have no place, or another size.
    """
    fits = "What works: the complete adapter folder, with the `qtha:` settings it was trained with."
    if tensors.keys() != table.keys():
        missing, unknown = sorted(table.keys() - tensors.keys()), sorted(tensors.keys() - table.keys())
        raise ValueError(f"adapter {name} of an earlier version does not fit: missing {missing}, unknown {unknown}. {fits}")
    for key, part in table.items():
        if tensors[key].shape != (part.size,):
            shapes = f"has shape {tuple(tensors[key].shape)}, this model needs {(part.size,)}, flat for {part.shape}"
            raise ValueError(f"adapter tensor {name}.{key} of an earlier version {shapes}. {fits}")
    wanted = dict.fromkeys(part.tensor for part in table.values())
    return {tensor: torch.cat([tensors[key] for key, part in table.items() if part.tensor == tensor]) for tensor in wanted}
