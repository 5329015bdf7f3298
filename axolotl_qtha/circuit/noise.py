"""Noise models by name: `none`, `depolarizing`, `readout`, `fake:<backend>` (IBM's snapshots of real devices), or one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import Hidden, alternatives, refusal
from .imported import is_path
from .own_noise import basis, own
from .own_noise import confusion as own_confusion
from .simulation import STRENGTHS, Strengths

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.providers import BackendV2
    from qiskit_aer.noise import NoiseModel, ReadoutError

# Without a device: what the circuit needs, a CRZ being two CX and two RZ. Aer (0.18) cannot bind a CRZ's angle: it silently
# runs one circuit with the angle 0.
BASIS = ["ry", "rz", "cx"]
OWN_BASIS = ["rx", *BASIS]  # into which Qiskit translates every gate that a circuit of the user's own may have
TRANSPILER: dict[str, Any] = {"optimization_level": 3, "seed_transpiler": 0}  # for a device, unless the settings say otherwise
NAMED = ("none", "depolarizing", "readout")
FAKE = "fake:"
CHOICES = (
    "`none`, `depolarizing`, `readout`, `fake:` with the name of a device, e.g. `fake:manila`, or the import path of your own, "
    "`my_package.my_module:my_model`"
)


@dataclass(frozen=True)
class Compiled:
    """A circuit in a device's gates, with that device's noise."""

    circuit: QuantumCircuit
    qubits: list[int]  # where the circuit's qubits are at the end
    noise: NoiseModel | None
    confusion: np.ndarray  # (n, 2): <Z> as read out is confusion[:, 0] * <Z> + confusion[:, 1]

    @property
    def width(self) -> int:
        """Number of qubits that are used, those passed through on the way included."""
        return len(used(self.circuit))


def used(circuit: QuantumCircuit) -> set[int]:
    """Return the indices of the qubits that gates act on."""
    return {circuit.find_bit(qubit).index for gate in circuit.data for qubit in gate.qubits}


def check(noise_model: str, qubits: int) -> None:
    """Check a `noise_model` and that its device has enough qubits.

    Raises:
        ValueError: if the name is unknown or the device too small; it lists close names.
    """
    if noise_model not in NAMED:
        _named(noise_model, qubits)


def is_own(noise_model: str) -> bool:
    """Return whether a `noise_model` is the import path of the user's own."""
    return not noise_model.startswith(FAKE) and is_path(noise_model)


def _named(noise_model: str, qubits: int) -> Any:
    """Return the fake device, or the user's own noise model or device, with enough qubits."""
    if not is_own(noise_model):
        return device(noise_model, qubits)
    found = own(noise_model)
    width = getattr(found, "num_qubits", None)  # a NoiseModel has none
    if width is not None and width < qubits:
        works = f"`qubits:` a divisor of the rank up to {width}, or a larger device"
        raise refusal("noise_model", noise_model, f"has {width} qubits, the circuit {qubits}", works)
    return found


def device(noise_model: str, qubits: int, key: str = "noise_model", choices: str = CHOICES) -> Any:
    """Return the fake backend of `fake:<name>`.

    Raises:
        ValueError: naming `key`, if the name is unknown, the device too small, or qiskit-ibm-runtime missing.
    """
    if not noise_model.startswith(FAKE):
        raise refusal(key, noise_model, "is unknown", choices)
    try:
        from qiskit_ibm_runtime import fake_provider
    except ImportError as error:
        works = '`pip install "axolotl-qtha[ibm]"`, or `noise_model: depolarizing`'
        raise refusal(key, noise_model, "needs qiskit-ibm-runtime", works) from error
    shown = Hidden(noise_model) if key == "ibm.backend" else noise_model
    named = {
        str(vars(kind)["backend_name"]).removeprefix("fake_"): kind
        for kind in vars(fake_provider).values()
        if isinstance(kind, type) and vars(kind).get("backend_name")
    }
    name = noise_model.removeprefix(FAKE).lower().removeprefix("fake_")
    if name not in named:
        raise refusal(key, shown, "names no device", alternatives(FAKE + name, (FAKE + other for other in named)))
    backend = named[name]()
    if backend.num_qubits < qubits:
        raise refusal(
            key,
            noise_model,
            f"has {backend.num_qubits} qubits, the circuit {qubits}",
            f"`qubits:` a divisor of the rank up to {backend.num_qubits}, or a larger device such as `{FAKE}torino`",
        )
    return backend


def plain_basis(circuit: QuantumCircuit) -> list[str]:
    """Return the gates into which a circuit is compiled without a device."""
    return BASIS if {"ry", "crz"}.issuperset(circuit.count_ops()) else OWN_BASIS


