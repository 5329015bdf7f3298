"""Triton kernels without a GPU: run in its interpreter, or compiled for Hopper."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


def interpreted(program, *arguments):
    """Run a program in Triton's interpreter and return what it printed.

    The interpreter is chosen before Triton is imported, so the program has a process of its own.
    """
    pytest.importorskip("triton")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


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
