"""The exact engine compiled for this CPU: `circuit.cpp`, built once with the system's C++ compiler and called through ctypes.

Without a compiler the same is computed in PyTorch, some ten times slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .ansatz import Ansatz
from .program import Program, program, tables

SOURCE = Path(__file__).with_name("circuit.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
LANES = 16  # tokens a block of the source holds at most
CHUNKS = 32  # parts the tokens are split into: sums over tokens do not depend on the number of threads

LOG = logging.getLogger(__name__)


def runs(z: Tensor) -> bool:
    """Return whether the compiled engine takes this input."""
    return z.device.type == "cpu" and library() is not None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled engine, building it if need be; None (said once in the log) if it cannot be built here."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        LOG.warning("no C++ compiler (c++, g++, clang++): circuits run in PyTorch, some ten times slower on a CPU.")
        return None
    reason = ""
    for target in (("-march=native", "-fopenmp"), ("-march=native",), ()):  # without OpenMP, with threads of its own
        try:
            return ctypes.CDLL(str(_built(compiler, (*FLAGS, *target))))
        except (subprocess.CalledProcessError, OSError) as error:
            reason = str(getattr(error, "stderr", "") or error).strip().splitlines()[0]
    LOG.warning(f"{SOURCE.name} could not be built ({reason}): circuits run in PyTorch, some ten times slower on a CPU.")
    return None


def _built(compiler: str, flags: tuple[str, ...]) -> Path:
    """Return the shared library of the source, from the user's cache if this machine has built it before."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256("\n".join([SOURCE.read_text(), version, *flags, _processor()]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "axolotl-qtha"
    path = cache / f"circuit-{key}.so"
    if path.exists():
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=cache)
    except OSError:  # no home to write to
        path = Path(tempfile.mkdtemp()) / path.name
        scratch = tempfile.TemporaryDirectory(dir=path.parent)
    with scratch as folder:
        built = Path(folder) / path.name
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(built)], check=True, capture_output=True, text=True)
        os.replace(built, path)  # at once: other ranks may build it too
    return path


def _processor() -> str:
    """Describe the CPU: a library built for one may not run on another that shares the cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine() + platform.processor())


class _Call:
    """The arguments that forward and backward share."""

    def __init__(self, z: Tensor, angles: Tensor, ansatz: Ansatz) -> None:
        self.program: Program = program(ansatz)
        self.phases = tables(ansatz, z.device, z.dtype).phases
        self.factor = max(wall.encodes for wall in self.program.walls)  # with one qubit, the number of layers
        half_z = z * (self.factor / 2)
        half_wall = torch.stack([angles[list(wall.rows)].sum(0) / 2 for wall in self.program.walls])
        rings = [angles[row] @ self.phases[kind] for row, kind in self.program.diagonals]
        phase = torch.stack(rings) if rings else z.new_zeros(0, 2**ansatz.qubits)
        encodes = torch.tensor([wall.encodes > 0 for wall in self.program.walls])
        self.tensors = [half_z.cos(), half_z.sin(), encodes, half_wall.cos(), half_wall.sin(), phase.cos(), phase.sin()]
        self.chunk = LANES * max(2, -(-z.shape[0] // (LANES * CHUNKS)))
        self.chunks = -(-z.shape[0] // self.chunk)
        self.sizes = (ctypes.c_int64(z.shape[0]), ctypes.c_int(ansatz.qubits), ctypes.c_int(len(self.program.walls)))

    def run(self, name: str, *tensors: Tensor) -> None:
        """Call a function of the library; the tensors are contiguous."""
        function = getattr(library(), f"qtha_{name}_{'f64' if tensors[0].dtype == torch.float64 else 'f32'}")
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in self.tensors]
        further = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        threads = ctypes.c_int(torch.get_num_threads())
        function(*self.sizes, *pointers, ctypes.c_int64(self.chunk), threads, *further)


def forward(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return <Z_i>, (tokens, n), of contiguous z (tokens, n) and angles (rows, n) in radians, float32 or float64."""
    result = torch.empty_like(z)
    _Call(z, angles, ansatz).run("forward", result)
    return result


def backward(grad: Tensor, z: Tensor, angles: Tensor, ansatz: Ansatz) -> tuple[Tensor, Tensor]:
    """Return the gradients of sum(grad * <Z>) for z and the angles."""
    call = _Call(z, angles, ansatz)
    walls, states = len(call.program.walls), 2**ansatz.qubits
    grad_z, grad_angles = torch.empty_like(z), torch.zeros_like(angles)
    of_walls = torch.zeros(call.chunks, walls, ansatz.qubits, dtype=torch.float64)
    of_rings = torch.zeros(call.chunks, walls - 1, states, dtype=torch.float64)
    call.run("backward", grad, grad_z, of_walls, of_rings)
    for wall, total in zip(call.program.walls, of_walls.sum(0).to(z.dtype), strict=True):
        grad_angles[list(wall.rows)] += total
    # dU/dt = i w U, so dE/dt = -2 sum_s w(s) Im(conj(adjoint) state)
    for (row, kind), total in zip(call.program.diagonals, of_rings.sum(0).to(z.dtype), strict=True):
        grad_angles[row] += -2 * (call.phases[kind] @ total)
    return call.factor * grad_z, grad_angles
