"""A noise model of one's own, named by its import path: Qiskit Aer's `NoiseModel`, or a device as Qiskit's `BackendV2`."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ..errors import refusal
from .imported import imported

if TYPE_CHECKING:
    from qiskit.providers import BackendV2
    from qiskit_aer.noise import NoiseModel

KEY = "noise_model"
WORKS = (
    "`my_package.my_module:my_model`, a qiskit_aer.noise.NoiseModel or a qiskit.providers.BackendV2, or a function without "
    "arguments that returns one"
)
# Gates that Aer (0.18) binds angles to, one each: it silently runs others (CRZ, RZZ) with the angle 0, or refuses them.
ROTATIONS = ("rx", "ry", "rz")
FIXED = ("id", "x", "y", "z", "h", "s", "sdg", "t", "tdg", "sx", "sxdg", "cx", "cy", "cz", "swap", "ecr")


@lru_cache(maxsize=8)
def own(path: str) -> NoiseModel | BackendV2:
    """Return the noise model or device of an import path; its function is called once in a process.

    Raises:
        ValueError: naming `noise_model`, if it cannot be imported, is neither of the two, or has noise that is not simulated.
    """
    from qiskit.providers import BackendV2
    from qiskit_aer import AerSimulator
    from qiskit_aer.noise import NoiseModel

    found = imported(KEY, path, (NoiseModel, BackendV2), WORKS)
    if isinstance(found, AerSimulator):
        why = "is a simulator, whose noise Qiskit does not pass on as a device's"
        raise refusal(KEY, path, why, "its NoiseModel by itself: `simulator.options.noise_model`")
    if isinstance(found, NoiseModel):
        basis(path, found)
        flips(path, found)
    return found


def basis(path: str, model: NoiseModel) -> list[str]:
    """Return the gates a circuit is compiled to under a noise model: those it names, that Aer can bind angles to.

    Raises:
        ValueError: naming `noise_model`, if they are not enough for any circuit.
    """
    found = [gate for gate in (*ROTATIONS, *FIXED) if gate in model.basis_gates]
    turning = set(ROTATIONS) & set(found)
    if not {"cx", "cz", "ecr"} & set(found) or not (len(turning) > 1 or (turning and {"sx", "h"} & set(found))):
        why = f"has the basis gates {', '.join(model.basis_gates)}, of which circuits with free angles cannot be made"
        raise refusal(KEY, path, why, "`NoiseModel(basis_gates=['rz', 'sx', 'x', 'cx'])`, or ['ry', 'rz', 'cx']")
    return found


def flips(path: str, model: NoiseModel) -> dict[int | None, tuple[float, float]]:
    """Return P(read 1 | prepared 0) and P(read 0 | prepared 1) by qubit; under None those of all others.

    Raises:
        ValueError: naming `noise_model`, if read-outs are correlated, or measurements have another error than of the read-out.
    """
    found: dict[int | None, tuple[float, float]] = {}
    for error in model.to_dict()["errors"]:
        if "measure" not in error["operations"]:
            continue
        probabilities = np.asarray(error.get("probabilities"), dtype=np.float64) if error["type"] == "roerror" else None
        if probabilities is None or probabilities.shape != (2, 2):
            why = "has an error of measurements that is no read-out error of one qubit by itself"
            raise refusal(KEY, path, why, "`add_readout_error(ReadoutError([[1 - p, p], [q, 1 - q]]), [qubit])` for each qubit")
        pair = float(probabilities[0, 1]), float(probabilities[1, 0])
        for qubits in error.get("gate_qubits") or [(None,)]:
            found[qubits[0]] = pair
    return found


def confusion(path: str, model: NoiseModel, qubits: int) -> np.ndarray:
    """Return (n, 2): <Z> of each qubit as read out is the first times <Z>, and the second."""
    errors = flips(path, model)
    pairs = [errors.get(qubit, errors.get(None, (0.0, 0.0))) for qubit in range(qubits)]
    return np.array([(1 - up - down, down - up) for up, down in pairs])
