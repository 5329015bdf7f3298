"""Circuits of the user's own: where they come from, what is refused, and how they are kept.

A function gives a Qiskit circuit whose parameters `z[0]`, `z[1]`, ... take the bottleneck's numbers; all others are trained. What
is read out are Pauli observables, one for each number, by default Z on each qubit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import alternatives, refusal
from .gates import KNOWN
from .imported import found_at, is_path

if TYPE_CHECKING:
    from qiskit.circuit import Parameter, QuantumCircuit

PREFIX = "own:"  # of the `gate_order` of an ansatz that is one
GROUP = "axolotl_qtha.circuits"  # entry points of packages that bring circuits
NAMED = {"reuploading": "axolotl_qtha.circuit.examples:reuploading"}  # names that come with this package
NAME = re.compile(r"[A-Za-z_][\w-]{0,39}")
WORKS = "`circuit: my_package.my_module:my_circuit`, a function of (qubits, layers) that returns a Qiskit `QuantumCircuit`"
KEYS = ("circuit", "inputs", "trained", "observables")
UNITARY_ONLY = "gates alone: it is read out by the observables, in the end"

Function = Callable[[int, int], Any]

_registered: dict[str, Function] = {}  # by `register_circuit`: names stand for the whole process, as PEFT's methods do
_known: dict[str, OwnCircuit] = {}  # by digest: custom operators take texts and numbers, and no objects


@dataclass(frozen=True, eq=False)
class OwnCircuit:
    """A circuit with free parameters, its inputs and trained parameters in order, and what is read out."""

    circuit: QuantumCircuit
    inputs: tuple[Parameter, ...]  # take z_0, z_1, ... in radians
    trained: tuple[Parameter, ...]
    observables: tuple[str, ...]  # Pauli labels as Qiskit writes them: the last letter is qubit 0

    @cached_property
    def digest(self) -> str:
        """What the circuit does, in hexadecimal; the same in every process, whatever its parameters are called.

        Expressions of angles count by their values at random parameters: QPY keeps what they say, and not how they are written.
        """
        text = f"{_gates(self.circuit, self.numbers)} {len(self.inputs)} {len(self.trained)} {self.observables}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def numbers(self) -> dict[Parameter, float]:
        """Random values of all parameters, the same each time, in radians."""
        every = [*self.inputs, *self.trained]
        return dict(zip(every, np.random.default_rng(0).uniform(-np.pi, np.pi, len(every)), strict=True))

    @property
    def gate_order(self) -> str:
        """The `gate_order` of an ansatz that is this circuit; makes it known to `known`."""
        _known.setdefault(self.digest, self)
        return PREFIX + self.digest


def _gates(circuit: QuantumCircuit, numbers: dict[Parameter, float]) -> list[Any]:
    """Return the gates of a circuit, their qubits and their angles at these parameters; of unknown gates what they consist of."""
    where, found = circuit.find_bit, list[Any]()
    for entry in circuit.data:
        gate, qubits = entry.operation, [where(qubit).index for qubit in entry.qubits]
        if gate.name in KNOWN or gate.definition is None:
            found.append((gate.name, [_rounded(value, numbers) for value in gate.params], qubits))
        elif gate.name != "barrier":
            found.append((_gates(gate.definition, numbers), qubits))
    return [circuit.num_qubits, *found]


def _rounded(value: Any, numbers: dict[Parameter, float]) -> list[complex]:
    """Return a gate's angle, or the entries of its matrix, to nine decimals."""
    if hasattr(value, "parameters"):
        number = value.bind({parameter: numbers[parameter] for parameter in value.parameters}).numeric()
        if isinstance(number, complex):
            raise ValueError(f"{value} is {number:.3g} at random ones")
        value = number
    return [complex(entry) for entry in (np.asarray(value, dtype=complex).round(9) + 0).ravel().tolist()]


def z_labels(qubits: int) -> tuple[str, ...]:
    """Return the Pauli labels of Z on each qubit.

    >>> z_labels(3)
    ('IIZ', 'IZI', 'ZII')
    """
    return tuple("I" * (qubits - 1 - i) + "Z" + "I" * i for i in range(qubits))


def known(gate_order: str) -> OwnCircuit:
    """Return the circuit of an ansatz with this `gate_order`."""
    return _known[gate_order.removeprefix(PREFIX)]


def register_circuit(name: str, function: Function) -> None:
    """Give a function a name that `circuit:` may have; a package does it by an entry point of the group `axolotl_qtha.circuits`.

    Args:
        name: letters, digits, `_` and `-`, at most 40.
        function: takes qubits and layers, see `called`.

    Raises:
        ValueError: if the name is none, or another function has it.
    """
    if not NAME.fullmatch(name) or name in NAMED or _registered.setdefault(name, function) is not function:
        raise refusal("circuit", name, "is no name, or that of another circuit", "another one, of letters, digits, _ and -")


