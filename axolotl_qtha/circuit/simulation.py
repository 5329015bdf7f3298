"""How circuits are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

Backend = Literal["torch", "aer", "aer_gpu", "ibm"]
Precision = Literal["single", "double"]
Gradient = Literal["parameter_shift", "adjoint"]


class DeviceOptions(Protocol):
    """Which device of IBM Quantum runs circuits, and how: `ibm.options.IBMOptions`, of which nothing is read here."""

    @property
    def backend(self) -> str:
        """Name of the device."""


@dataclass(frozen=True)
class Strengths:
    """How strong the noise models without a device are: probabilities."""

    one_qubit: float = 1e-3  # of depolarisation after an RY
    two_qubits: float = 1e-2  # after a CX
    readout: tuple[float, float] = (0.0, 0.0)  # of reading 1 for a prepared 0, and 0 for a prepared 1


STRENGTHS = Strengths()


@dataclass(frozen=True)
class Simulation:
    """How circuits are run; `torch` is exact; `ibm` has IBM's own settings, and the others but `seed` are Aer's."""

    backend: Backend = "torch"
    shots: int | None = None  # None: exact expectation values
    seed: int = 0  # of Aer's shots, or of which tokens go to IBM's device
    noise_model: str = "none"
    precision: Precision = "double"
    gradient: Gradient = "parameter_shift"
    ibm: DeviceOptions | None = None
    strengths: Strengths = STRENGTHS
    transpiler: tuple[tuple[str, Any], ...] = ()  # options for the circuit of a device whose noise is simulated


EXACT = Simulation()
