"""The ansatz of a circuit of the user's own: moments of the built-in one, which the fast engines run, or else all its gates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import refusal
from .ansatz import MAX_QUBITS, Ansatz, Kind
from .own import OwnCircuit, called, z_labels
from .program import program

if TYPE_CHECKING:
    from qiskit.circuit import QuantumCircuit


@lru_cache(maxsize=64)
def _called(name: str, qubits: int, layers: int) -> OwnCircuit:
    return called(name, qubits, layers)


def circuit_of(name: str, qubits: int, layers: int, kept: Mapping[int, OwnCircuit] | None = None) -> OwnCircuit:
    """Return the circuit that `circuit:` names.

    Args:
        name: what it says.
        qubits: numbers that each circuit takes and gives.
        layers: `circuit_layers`.
        kept: those that lay beside a trained adapter, by their numbers: they are used, and the function is not called.

    Raises:
        ValueError: naming `circuit`, if it cannot be had, or cannot be trained.
    """
    own = _called(name, qubits, layers) if kept is None else kept.get(qubits)
    if own is None:
        why = f"lies beside the adapter for {', '.join(map(str, kept or ()))} numbers, and a layer needs it for {qubits}"
        raise refusal("circuit", name, why, "the folder that the training wrote, copied whole")
    if own.circuit.num_qubits > MAX_QUBITS:
        works = f"at most {MAX_QUBITS} qubits, e.g. with a smaller `qubits:`"
        raise refusal("circuit", name, f"has {own.circuit.num_qubits} qubits, more than can be simulated", works)
    return own


def circuits_of(name: str, numbers: Iterable[int], layers: int, kept: Mapping[int, OwnCircuit] | None) -> list[OwnCircuit]:
    """Return the circuits that an adapter has, one for each of these numbers of inputs; see `circuit_of`."""
    return [circuit_of(name, qubits, layers, kept) for qubits in sorted(set(numbers))]


@lru_cache(maxsize=64)
def without_entanglers(name: str, own: OwnCircuit) -> OwnCircuit:
    """Return a circuit without its gates on several qubits, and without the parameters that only these had.

    Raises:
        ValueError: if no input, or nothing to train, is left.
    """
    circuit = _on_one_qubit(own.circuit)
    left = set(circuit.parameters)
    if missing := [parameter.name for parameter in own.inputs if parameter not in left]:
        why = f"has its input {missing[0]} in gates on several qubits alone: nothing is left of it without them"
        raise refusal("quantum", "product", f"does not go with `circuit: {name}`, which {why}", "`quantum: frozen` or `none`")
    trained = tuple(parameter for parameter in own.trained if parameter in left)
    if not trained:
        why = f"does not go with `circuit: {name}`, all of whose trained gates act on several qubits"
        raise refusal("quantum", "product", why, "`quantum: frozen` or `none`")
    return replace(own, circuit=circuit, trained=trained)


def _on_one_qubit(circuit: QuantumCircuit) -> QuantumCircuit:
    """Return a circuit's gates on one qubit, those inside of blocks, too: of what `to_gate` or Qiskit's library wrapped."""
    from qiskit.circuit import Gate

    result = circuit.copy_empty_like()
    for entry in circuit.data:
        block = entry.operation.definition if type(entry.operation) is Gate else None
        if len(entry.qubits) == 1:
            result.append(entry)
        elif block is not None:
            result.compose(_on_one_qubit(block), entry.qubits, inplace=True)
    return result


@lru_cache(maxsize=64)
def ansatz_of(own: OwnCircuit) -> Ansatz:
    """Return the ansatz that runs a circuit: by the fast engines if it consists of the built-in circuit's moments, in any order.

    >>> from axolotl_qtha.circuit.examples import cz_ladder
    >>> from axolotl_qtha.circuit.own import described
    >>> ansatz_of(described("", Ansatz(3, 2).circuit(), 3)).gate_order
    'encode ring rotate counter rotate encode ring rotate counter rotate'
    >>> ansatz_of(described("", cz_ladder(3, 2), 3)).is_own
    True
    """
    return recognised(own) or Ansatz(own.circuit.num_qubits, 1, own.gate_order)


def recognised(own: OwnCircuit) -> Ansatz | None:
    """Return a circuit as moments, if it is one; its trained parameters are then in the order of the table of angles."""
    n = own.circuit.num_qubits
    if own.observables != z_labels(n) or n != len(own.inputs):
        return None
    rest = [entry for entry in own.circuit.data if entry.operation.name != "barrier"]
    kinds, trained = list[Kind](), list[Any]()
    while rest:
        moment, rest = rest[:n], rest[n:]
        read = _moment(moment, n, own)
        if read is None:
            return None
        kinds.append(read[0])
        trained += read[1]
    if len(trained) != len(own.trained) or set(trained) != set(own.trained):
        return None
    found = Ansatz(n, 1, " ".join(kinds))
    # The engines turn by z once in each wall, or by the same multiple of it.
    return found if len({wall.encodes for wall in program(found).walls} - {0}) == 1 else None


def _moment(gates: list[Any], n: int, own: OwnCircuit) -> tuple[Kind, list[Any]] | None:
    """Return what kind of moment some gates are, and its trained parameters qubit by qubit."""
    names = {entry.operation.name for entry in gates}
    places = [tuple(own.circuit.find_bit(qubit).index for qubit in entry.qubits) for entry in gates]
    angles = [entry.operation.params[0] if len(entry.operation.params) == 1 else None for entry in gates]
    by_first = {place[0]: angle for place, angle in zip(places, angles, strict=True)}
    if len(by_first) != n or any(angle not in own.inputs and angle not in own.trained for angle in angles):
        return None
    ordered = [by_first[qubit] for qubit in range(n)]
    if names == {"ry"}:
        if ordered == list(own.inputs):
            return "encode", []
        return None if set(ordered) & set(own.inputs) else ("rotate", ordered)
    if names != {"crz"} or n == 1 or set(ordered) & set(own.inputs):
        return None
    for kind in ("ring", "counter"):
        if set(places) == set(Ansatz(n, 1).pairs(kind)):
            return kind, ordered
    return None