def check_name(value: Any) -> None:
    """Refuse a value of `circuit:` that is neither a name nor an import path; nothing is imported.

    Raises:
        ValueError: naming it.
    """
    if not is_path(value) and not (isinstance(value, str) and NAME.fullmatch(value)):
        raise refusal("circuit", value, "is neither an import path nor a name", WORKS)


def function_of(name: str) -> Function:
    """Return the function that `circuit:` names.

    A module that lies in the current directory is found, too, as with `python -m`.

    Raises:
        ValueError: if nothing is registered under the name, or the path cannot be imported; it says what was imported.
    """
    check_name(name)
    if ":" in name:
        return found_at("circuit", name, WORKS)
    if name in _registered:
        return _registered[name]
    if name in NAMED:
        return found_at("circuit", NAMED[name], WORKS)
    found = entry_points(group=GROUP)
    if name in found.names:
        return found_at("circuit", found[name].value, WORKS)
    works = f"{alternatives(name, {*NAMED, *_registered, *found.names})}; or {WORKS}"
    raise refusal("circuit", name, "is registered by nothing", works)


def called(name: str, qubits: int, layers: int) -> OwnCircuit:
    """Return the circuit that a function gives for so many numbers and layers.

    Args:
        name: what `circuit:` says.
        qubits: numbers that the circuit takes and gives, `qubits` or what stands for it.
        layers: `circuit_layers`.

    Raises:
        ValueError: if the function cannot be found, fails, or gives no circuit that can be trained; it says what works.
    """
    function = function_of(name)
    try:
        given = function(qubits, layers)
    except (Exception, SystemExit) as error:
        why = f"was imported, and called with qubits={qubits}, layers={layers} it fails with {type(error).__name__}: {error}"
        raise refusal("circuit", name, why, WORKS) from error
    return described(name, given, qubits)


def described(name: str, given: Any, width: int) -> OwnCircuit:
    """Return a circuit as it is kept.

    Args:
        name: what `circuit:` says, for errors.
        given: a `QuantumCircuit`, or a dictionary with the keys `circuit`, `inputs` (parameters, default: those of the vector
            z), `trained` (parameters, default: all others, in Qiskit's order) and `observables` (Pauli labels, default: Z on
            each qubit).
        width: numbers that it is to take and give.

    Raises:
        ValueError: if it is not unitary, has inputs or observables of another number, or on qubits that it has not.
    """
    from qiskit import QuantumCircuit

    given = {"circuit": given} if isinstance(given, QuantumCircuit) else given
    if not isinstance(given, dict) or not isinstance(given.get("circuit"), QuantumCircuit):
        raise refusal("circuit", name, f"gives no circuit, but {type(given).__name__}", WORKS)
    if others := set(given) - set(KEYS):
        raise refusal("circuit", name, f"gives unknown {sorted(map(str, others))}", f"the keys {', '.join(KEYS)}")
    circuit = given["circuit"]
    _check_gates(name, circuit)
    _check_names(name, circuit)
    if "PauliEvolution" in circuit.count_ops():  # Qiskit's matrix of it is exact; what runs on a device, and here, is synthesised
        circuit = circuit.decompose("PauliEvolution")
    inputs = _inputs(name, circuit, given.get("inputs"), width)
    trained = _trained(name, circuit, inputs, given.get("trained"))
    observables = _observables(name, circuit.num_qubits, given.get("observables"), width)
    own = OwnCircuit(circuit, inputs, trained, observables)
    _check_angles(name, own)
    return own


def _check_gates(name: str, circuit: QuantumCircuit) -> None:
    from qiskit.circuit import Gate

    for place, entry in enumerate(circuit.data):
        gate = entry.operation
        if gate.name == "barrier":
            continue
        if gate.name == "measure":
            raise refusal("circuit", name, f"measures (instruction {place})", UNITARY_ONLY)
        if not isinstance(gate, Gate) or entry.clbits:
            raise refusal("circuit", name, f"holds {gate.name!r} (instruction {place}), which is no unitary gate", UNITARY_ONLY)


def _check_names(name: str, circuit: QuantumCircuit) -> None:
    """Refuse gates that are called like Qiskit's and are others, also in what gates consist of: engines go by names."""
    from qiskit.circuit.library import get_standard_gate_name_mapping

    standard = get_standard_gate_name_mapping()
    for entry in circuit.data:
        gate = entry.operation
        if gate.name in standard and not isinstance(gate, standard[gate.name].base_class):
            raise refusal("circuit", name, f"has a gate of its own called {gate.name!r}, like Qiskit's", "another name for it")
        if gate.name not in standard and gate.definition is not None:
            _check_names(name, gate.definition)


