"""What a run launches on a GPU: the kernels themselves where there is one, and anywhere a stand-in, the operators of PyTorch.

A small layer is paid for by the launch: a GPU waits for Python and the driver, not for the arithmetic. The stand-in needs no GPU.
It takes an operator for one launch, which is near what PyTorch does; what kernels a library launches for one matrix product, or
what a Triton kernel called without an operator of its own adds, only the profiler sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

OURS = "axolotl_qtha::"
# What our custom operators launch on a GPU, by their full names; those of the circuit with what makes the tables of its angles.
CUSTOM = {
    f"{OURS}circuit": 10,
    f"{OURS}circuit_grad": 14,
    f"{OURS}fold": 1,
    f"{OURS}fold_grad": 2,
    f"{OURS}join": 1,
    f"{OURS}join_grad": 2,
    f"{OURS}branch": 2,
    f"{OURS}branch_grad": 3,
    f"{OURS}fuse": 1,
    f"{OURS}fuse_grad": 3,
}
# New memory, nothing written; and a view whose schema does not say so.
FREE = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")}


@dataclass(frozen=True)
class Launches:
    """What one run launches, or a share of it."""

    operators: float  # the stand-in, our custom operators for as many as `CUSTOM` says
    custom_as_one: float  # the stand-in, our custom operators for one
    kernels: float | None  # seen by the profiler; None without a GPU, or where the profiler may not look
    gpu_seconds: float | None  # the sum of their times on the GPU; None as above

    def beyond(self, base: Launches, layers: int) -> Launches:
        """Return what each of so many adapted layers adds to a base."""

        def share(own: float | None, bases: float | None) -> float | None:
            return None if own is None or bases is None else (own - bases) / layers

        return Launches(
            (self.operators - base.operators) / layers,
            (self.custom_as_one - base.custom_as_one) / layers,
            share(self.kernels, base.kernels),
            share(self.gpu_seconds, base.gpu_seconds),
        )


class Counter(TorchDispatchMode):
    """Counts the operators, while it is entered, that would launch a kernel: all but views, new memory and metadata.

    Autograd's backward is seen too; what happens inside a custom operator is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.custom_as_one = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator, and run it."""
        count = launches_of(func)
        self.operators += count
        self.custom_as_one += min(count, 1)
        return func(*args, **(kwargs or {}))


def launches_of(operator: torch._ops.OpOverload) -> int:
    """Return how many launches the stand-in takes an operator for.

    Raises:
        KeyError: for a custom operator of ours that `CUSTOM` does not have.
    """
    schema = operator._schema
    if schema.name.startswith(OURS):
        if schema.name not in CUSTOM:
            raise KeyError(f"{schema.name}: say in `CUSTOM` of axolotl_qtha/bench/launches.py how many kernels it launches")
        return CUSTOM[schema.name]
    written = any(argument.is_write for argument in schema.arguments)
    made = any("Tensor" in str(result.type) for result in schema.returns)  # a size or a number is copied, not computed
    free = operator.is_view or torch.Tag.inplace_view in operator.tags or schema.name in FREE
    return int((written or made) and not free)


def measured(run: Callable[[], object], device: torch.device) -> Launches:
    """Return what a run launches: it runs once, on CUDA twice, and should have run before, so that nothing is left to compile."""
    with Counter() as counter:
        run()
    kernels = _kernels(run) if device.type == "cuda" else []
    return Launches(
        counter.operators,
        counter.custom_as_one,
        len(kernels) if kernels else None,
        sum(kernels) if kernels else None,
    )


def _kernels(run: Callable[[], object]) -> list[float]:
    """Return the seconds on the GPU of each kernel that a run launches; copies and memory set to zero are no kernels."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        return kernel_seconds(json.loads(trace.read_text()))


def kernel_seconds(trace: dict[str, Any]) -> list[float]:
    """Return the seconds of the kernels in a profiler's trace (the format of Chrome), whose times are microseconds."""
    return [1e-6 * event["dur"] for event in trace["traceEvents"] if event.get("cat") == "kernel"]


def headings(device: torch.device) -> tuple[str, str]:
    """Return the headings of the two columns that `cells` fills."""
    return ("kernels", "GPU ms") if device.type == "cuda" else ("launches (stand-in)", "ours as 1")


def cells(launches: Launches, device: torch.device) -> tuple[str, str]:
    """Return the two cells of a table's row: what was seen on CUDA, else the stand-in."""
    if device.type != "cuda":
        return f"{launches.operators:.1f}", f"{launches.custom_as_one:.1f}"
    if launches.kernels is None or launches.gpu_seconds is None:
        return "not seen", "not seen"
    return f"{launches.kernels:.1f}", f"{1e3 * launches.gpu_seconds:.3f}"


def legend(device: torch.device) -> str:
    """Return the line that says below a table what its two columns are."""
    if device.type == "cuda":
        return "`kernels` and `GPU ms`: launched, and the sum of their times on the GPU, as torch.profiler saw them."
    return (
        "`launches (stand-in)`: no GPU, so operators are counted that would launch; our custom operators for as many kernels as "
        "they launch on a GPU, and in `ours as 1` for one."
    )
