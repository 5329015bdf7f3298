"""The one door to the engines: `expectation_values` runs the circuit on whatever the configuration names."""

from __future__ import annotations

from torch import Tensor

from ..circuit import torch_engine
from ..circuit.ansatz import Ansatz
from ..circuit.simulation import Simulation

EXACT = Simulation()


def prepare(ansatz: Ansatz, simulation: Simulation) -> None:
    """Check, before anything is trained, that this machine can run the circuit as asked.

    Raises:
        ValueError: naming the YAML key, e.g. where there is no GPU, not enough memory, or no account of IBM Quantum.
    """
    if simulation.ibm is not None:
        from ..ibm.engine import runner, use_device

        use_device(True)  # a training that failed may have left it otherwise
        runner(ansatz, simulation.ibm)
    elif simulation.backend != "torch":
        from ..circuit.aer import engine

        engine(ansatz, simulation)


def expectation_values(z: Tensor, angles: Tensor, ansatz: Ansatz, simulation: Simulation = EXACT) -> Tensor:
    """Return <Z_i> of every qubit for every token, differentiable in `z` and `angles`.

    Args:
        z: encoded inputs in radians, shape (..., n).
        angles: trainable angles in radians, shape (rows, n), see `Ansatz`.
        ansatz: the circuit.
        simulation: what runs it.

    Returns:
        Tensor in [-1, 1] of z's shape: float64 for float64, else float32.

    Raises:
        ValueError: if the shapes do not fit the ansatz, or (on a CPU, and with Aer or IBM) an angle is NaN or infinite.
    """
    if simulation.backend == "torch":
        return torch_engine.expectation_values(z, angles, ansatz)
    if simulation.backend == "ibm":
        from ..ibm import engine as ibm

        return ibm.expectation_values(z, angles, ansatz, simulation)
    from ..circuit import aer  # starts Qiskit

    return aer.expectation_values(z, angles, ansatz, simulation)
