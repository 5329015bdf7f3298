"""The circuit in a device's gates (ISA), and the PUBs it runs in.

Every gate has an angle of its own, so a device gets one circuit and, for the tokens and their shifts, rows of angles. The <Z_i>
of all qubits come from the same measurements: they commute. With `pack` one circuit of the device holds several of ours side by
side on qubits of their own (blocks), and a row the angles of as many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from qiskit import ClassicalRegister, QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.exceptions import QiskitError
from qiskit.providers import BackendV2
from qiskit.quantum_info import SparsePauliOp

from ..circuit.ansatz import Ansatz
from ..circuit.noise import used
from ..circuit.shifts import GateAngles
from ..errors import refusal
from .options import IBMOptions, refuse_too_wide
from .placement import Place, best, places

WORSE = 1.5  # `pack: auto` takes groups of qubits on which at most this many times as much fails as on the best
SIMULATED_QUBITS = 8  # in a circuit of a simulated device, at most, with `pack: auto`: 12 take half a minute each, with noise


class ISACircuit:
    """The circuit of an ansatz, transpiled for a device, with the observables where its qubits ended up."""

    def __init__(self, ansatz: Ansatz, backend: BackendV2, options: IBMOptions | None = None) -> None:
        """Place the circuit.

        Args:
            ansatz: the circuit.
            backend: the device.
            options: how many of it a circuit of the device holds; None: one.

        Raises:
            ValueError: naming `ibm.pack`, if the device has no room for so many.
        """
        self.gates = GateAngles(ansatz)
        self.places = _places(self.gates, backend, options)
        self.pack = len(self.places)
        self.circuit = self.places[0].circuit if self.pack == 1 else _side_by_side(self.places, self.gates)
        self.qubits = [qubit for place in self.places for qubit in place.qubits]  # place by place
        width = self.circuit.num_qubits
        # (1, pack n)
        self.observables = [[_at(label, place, width) for place in self.places for label in self.gates.observables]]
        # The device takes the angles in the order of its circuit's parameters, which need not be all.
        self._order = [parameter.index for parameter in self.circuit.parameters]

    @property
    def width(self) -> int:
        """How many qubits of the device gates act on."""
        return len(used(self.circuit))

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
        """Return the PUB of circuits with these gate angles, (circuits, gates) in radians.

        Its results are (rows, pack n): those of `pack` circuits, one after the other, in each row. The last row is filled up with
        the last circuit, whose further results are dropped.
        """
        filled = np.concatenate([points, np.repeat(points[-1:], -len(points) % self.pack, axis=0)])
        rows = filled.reshape(-1, 1, self.pack * points.shape[1])
        return self.circuit, self.observables, rows[:, :, self._order]

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


def _at(label: str, place: Place, width: int) -> SparsePauliOp:
    """Return an observable, a Pauli label of the circuit's own qubits, on a device of `width` qubits."""
    acting = [(letter, qubit) for letter, qubit in zip(reversed(label), place.qubits, strict=True) if letter != "I"]
    letters, qubits = zip(*acting, strict=True)
    return SparsePauliOp.from_sparse_list([("".join(letters), list(qubits), 1.0)], width)


def _places(gates: GateAngles, backend: BackendV2, options: IBMOptions | None) -> list[Place]:
    """Return where the blocks of a circuit go; one alone goes where Qiskit places it on the whole device."""
    asked, n = 1 if options is None else options.pack, gates.circuit.num_qubits
    refuse_too_wide(asked, n, backend.name, backend.num_qubits)
    arguments = () if options is None else options.transpiling
    found = [] if asked == 1 else places(gates.circuit, backend, arguments)
    if asked == "auto":
        good = [place for place in found if place.faults <= WORSE * found[0].faults]
        count = min(len(good), SIMULATED_QUBITS // n) if options and options.is_fake else len(good)
    elif (count := asked) > max(1, len(found)):
        why = f"blocks of {n} qubits: {backend.name} has {len(found)} groups of as many that are connected and work"
        raise refusal("ibm.pack", asked, why, f"`pack: auto`, or at most {max(1, len(found))}")
    return found[:count] if count > 1 else [best(gates.circuit, backend, arguments)]


def _side_by_side(places: list[Place], gates: GateAngles) -> QuantumCircuit:
    """Return one circuit that holds the blocks of all places; parameter p G + k is that of gate k, of G, in place p."""
    angles = ParameterVector("angle", len(places) * len(gates.angles))
    result = QuantumCircuit(places[0].circuit.num_qubits)
    for p, place in enumerate(places):
        own = {angle: angles[p * len(gates.angles) + k] for k, angle in enumerate(gates.angles)}
        present = {parameter: own[parameter] for parameter in place.circuit.parameters}
        result.compose(place.circuit.assign_parameters(present), inplace=True)
    return result


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
    _merge(result, options.estimator or {})
    return result


def _merge(result: dict[str, Any], further: Mapping[str, Any]) -> None:
    """Put further options beside those that are there; none is in both, see `passed_on`."""
    for key, value in further.items():
        if isinstance(value, Mapping):
            _merge(result.setdefault(key, {}), value)
        else:
            result[key] = value
