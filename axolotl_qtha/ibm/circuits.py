"""The circuit in a device's gates (ISA), the PUBs it runs in, and the gradient by simultaneous perturbation.

Every gate has an angle of its own, so a device gets one circuit and, for the tokens and their shifts, rows of angles. The <Z_i>
of all qubits come from the same measurements: they commute.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from qiskit import ClassicalRegister, QuantumCircuit, transpile
from qiskit.exceptions import QiskitError
from qiskit.providers import BackendV2
from qiskit.quantum_info import SparsePauliOp

from ..circuit.ansatz import Ansatz
from ..circuit.shifts import Expectations, GateAngles
from .options import IBMOptions

SPSA_STEP = 0.1  # radians


class ISACircuit:
    """The circuit of an ansatz, transpiled for a device, with the observables where its qubits ended up."""

    def __init__(self, ansatz: Ansatz, backend: BackendV2) -> None:
        self.gates = GateAngles(ansatz)
        self.circuit: QuantumCircuit = transpile(self.gates.circuit, backend, optimization_level=3, seed_transpiler=0)
        n, layout = ansatz.qubits, self.circuit.layout
        self.qubits: list[int] = list(range(n)) if layout is None else layout.final_index_layout()
        z = (SparsePauliOp.from_sparse_list([("Z", [i], 1.0)], n) for i in range(n))
        self.observables = [[operator.apply_layout(layout, self.circuit.num_qubits) for operator in z]]  # (1, n)
        # The device takes the angles in the order of its circuit's parameters, which need not be all.
        self._order = [parameter.index for parameter in self.circuit.parameters]

    @property
    def digest(self) -> str:
        """What the circuit is, in hexadecimal; the same in every process."""
        where = self.circuit.find_bit
        lines = [
            f"{gate.name} {[str(value) for value in gate.params]} {[where(qubit).index for qubit in gate.qubits]}"
            for gate in self.circuit.data
        ]
        return hashlib.blake2b("\n".join([*lines, str(self.qubits)]).encode(), digest_size=16).hexdigest()

    def pub(self, points: np.ndarray) -> tuple[QuantumCircuit, list[list[SparsePauliOp]], np.ndarray]:
        """Return the PUB of circuits with these gate angles, (circuits, gates) in radians: its results are (circuits, n)."""
        return self.circuit, self.observables, points[:, None, self._order]

    def seconds(self, backend: BackendV2) -> float | None:
        """Return how long one run takes from reset to read-out, None where the device does not say."""
        measured = self.circuit.copy()
        measured.add_register(register := ClassicalRegister(len(self.qubits)))
        measured.measure(self.qubits, register)
        try:
            length: float = measured.estimate_duration(backend.target)
            return length + max(backend.target["reset"][(qubit,)].duration for qubit in self.qubits)
        except (QiskitError, KeyError, TypeError, AttributeError):
            return None


def estimator_options(options: IBMOptions, tag: str, seconds: int | None) -> dict[str, Any]:
    """Return EstimatorV2's options.

    Args:
        options: the `ibm:` block.
        tag: the tag the job can be found by.
        seconds: QPU seconds after which IBM stops the job.
    """
    result: dict[str, Any] = {"resilience_level": options.resilience_level, "environment": {"job_tags": [tag]}}
    if options.precision is None:
        result["default_shots"] = options.executions
    else:
        result["default_precision"] = options.precision
    if options.dynamical_decoupling != "none":
        result["dynamical_decoupling"] = {"enable": True, "sequence_type": options.dynamical_decoupling}
    if options.twirling:
        result["twirling"] = {"enable_gates": True, "enable_measure": True}
    if seconds is not None:
        result["max_execution_time"] = seconds
    return result


def spsa(
    gates: GateAngles,
    expectations: Expectations,
    grad: np.ndarray,
    z: np.ndarray,
    angles: np.ndarray,
    wants: tuple[bool, bool],
    draws: int,
    seed: int,
    step: float = SPSA_STEP,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of sum(grad * <Z>) by simultaneous perturbation (Spall 1992); see `parameter_shift`.

    All wanted angles of a token's circuit move by +-step at once, each in a random direction, and back: two circuits a draw.
    In expectation the slope of an angle is the exact one up to a share of the order of step**2, as if <Z> were first averaged
    over the other angles' steps. Its spread is that of the other angles' slopes, and falls with the square root of the draws.

    Args:
        gates: the circuit.
        expectations: what runs it.
        grad: gradient with respect to <Z>, (tokens, n).
        z: encoded inputs in radians, (tokens, n).
        angles: trainable angles in radians, (rows, n).
        wants: which of the two are needed; the other is left zero.
        draws: directions per token.
        seed: of the directions, which are a function of it and the angles: a run that is repeated asks for the same circuits.
        step: how far the angles move, in radians.
    """
    points = gates.points(z, angles)
    key = hashlib.blake2b(points.tobytes(), digest_size=8, key=seed.to_bytes(8, "big")).digest()
    random = np.random.default_rng(int.from_bytes(key, "big"))
    signs = random.choice([-1.0, 1.0], (len(z), draws, len(gates.kinds))) * gates.wanted(wants)
    moved = points[:, None, None] + step * np.stack([signs, -signs], axis=2)  # (tokens, draws, 2, gates)
    values = expectations(moved.reshape(-1, len(gates.kinds))).reshape(len(z), draws, 2, z.shape[1])
    costs = np.einsum("tdsn,tn->tds", values, grad)
    slopes = np.einsum("td,tdg->tg", (costs[:, :, 0] - costs[:, :, 1]) / (2 * step * draws), signs)
    grad_z, flat = np.zeros(z.shape), np.zeros(angles.size)
    gates.collect(slopes, grad_z, flat)
    return grad_z, flat.reshape(angles.shape)
