"""Noise models by name: `none`, `depolarizing`, and `fake:<backend>`, IBM's snapshots of real devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import Hidden, alternatives, refusal

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.providers import BackendV2
    from qiskit_aer.noise import NoiseModel

# Without a device: what the circuit needs, a CRZ being two CX and two RZ. Aer (0.18) cannot bind a CRZ's angle: it silently
# runs one circuit with the angle 0.
BASIS = ["ry", "rz", "cx"]
OWN_BASIS = ["rx", *BASIS]  # into which Qiskit translates every gate that a circuit of the user's own may have
DEPOLARIZING = {"ry": (1e-3, 1), "rx": (1e-3, 1), "cx": (1e-2, 2)}  # probability, qubits; an RZ is virtual on today's devices
FAKE = "fake:"
CHOICES = "`none`, `depolarizing`, or `fake:` with the name of a device, e.g. `fake:manila`"


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
    if noise_model in ("none", "depolarizing"):
        return
    device(noise_model, qubits)


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


def basis(circuit: QuantumCircuit) -> list[str]:
    """Return the gates into which a circuit is compiled without a device."""
    return BASIS if {"ry", "crz"}.issuperset(circuit.count_ops()) else OWN_BASIS


def compile_circuit(circuit: QuantumCircuit, noise_model: str) -> Compiled:
    """Return a circuit with free parameters in the gates of a noise model, and its noise."""
    from qiskit import transpile
    from qiskit_aer.noise import NoiseModel, depolarizing_error

    qubits = list(range(circuit.num_qubits))
    clean = np.tile([1.0, 0.0], (circuit.num_qubits, 1))
    if noise_model in ("none", "depolarizing"):
        noise = NoiseModel(basis_gates=OWN_BASIS)
        for gate, (probability, size) in DEPOLARIZING.items():
            noise.add_all_qubit_quantum_error(depolarizing_error(probability, size), gate)
        compiled = transpile(circuit, basis_gates=basis(circuit), optimization_level=0)
        return Compiled(compiled, qubits, noise if noise_model == "depolarizing" else None, clean)
    return compile_for(circuit, device(noise_model, circuit.num_qubits))


def compile_for(circuit: QuantumCircuit, backend: BackendV2) -> Compiled:
    """Return a circuit with free parameters in the gates of a device, and the noise of its last calibration."""
    from qiskit import transpile

    compiled = transpile(circuit, backend, optimization_level=3, seed_transpiler=0)
    qubits = compiled.layout.final_index_layout()
    noise, confusion = _noise_of(backend, used(compiled))
    return Compiled(compiled, qubits, noise, np.array([confusion.get(qubit, (1.0, 0.0)) for qubit in qubits]))


def _noise_of(backend: Any, used: set[int]) -> tuple[NoiseModel, dict[int, tuple[float, float]]]:
    """Return a device's noise as `NoiseModel.from_backend` makes it, and how <Z> is read out, on the qubits used.

    Aer translates the whole model anew for each job, which takes seconds for a hundred qubits.
    """
    from qiskit_aer.noise import NoiseModel
    from qiskit_aer.noise.device import basic_device_gate_errors, basic_device_readout_errors

    target = backend.target
    noise = NoiseModel(basis_gates=list(target.operation_names))
    for gate, qubits, error in basic_device_gate_errors(target=target):
        if set(qubits) <= used:
            noise.add_quantum_error(error, gate, qubits)
    confusion = {}
    for (qubit,), error in basic_device_readout_errors(target=target):
        if qubit in used:
            noise.add_readout_error(error, [qubit])
            (_, flip_0), (flip_1, _) = error.probabilities  # read 1 for 0, and 0 for 1
            confusion[qubit] = (1 - flip_0 - flip_1, flip_1 - flip_0)
    return noise, confusion
