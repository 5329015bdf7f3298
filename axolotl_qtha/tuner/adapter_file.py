"""The file of a saved adapter, before it is read."""

from __future__ import annotations

from pathlib import Path


def check_adapter_file(folder: Path) -> None:
    """Refuse a truncated, corrupt or foreign `adapter_model.safetensors` in `folder`; no file at all passes.

    Raises:
        ValueError: if the file's header cannot be read or it holds no QTHA tensors.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is corrupt or truncated ({error}). What works: an adapter folder copied whole, or an earlier "
            "checkpoint-* folder of the run."
        ) from error
    if not any("qtha_adapter" in name for name in names):
        raise ValueError(
            f"{path} holds no QTHA adapter: its tensors are {names[:3]}... What works: a folder written by `adapter: qtha`."
        )
