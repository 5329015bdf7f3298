"""Results on disk: a JSON file for each run, in the layout of PEFT's `method_comparison`."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from pathlib import Path
from typing import Any

from ...settings.public_facts import versions

SCHEMA = 1
STATUS = ("success", "diverged", "failed")
PACKAGES = ("axolotl-qtha", "axolotl", "torch", "peft", "transformers", "datasets", "bitsandbytes", "qiskit")
PATHS = re.compile(r"(?<![\w:/.])(?:/[\w.@+~-]+)+/?")


def error_text(error: BaseException) -> str:
    """Return an error in a line or two, without local paths."""
    return PATHS.sub("PATH", f"{type(error).__name__}: {error}")[:500]


def make(cell: dict[str, Any], settings: str, config: dict[str, Any], info: dict[str, Any], created: str) -> dict[str, Any]:
    """Return what a result's file holds.

    Args:
        cell: task, adapter, rank, budget, learning_rate, seed.
        settings: fingerprint of all settings of the run.
        config: Axolotl's keys, without paths.
        info: what `run_cell` returned.
        created: when the run was started (ISO 8601, UTC).
    """
    info = dict(info)
    return {
        "schema_version": SCHEMA,
        "cell": cell,
        "settings": settings,
        "run_info": {
            "created_at": created,
            "total_time": info.pop("total_time", None),
            "experiment_name": f"{cell['adapter']}/{cell['task']}-rank{cell['rank']}",
            "train_config": config,
            "error_msg": info.pop("error_msg", ""),
        },
        "train_info": info,
        "meta_info": {"package_info": versions(PACKAGES), "system_info": _system()},
    }


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result, whole or not at all; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_text(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")
    os.replace(scratch, path)


def read(path: Path) -> dict[str, Any]:
    """Return a result.

    Raises:
        ValueError: if it is damaged, or of another version.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        found = result["schema_version"]
        assert result["train_info"]["status"] in STATUS
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"output_dir: {path} is no result of a suite. What works: move it away, or another output_dir."
        ) from error
    if found != SCHEMA:
        works = "another output_dir, or `--overwrite` to run all again"
        raise ValueError(f"output_dir: {path} is of version {found!r}, this is version {SCHEMA}. What works: {works}.")
    return result


def final(result: dict[str, Any], key: str) -> float | None:
    """Return a figure of a run: `valid loss` at its end, `test loss`, or one of the task's metrics; None if it has none."""
    info = result["train_info"]
    if info["status"] != "success":
        return None
    if key == "valid loss":
        return next((row[key] for row in reversed(info["metrics"]) if row.get(key) is not None), None)
    value = info.get(key) if key in ("test loss", "train_time", "file_size") else info.get("test", {}).get(key)
    return None if value is None else float(value)


def at_steps(result: dict[str, Any], key: str) -> dict[int, float]:
    """Return a loss over steps."""
    return {row["step"]: row[key] for row in result["train_info"]["metrics"] if row.get(key) is not None}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _system() -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count(), "accelerator": name}
