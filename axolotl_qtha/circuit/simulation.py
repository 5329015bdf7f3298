"""How circuits are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Backend = Literal["torch", "aer", "aer_gpu"]
Precision = Literal["single", "double"]
Gradient = Literal["parameter_shift", "adjoint"]


@dataclass(frozen=True)
class Simulation:
    """How circuits are run. All but `backend` concerns Aer; `torch` is exact."""

    backend: Backend = "torch"
    shots: int | None = None  # None: exact expectation values
    seed: int = 0
    noise_model: str = "none"
    precision: Precision = "double"
    gradient: Gradient = "parameter_shift"
