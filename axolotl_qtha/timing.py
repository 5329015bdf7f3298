"""Time and memory of a run, measured in the same way everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall-clock seconds of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Return the most memory allocated at one time by a run, beyond what was allocated before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    level = peak = 0
    for _, size in memory:
        level += size
        peak = max(peak, level)
    return peak


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Return the bytes that a forward keeps for its backward, parameters left out."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(storages.values())