def compile_circuit(circuit: QuantumCircuit, noise_model: str, strengths: Strengths = STRENGTHS) -> Compiled:
    """Return a circuit with free parameters in the gates of a noise model, and its noise.

    Args:
        circuit: the circuit.
        noise_model: by name or import path.
        strengths: of `depolarizing` and `readout`.
    """
    from qiskit import transpile
    from qiskit_aer.noise import NoiseModel

    qubits, gates = list(range(circuit.num_qubits)), plain_basis(circuit)
    model, confusion = None, np.tile([1.0, 0.0], (circuit.num_qubits, 1))
    if noise_model in NAMED:
        model, (up, down) = _by_name(noise_model, strengths), strengths.readout
        confusion = confusion if model is None else np.tile([1 - up - down, down - up], (circuit.num_qubits, 1))
    else:
        found = _named(noise_model, circuit.num_qubits)
        if not isinstance(found, NoiseModel):
            return compile_for(circuit, found)
        model, gates = found, basis(noise_model, found)
        confusion = own_confusion(noise_model, found, circuit.num_qubits)
    return Compiled(transpile(circuit, basis_gates=gates, optimization_level=0), qubits, model, confusion)


def _by_name(noise_model: str, strengths: Strengths) -> NoiseModel | None:
    """Return the noise of `depolarizing` (an RZ has none: it is virtual on today's devices) or `readout`, None for `none`."""
    from qiskit_aer.noise import NoiseModel, ReadoutError, depolarizing_error

    if noise_model == "none":
        return None
    noise, (up, down) = NoiseModel(basis_gates=OWN_BASIS), strengths.readout
    if noise_model == "depolarizing":
        noise.add_all_qubit_quantum_error(depolarizing_error(strengths.one_qubit, 1), ["rx", "ry"])
        noise.add_all_qubit_quantum_error(depolarizing_error(strengths.two_qubits, 2), "cx")
    if up or down:
        noise.add_all_qubit_readout_error(ReadoutError([[1 - up, up], [down, 1 - down]]))
    return noise


def transpiled(circuit: QuantumCircuit, arguments: tuple[tuple[str, Any], ...] = (), **where: Any) -> QuantumCircuit:
    """Return a circuit in a device's gates, by Qiskit's transpiler.

    Args:
        circuit: the circuit.
        arguments: of the transpiler, in the place of the usual ones.
        **where: the device, as `backend` or `target`.

    Raises:
        ValueError: naming `ibm.transpiler`, if it fails with these arguments.
    """
    from qiskit import transpile
    from qiskit.transpiler.exceptions import TranspilerError

    given = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments}
    layout, device = given.get("initial_layout"), where.get("backend") or where["target"]
    if layout is not None and (len(layout) != circuit.num_qubits or max(layout) >= device.num_qubits):
        why = f"has {len(layout)} of a device's {device.num_qubits} qubits, counted from 0, and the circuit {circuit.num_qubits}"
        raise refusal("ibm.transpiler.initial_layout", layout, why, f"as many as the circuit's, up to {device.num_qubits - 1}")
    try:
        return transpile(circuit, **where, **TRANSPILER | given)
    except TranspilerError as error:
        if not arguments:
            raise
        raise refusal("ibm.transpiler", given, f"does not place the circuit: {error}", "fewer of these arguments") from error


def compile_for(circuit: QuantumCircuit, backend: BackendV2, transpiler: tuple[tuple[str, Any], ...] = ()) -> Compiled:
    """Return a circuit with free parameters in the gates of a device, and the noise of its last calibration.

    Args:
        circuit: the circuit.
        backend: the device.
        transpiler: options of Qiskit's transpiler, in the place of the usual ones.
    """
    compiled = transpiled(circuit, transpiler, backend=backend)
    qubits = compiled.layout.final_index_layout()
    noise, confusion = _noise_of(backend, used(compiled) | set(qubits))
    return Compiled(compiled, qubits, noise, np.array([confusion.get(qubit, (1.0, 0.0)) for qubit in qubits]))


def readout_errors(backend: Any) -> dict[int, ReadoutError]:
    """Return the read-out error of each qubit of a device that has one.

    A device's properties tell P(read 1 | prepared 0) and P(read 0 | prepared 1) apart, its target knows their mean alone: that
    stands in where there are no properties.
    """
    from qiskit_aer.noise.device import basic_device_readout_errors

    found = basic_device_readout_errors(target=backend.target)
    properties = getattr(backend, "properties", None)
    if callable(properties) and (measured := properties()) is not None:
        found += basic_device_readout_errors(measured)
    return {qubit: error for (qubit,), error in found}


def _noise_of(backend: Any, used: set[int]) -> tuple[NoiseModel, dict[int, tuple[float, float]]]:
    """Return a device's noise on the qubits used, its gates as `NoiseModel.from_backend` has them, and how <Z> is read out.

    Aer translates the whole model anew for each job, which takes seconds for a hundred qubits.
    """
    from qiskit_aer.noise import NoiseModel
    from qiskit_aer.noise.device import basic_device_gate_errors

    target = backend.target
    noise = NoiseModel(basis_gates=list(target.operation_names))
    for gate, qubits, error in basic_device_gate_errors(target=target):
        if set(qubits) <= used:
            noise.add_quantum_error(error, gate, qubits)
    confusion = {}
    for qubit, error in readout_errors(backend).items():
        if qubit in used:
            noise.add_readout_error(error, [qubit])
            (_, flip_0), (flip_1, _) = error.probabilities  # read 1 for 0, and 0 for 1
            confusion[qubit] = (1 - flip_0 - flip_1, flip_1 - flip_0)
    return noise, confusion
