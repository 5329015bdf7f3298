"""The circuit in a device's gates (ISA), and the PUBs it runs in.

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
from ..circuit.shifts import GateAngles
from .options import IBMOptions


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
