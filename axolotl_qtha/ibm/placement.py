"""Where circuits side by side go on a device: groups of connected qubits that share none, the likeliest to be right first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import rustworkx
from qiskit import QuantumCircuit
from qiskit.providers import BackendV2
from qiskit.transpiler import Target

from ..circuit.noise import transpiled, used

Arguments = tuple[tuple[str, Any], ...]  # of the transpiler, see `IBMOptions.transpiling`


@dataclass(frozen=True)
class Place:
    """A circuit on one group of qubits."""

    circuit: QuantumCircuit  # in the device's gates, on all its qubits
    qubits: list[int]  # where the circuit's own are read out
    error: float  # probability that a gate or the read-out fails, by the calibration; 0 where the device does not say

    @property
    def faults(self) -> float:
        """How many gates and read-outs fail on average; infinite where one always does."""
        return -math.log1p(-self.error) if self.error < 1 else math.inf


def best(circuit: QuantumCircuit, backend: BackendV2, transpiler: Arguments = ()) -> Place:
    """Return where Qiskit places a circuit on a whole device, with its transpiler's arguments."""
    compiled = transpiled(circuit, transpiler, backend=backend)
    return _placed(compiled, _read_out(compiled), backend.target)


def places(circuit: QuantumCircuit, backend: BackendV2, transpiler: Arguments = ()) -> list[Place]:
    """Return as many groups as are found, by their expected error, the least first; without those that never work.

    Qiskit places the circuit on a connected part of what the groups before have left, until no part is large enough.
    """
    found, free = list[Place](), set(range(backend.num_qubits))
    while part := _largest(backend.target, free, circuit.num_qubits):
        # on a device of that part alone: Qiskit fails on some that have qubits without a connection
        compiled = transpiled(circuit, transpiler, target=_cut(backend.target, part))
        whole = QuantumCircuit(backend.num_qubits)
        whole.compose(compiled, qubits=part[: compiled.num_qubits], inplace=True)
        place = _placed(whole, [part[qubit] for qubit in _read_out(compiled)], backend.target)
        found.append(place)
        free -= used(whole) | set(place.qubits)
    return sorted((place for place in found if place.error < 1), key=lambda place: place.error)


def _read_out(compiled: QuantumCircuit) -> list[int]:
    layout = compiled.layout
    return list(range(compiled.num_qubits)) if layout is None else layout.final_index_layout()


def _placed(compiled: QuantumCircuit, qubits: list[int], target: Target) -> Place:
    right = 1.0
    for gate in compiled.data:
        right *= 1 - _error(target, gate.operation.name, tuple(compiled.find_bit(qubit).index for qubit in gate.qubits))
    for qubit in qubits:
        right *= 1 - _error(target, "measure", (qubit,))
    return Place(compiled, qubits, 1 - right)


def _error(target: Target, name: str, qubits: tuple[int, ...]) -> float:
    known = target[name].get(qubits) if name in target.operation_names else None
    return (known.error if known else None) or 0.0


def _largest(target: Target, free: set[int], size: int) -> list[int]:
    """Return the most free qubits that are connected with one another, sorted; empty if they are fewer than `size`."""
    graph = rustworkx.PyGraph(multigraph=False)
    graph.add_nodes_from(range(target.num_qubits))
    graph.add_edges_from_no_data([pair for pair in target.build_coupling_map() or () if free.issuperset(pair)])
    groups = [group for group in rustworkx.connected_components(graph) if free.issuperset(group)]
    largest = sorted(max(groups, key=len, default=()))
    return largest if len(largest) >= size else []


def _cut(target: Target, part: list[int]) -> Target:
    """Return the device of some of the qubits, which are numbered from 0 on."""
    result, number = Target(num_qubits=len(part), dt=target.dt), {qubit: i for i, qubit in enumerate(part)}
    for name in target.operation_names:
        there = {
            tuple(number[qubit] for qubit in qubits): known
            for qubits, known in target[name].items()
            if qubits is not None and number.keys() >= set(qubits)
        }
        if there:
            result.add_instruction(target.operation_from_name(name), there, name=name)
    return result
