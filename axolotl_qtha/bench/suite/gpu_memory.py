"""How many runs at a time the memory of a GPU has room for."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

GIB = 2**30
CONTEXT = GIB  # bytes of a process that uses CUDA, before and beside its tensors
CACHED = 1.2  # what PyTorch holds of the GPU's memory, as a multiple of what is in use: blocks do not fit without gaps
FULL = ("out of memory", "ALLOC_FAILED")  # in the errors of PyTorch, CUDA and its libraries
QUERY = "import torch; print('free', *torch.cuda.mem_get_info())"


def free() -> int | None:
    """Return the free bytes of the GPU that runs use; None where it does not say.

    Another process is asked: one that has started CUDA keeps memory on the GPU.
    """
    try:
        told = subprocess.run([sys.executable, "-c", QUERY], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        return next(int(line.split()[1]) for line in told.stdout.splitlines() if line.startswith("free "))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        return None


def need(runs: Iterable[dict[str, Any]]) -> int | None:
    """Return the bytes that a run needs: of the results that there are, the largest; None if none was measured on a GPU."""
    infos = [run["train_info"] for run in runs]
    most = max((info.get("accelerator_memory_max") or 0 for info in infos if info["status"] != "failed"), default=0)
    return math.ceil(CACHED * most) + CONTEXT if most else None


def fitting(jobs: int, free: int, need: int) -> int:
    """Return how many runs at a time there is room for, at most `jobs`, and one in any case: its own error is the clearest.

    Args:
        jobs: that are wanted.
        free: bytes on the GPU while nothing runs.
        need: bytes of a run.
    """
    return max(1, min(jobs, free // need))


def words(jobs: int, free: int, need: int) -> str:
    """Return in words what `fitting` returns."""
    return (
        f"{fitting(jobs, free, need)} of {jobs} jobs at a time: a run needs {need / GIB:.1f} GiB, "
        f"{free / GIB:.1f} GiB of the GPU are free."
    )


def was_full(error: str) -> bool:
    """Return whether the error of a run says that the GPU's memory was full."""
    return any(word in error for word in FULL)
