"""Results on disk: a JSON file for each run, in the layout of PEFT's `method_comparison`, and a file of its answers."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...version import versions

SCHEMA = 1
STATUS = ("success", "diverged", "failed")
PACKAGES = (
    *("axolotl-qtha", "axolotl", "torch", "peft", "transformers", "accelerate", "datasets", "bitsandbytes", "tensorly"),
    *("qiskit", "qiskit-aer", "qiskit-ibm-runtime", "numpy", "scipy", "rouge-score", "sacrebleu"),
)
ROOT = Path(__file__).parents[3]  # of the project's clone, where it is one
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
        "meta_info": {
            "package_info": {"python": platform.python_version(), **versions(PACKAGES)},
            "source_info": source(ROOT),
            "system_info": _system(),
        },
    }


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result, whole or not at all; numbers that are not finite become null."""
    write_text(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n", path)


def write_lines(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a .jsonl file, a row a line, whole or not at all; numbers that are not finite become null."""
    write_text("".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows), path)


def write_text(text: str, path: Path) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
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
    """Return a figure of a run: `valid loss` at its end, `test loss`, or one of the task's metrics; None if it has none.

    `train loss` is the mean over the last tenth of the steps that were logged, since one batch says little.
    """
    info = result["train_info"]
    if info["status"] != "success":
        return None
    if key == "train loss":
        losses = list(at_steps(result, key).values())
        last = losses[-max(1, len(losses) // 10) :]
        return sum(last) / len(last) if last else None
    if key == "valid loss":
        return next((row[key] for row in reversed(info["metrics"]) if row.get(key) is not None), None)
    value = info.get(key) if key in ("test loss", "train_time", "file_size") else info.get("test", {}).get(key)
    return None if value is None else float(value)


def at_steps(result: dict[str, Any], key: str) -> dict[int, float]:
    """Return a loss over steps."""
    return {row["step"]: row[key] for row in result["train_info"]["metrics"] if row.get(key) is not None}


@lru_cache
def source(root: Path) -> dict[str, Any]:
    """Return the git commit of a clone, and whether files that it has in git were changed since; nothing of what is no clone."""
    if not (root / ".git").exists():  # installed as a package: the repository around it, if any, is another
        return {}
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # a hook's are of another repository
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *line], env=env, capture_output=True, text=True, check=True).stdout.strip()
            for line in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git here, or no commit yet
        return {}
    return {"commit": commit, "dirty": bool(changes)}


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
