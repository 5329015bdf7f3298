"""Kernels compiled for Hopper GPUs, which needs none."""

from pathlib import Path
from types import SimpleNamespace

import pytest


def compiling(monkeypatch, tmp_path):
    """Compile Triton kernels instead of launching them, and yield the list of what was compiled.

    The assembler's report of each goes to stdout.
    """
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("no ptxas")
    from triton.backends.compiler import GPUTarget

    target, kernels, functions = GPUTarget("cuda", 90, 32), [], set()
    hopper = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device=None: 0
    )
    launch = triton.JITFunction.run

    def compile_only(function, *args, grid, warmup, **kwargs):
        functions.add(function)
        kernels.append(launch(function, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(triton.runtime.driver, "_active", hopper)
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    yield kernels
    for function in functions:
        function.device_caches.clear()
