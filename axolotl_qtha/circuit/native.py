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
from typing import Any

import torch
from torch import Tensor

from .ansatz import Ansatz
from .program import Program, program
from .program import tables as constants

SOURCE = Path(__file__).with_name("circuit.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
LANES = 16  # tokens a block of the source holds at most
FEW = 64  # tokens whose cosines and sines take longer to ask of PyTorch than to compute one by one
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


class Tables:
    """What the library takes but for the tokens: computed once for angles (rows, width), those of circuits side by side."""

    def __init__(self, angles: Tensor, ansatz: Ansatz) -> None:
        self.program: Program = program(ansatz)
        self.phases = constants(ansatz, angles.device, angles.dtype).phases
        self.factor = max(wall.encodes for wall in self.program.walls)  # with one qubit, the number of layers
        half_wall = torch.stack([angles[list(wall.rows)].sum(0) / 2 for wall in self.program.walls])
        rings = [angles[row].view(-1, ansatz.qubits) @ self.phases[kind] for row, kind in self.program.diagonals]
        phase = torch.stack(rings) if rings else angles.new_zeros(0, 2**ansatz.qubits)  # (walls - 1, circuits, 2**n)
        encodes = torch.tensor([wall.encodes > 0 for wall in self.program.walls], dtype=torch.bool, device="cpu")
        self.tensors = [encodes, half_wall.cos(), half_wall.sin(), phase.cos(), phase.sin()]
        self.pointers = [tensor.data_ptr() for tensor in self.tensors]
        self.qubits, self.walls, self.width = ansatz.qubits, len(self.program.walls), angles.shape[1]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The library's `circuits`, `qubits` and `walls`."""
        return self.width // self.qubits, self.qubits, self.walls


@lru_cache(maxsize=8)
def _function(name: str, dtype: torch.dtype) -> Any:
    """Return `forward`, `backward` or `infer` of the library, with its types."""
    function = getattr(library(), f"qtha_{name}_{'f64' if dtype == torch.float64 else 'f32'}")
    pointer, many, few = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    shared = {"forward": 1, "backward": 5}
    function.argtypes = (
        [pointer, many, pointer, many, few, pointer]
        if name == "infer"
        else [many, few, few, few, *7 * [pointer], many, few, *shared[name] * [pointer]]
    )
    function.restype = few if name == "infer" else None
    return function


def _chunk(tokens: int) -> int:
    """Return how many tokens one thread takes at a time."""
    return LANES * max(2, -(-tokens // (LANES * CHUNKS)))


def _call(name: str, z: Tensor, tables: Tables, *further: Tensor) -> None:
    """Call `forward` or `backward` of the library on contiguous tensors."""
    half_z = z * (tables.factor / 2)
    cos, sin = half_z.cos(), half_z.sin()
    _function(name, z.dtype)(
        *(z.shape[0], *tables.sizes, cos.data_ptr(), sin.data_ptr(), *tables.pointers),
        *(_chunk(z.shape[0]), torch.get_num_threads(), *[tensor.data_ptr() for tensor in further]),
    )


def forward(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Tensor:
    """Return <Z_i>, (tokens, width), of contiguous z (tokens, width), angles (rows, width) in radians, float32 or float64."""
    return run(z, Tables(angles, ansatz))


def run(z: Tensor, tables: Tables) -> Tensor:
    """Return `forward` of z and the angles that the tables were made of."""
    result = torch.empty_like(z)
    _call("forward", z, tables, result)
    return result


class _Fixed(ctypes.Structure):
    """`Fixed` of the source."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("encodes", "cos_wall", "sin_wall", "cos_diag", "sin_diag", "scale", "w_c", "w_q")],
        ("half", ctypes.c_double),
        *[(name, ctypes.c_int) for name in ("circuits", "qubits", "walls", "bounded", "product")],
    )


class Few:
    """From z to h for a few tokens, in one call of the library; see `bottleneck.py`."""

    def __init__(self, tables: Tables, w_c: Tensor, w_q: Tensor, scale: Tensor | None, bounded: bool, product: bool) -> None:
        self.numbers = FEW * tables.width  # of z, at most
        matrices = [None if tensor is None else tensor.detach().contiguous() for tensor in (scale, w_c, w_q)]
        self.alive = tables, matrices  # the library gets their addresses
        pointers = [*tables.pointers, *[0 if tensor is None else tensor.data_ptr() for tensor in matrices]]
        self.fixed = _Fixed(*pointers, tables.factor / 2, *tables.sizes, bounded, product)
        self.address, self.width, self.function = ctypes.addressof(self.fixed), tables.width, _function("infer", w_c.dtype)

    def __call__(self, z: Tensor) -> Tensor | None:
        """Return h (.., width) for z (.., width) of the tables' dtype; None if an encoding angle is NaN or infinite."""
        z = z.contiguous()
        h = torch.empty_like(z)
        tokens, threads = z.numel() // self.width, torch.get_num_threads()
        return h if self.function(self.address, tokens, z.data_ptr(), 2 * LANES, threads, h.data_ptr()) else None


def backward(grad: Tensor, z: Tensor, angles: Tensor, ansatz: Ansatz) -> tuple[Tensor, Tensor, Tensor]:
    """Return <Z>, and the gradients of sum(grad * <Z>) for z and the angles."""
    tables = Tables(angles, ansatz)
    chunks = -(-z.shape[0] // _chunk(z.shape[0]))
    values, grad_z, grad_angles = torch.empty_like(z), torch.empty_like(z), torch.zeros_like(angles)
    of_walls = torch.zeros(chunks, tables.walls, tables.width, dtype=torch.float64, device="cpu")
    rings = chunks, tables.walls - 1, tables.width // ansatz.qubits, 2**ansatz.qubits
    of_rings = torch.zeros(rings, dtype=torch.float64, device="cpu")
    _call("backward", z, tables, grad, values, grad_z, of_walls, of_rings)
    for wall, total in zip(tables.program.walls, of_walls.sum(0).to(z.dtype), strict=True):
        grad_angles[list(wall.rows)] += total
    # dU/dt = i w U, so dE/dt = -2 sum_s w(s) Im(conj(adjoint) state)
    for (row, kind), total in zip(tables.program.diagonals, of_rings.sum(0).to(z.dtype), strict=True):
        grad_angles[row] += -2 * (total @ tables.phases[kind].T).flatten()
    return values, grad_z if tables.factor == 1 else tables.factor * grad_z, grad_angles
