"""How results came about: the transpiled circuit, where it lies, the device's calibration, and versions. Nobody's account.

Kept by the journal as `made/NAME.json`, NAME being a digest of what it says, and by `hardware_eval.json`.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..circuit.noise import TRANSPILER
from ..version import __version__, versions
from .options import SECRET

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.providers import BackendV2

    from .circuits import ISACircuit
    from .options import IBMOptions
    from .service import LocalService

PACKAGES = ("qiskit", "qiskit-aer", "qiskit-ibm-runtime", "torch", "numpy")
QUBIT = ("T1", "T2", "frequency", "readout_error", "prob_meas1_prep0", "prob_meas0_prep1", "readout_length")  # SI units
PRIVATE = re.compile(r"account|instance|crn|url|user|email|hub$|group$|project$|private", re.IGNORECASE)
ADDRESS = re.compile(r"crn:|://|@|^[\w+/=.-]{40,}$")  # an instance, an address, or what may be a key


def provenance(isa: ISACircuit, service: LocalService, options: IBMOptions) -> dict[str, Any]:
    """Return how the results of a circuit on a device come about, as values of JSON."""
    return {
        "device": service.name,
        "simulated_here": service.local,
        "calibrated": service.calibration,
        "circuit": isa.digest,
        "circuit_qpy": qpy_text(isa.circuit),
        "layout": isa.qubits,  # of the circuit's qubits, place by place
        "pack": isa.pack,
        "options": told(options.measurement()),
        "transpiler": TRANSPILER | dict(options.transpiler or {}),  # the usual ones too
        "calibration": calibration_of(isa.circuit, isa.qubits, service.backend),
        "versions": {"axolotl_qtha": __version__, **versions(PACKAGES)},
    }


def name_of(made: dict[str, Any]) -> str:
    """Return the name that the journal keeps it by: the bytes of QPY, which differ from time to time, are left out."""
    said = {key: value for key, value in made.items() if key != "circuit_qpy"}
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()


def qpy_text(circuit: QuantumCircuit) -> str:
    """Return a circuit as QPY in base64; `qpy.load(io.BytesIO(base64.b64decode(text)))` of Qiskit reads it."""
    from qiskit import qpy

    file = io.BytesIO()
    qpy.dump(circuit, file)
    return base64.b64encode(file.getvalue()).decode()


def calibration_of(circuit: QuantumCircuit, read_out: list[int], backend: BackendV2) -> dict[str, Any]:
    """Return what a device's calibration says of the qubits and gates a circuit uses: [value, date], in SI units.

    Where a device has no properties, its target's values stand without a date: [value, None].
    """
    gates = {(gate.operation.name, tuple(circuit.find_bit(qubit).index for qubit in gate.qubits)) for gate in circuit.data}
    qubits = sorted({qubit for _, where in gates for qubit in where} | set(read_out))
    properties = getattr(backend, "properties", None)
    measured = properties() if callable(properties) else None
    if measured is None:
        return _by_target(gates, qubits, backend)
    by_gate = {(gate.gate, tuple(gate.qubits)): gate.parameters for gate in measured.gates}
    return {
        "qubits": {str(qubit): _dated(measured.qubits[qubit], QUBIT) for qubit in qubits},
        "gates": {
            _gate(name, where): _dated(by_gate[name, where], ("gate_error", "gate_length"))
            for name, where in sorted(gates)
            if (name, where) in by_gate
        },
    }


def _dated(parameters: Any, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """Return the named parameters of a calibration, in seconds and hertz whatever their unit."""
    scale = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "GHz": 1e9, "MHz": 1e6}
    return {
        each.name: [float(each.value) * scale.get(each.unit, 1.0), told(each.date)] for each in parameters if each.name in names
    }


def _by_target(gates: set[tuple[str, tuple[int, ...]]], qubits: list[int], backend: BackendV2) -> dict[str, Any]:
    target, found = backend.target, dict[str, Any](qubits={}, gates={})
    for qubit in qubits:
        known = (target.qubit_properties or {qubit: None})[qubit]
        times = {
            "T1": getattr(known, "t1", None),
            "T2": getattr(known, "t2", None),
            "frequency": getattr(known, "frequency", None),
        }
        times["readout_error"] = _entry(target, "measure", (qubit,)).get("gate_error")
        found["qubits"][str(qubit)] = {name: [value, None] for name, value in times.items() if value is not None}
    for name, where in sorted(gates):
        if known := _entry(target, name, where):
            found["gates"][_gate(name, where)] = {key: [value, None] for key, value in known.items()}
    return found


def _entry(target: Any, name: str, where: tuple[int, ...]) -> dict[str, float]:
    entries = target[name] if name in target.operation_names else {}
    known = entries.get(where)
    both = {"gate_error": getattr(known, "error", None), "gate_length": getattr(known, "duration", None)}
    return {key: float(value) for key, value in both.items() if value is not None}


def _gate(name: str, where: tuple[int, ...]) -> str:
    return f"{name} {' '.join(map(str, where))}"


def told(value: Any) -> Any:
    """Return what a device says of a result as values of JSON, without what names an account, or may be a key or an address.

    >>> told({"shots": 4096, "instance": "crn:v1:x", "by": ["https://me@host", "gate_folding"]})
    {'shots': 4096, 'by': ['(str, not kept)', 'gate_folding']}
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if isinstance(value, str):
        return value if len(value) <= 200 and not ADDRESS.search(value) else "(str, not kept)"
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, (np.integer, np.floating, np.ndarray)):
        return told(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): told(each) for key, each in value.items() if not (SECRET.search(str(key)) or PRIVATE.search(str(key)))}
    if isinstance(value, (list, tuple, set)):
        return [told(each) for each in value]
    return f"({type(value).__name__}, not kept)"
