"""What runs the circuits: a registry from the values of `quantum_backend` to the modules that know how.

A backend is a module with two functions, `prepare` and `expectation_values`, whose arguments are those of the functions here. It
is imported when it is first asked for: Qiskit and IBM's runtime take seconds to start.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from ..circuit import torch_engine
from ..circuit.ansatz import Ansatz
from ..circuit.simulation import EXACT, Simulation

MODULES = {
    "torch": "axolotl_qtha.circuit.torch_engine",
    "aer": "axolotl_qtha.circuit.aer",
    "aer_gpu": "axolotl_qtha.circuit.aer",
    "ibm": "axolotl_qtha.ibm.engine",
}


class Backend(Protocol):
    """What a backend's module has."""

    def prepare(self, ansatz: Ansatz, simulation: Simulation) -> None:
        """Check that this machine can run the circuit as asked."""

    def expectation_values(self, z: Tensor, angles: Tensor, ansatz: Ansatz, simulation: Simulation) -> Tensor:
        """Return <Z_i> of every qubit for every token, with gradients."""


def opened(name: str) -> Backend:
    """Return the backend of this name, imported on first use."""
    return cast(Backend, import_module(MODULES[name]))


def prepare(ansatz: Ansatz, simulation: Simulation) -> None:
    """Check, before anything is trained, that this machine can run the circuit as asked.

    Raises:
        ValueError: naming the YAML key, e.g. where there is no GPU, not enough memory, or no account of IBM Quantum.
    """
    opened(simulation.backend).prepare(ansatz, simulation)


def expectation_values(z: Tensor, angles: Tensor, ansatz: Ansatz, simulation: Simulation = EXACT) -> Tensor:
    """Return <Z_i> of every qubit for every token, differentiable in `z` and `angles`.

    Args:
        z: encoded inputs in radians, shape (..., n), or (..., B n) for B circuits side by side, which share no qubits.
        angles: trainable angles in radians, shape (rows, n) or (rows, B n), see `Ansatz`.
        ansatz: the circuit, on n qubits.
        simulation: what runs it.

    Returns:
        Tensor in [-1, 1] of z's shape: float64 for float64, else float32.

    Raises:
        ValueError: if the shapes do not fit the ansatz, or (on a CPU, and with Aer or IBM) an angle is NaN or infinite.
    """
    if simulation.backend == "torch":  # torch.compile cannot follow an import
        return torch_engine.expectation_values(z, angles, ansatz)
    return opened(simulation.backend).expectation_values(z, angles, ansatz, simulation)
