"""How circuits are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Backend = Literal["torch", "aer", "aer_gpu", "ibm"]
Precision = Literal["single", "double"]
Gradient = Literal["parameter_shift", "adjoint"]


class DeviceOptions(Protocol):
    """Which device of IBM Quantum runs circuits, and how: `ibm.options.IBMOptions`, of which nothing is read here."""

    @property
    def backend(self) -> str:
        """Name of the device."""


@dataclass(frozen=True)
class Simulation:
    """How circuits are run; `torch` is exact. shots, noise_model, precision and gradient are Aer's; `ibm` has IBM's own."""

    backend: Backend = "torch"
    shots: int | None = None  # None: exact expectation values
    seed: int = 0  # of Aer's shots, or of which tokens go to IBM's device
    noise_model: str = "none"
    precision: Precision = "double"
    gradient: Gradient = "parameter_shift"
    ibm: DeviceOptions | None = None


EXACT = Simulation()