def _check_angles(name: str, own: OwnCircuit) -> None:
    """Refuse angles that cannot be computed at random parameters and their opposites, such as the logarithm of an input."""
    try:
        for sign in (1, -1):
            _gates(own.circuit, {parameter: sign * number for parameter, number in own.numbers.items()})
    except (RuntimeError, TypeError, ValueError) as error:
        why = f"has an angle that is no number for all parameters ({type(error).__name__}: {error})"
        raise refusal("circuit", name, why, "angles that are real for all real numbers, without log(z) or arcsin(z)") from error


def _inputs(name: str, circuit: QuantumCircuit, given: Any, width: int) -> tuple[Parameter, ...]:
    from qiskit.circuit import Parameter, ParameterVectorElement

    if given is None:
        vectors = [p for p in circuit.parameters if isinstance(p, ParameterVectorElement) and p.vector.name == "z"]
        found = tuple(sorted(vectors, key=lambda p: p.index))
    else:
        found = tuple(given)
        for parameter in found:
            if not isinstance(parameter, Parameter) or parameter not in circuit.parameters:
                text = getattr(parameter, "name", parameter)
                raise refusal(
                    "circuit", name, f"has no gate with its input {text!r}", "inputs that are parameters of the circuit"
                )
        if len(set(found)) != len(found):
            raise refusal("circuit", name, "names an input twice", "each once; a number may enter several gates")
    if len(found) != width:
        works = (
            f"`ParameterVector('z', {width})`, each of it in a gate, or `qubits: {len(found)}`"
            if found
            else "`ParameterVector('z', qubits)`"
        )
        raise refusal("circuit", name, f"takes {len(found)} inputs, and each circuit has {width} numbers (`qubits`)", works)
    return found


def _trained(name: str, circuit: QuantumCircuit, inputs: tuple[Parameter, ...], given: Any) -> tuple[Parameter, ...]:
    others = tuple(parameter for parameter in circuit.parameters if parameter not in inputs)
    if not others:
        raise refusal("circuit", name, "has no parameters besides its inputs, so there is nothing to train", "one with angles")
    if given is None:
        return others
    if free := [parameter.name for parameter in others if parameter not in given]:
        raise refusal(
            "circuit", name, f"leaves {', '.join(free)} free: neither input nor trained", "numbers for them, or no `trained`"
        )
    if len(given) != len(others):
        raise refusal(
            "circuit", name, "trains a parameter that is no free one of the circuit, or twice", "each of the others once"
        )
    return tuple(given)


def _observables(name: str, qubits: int, given: Any, width: int) -> tuple[str, ...]:
    from qiskit.quantum_info import PauliList

    if given is None:
        labels: Sequence[Any] = z_labels(qubits)
    elif isinstance(given, PauliList):
        labels = given.to_labels()
    elif isinstance(given, str) or not isinstance(given, Iterable):
        raise refusal("circuit", name, f"gives observables {given!r}", "a list of Pauli labels such as ['IZ', 'ZI']")
    else:
        labels = [_label(name, qubits, each) for each in given]
    if len(labels) != width:
        works = (
            f"`observables` with {width} Pauli labels in a dictionary that the function returns; Z on each qubit is the default"
        )
        raise refusal("circuit", name, f"gives {len(labels)} observables, and each circuit has {width} numbers (`qubits`)", works)
    return tuple(labels)


def _label(name: str, qubits: int, given: Any) -> str:
    """Return the label of an observable: a Pauli label of all qubits, or (letters, qubits) of some."""
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[0], str):
        letters, places = given[0], list(given[1])
        if len(letters) != len(places) or len(set(places)) != len(places):
            raise refusal("circuit", name, f"gives the observable {given!r}", "a letter for each of its qubits: ('ZZ', [0, 1])")
        if absent := [place for place in places if type(place) is not int or not 0 <= place < qubits]:
            raise refusal("circuit", name, f"observes qubit {absent[0]!r} and has {qubits}", f"qubits 0 to {qubits - 1}")
        chosen = dict(zip(places, letters, strict=True))
        label = "".join(chosen.get(place, "I") for place in reversed(range(qubits)))
    else:
        label = str(given)
    if len(label) != qubits or set(label) - set("IXYZ"):
        why = f"gives the observable {label!r}, and has {qubits} qubits"
        raise refusal(
            "circuit", name, why, f"a Pauli label of {qubits} letters of I, X, Y, Z: {'I' * (qubits - 1)}Z is Z of qubit 0"
        )
    if set(label) == {"I"}:
        raise refusal("circuit", name, f"gives the observable {label!r}, which is 1 for every state", "one with X, Y or Z")
    return label
