"""Circuits of the user's own, kept beside a trained adapter as QPY, Qiskit's format: it loads without the module of their own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import refusal
from .own import OwnCircuit, described

FILE = "circuit.qpy"
MOST_BYTES = 2**24
OLDEST = 13  # of QPY's versions: reading those before it may run code of whoever wrote the file (CVE-2025-2000)


def write(folder: Path, circuits: Iterable[OwnCircuit]) -> None:
    """Write circuits, one for each number of inputs, with the order of their parameters and their observables as metadata."""
    from qiskit import qpy

    copies = []
    for own in circuits:
        circuit = own.circuit.copy()
        circuit.metadata = {
            "inputs": [parameter.name for parameter in own.inputs],
            "trained": [parameter.name for parameter in own.trained],
            "observables": list(own.observables),
        }
        copies.append(circuit)
    with open(folder / FILE, "wb") as file:
        qpy.dump(copies, file)


def read(path: Path, name: str) -> dict[int, OwnCircuit]:
    """Return the circuits of a file by how many numbers they take; no code of the file is run.

    Args:
        path: of the file.
        name: what `circuit:` says, for errors.

    Raises:
        ValueError: if the file is damaged, of another format, or what it holds cannot be a circuit.
    """
    from qiskit import qpy

    works = "the folder that the training wrote, copied whole, or an earlier checkpoint-* folder"
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than any circuit needs. What works: {works}.")
    with open(path, "rb") as file:
        head = file.read(7)
        if head[:6] != b"QISKIT" or len(head) < 7 or head[6] < OLDEST:
            what = f"QPY version {head[6]}, whose reading is unsafe" if head[:6] == b"QISKIT" and len(head) > 6 else "no QPY file"
            raise ValueError(f"{path} is {what}. What works: {works}.")
        file.seek(0)
        try:
            circuits: list[Any] = qpy.load(file)
        except Exception as error:  # of Qiskit, its Rust half, or what it reads numbers and texts with
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). What works: {works}.") from error
    found = {}
    for circuit in circuits:
        own = _described(path, name, circuit, works)
        found[len(own.inputs)] = own
    return found


def _described(path: Path, name: str, circuit: Any, works: str) -> OwnCircuit:
    metadata = circuit.metadata if isinstance(circuit.metadata, dict) else {}
    parameters = {parameter.name: parameter for parameter in circuit.parameters}
    lists: list[Any] = [metadata.get(key) for key in ("inputs", "trained", "observables")]
    if not all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in lists):
        raise ValueError(f"{path} does not say what its circuit's inputs and observables are. What works: {works}.")
    inputs, trained, observables = lists
    if set(inputs) | set(trained) != set(parameters):
        raise ValueError(f"{path} names other parameters than its circuit has. What works: {works}.")
    given = {
        "circuit": circuit,
        "inputs": [parameters[text] for text in inputs],
        "trained": [parameters[text] for text in trained],
        "observables": observables,
    }
    return described(name, given, len(inputs))


def beside(folder: str, name: str, **where: Any) -> dict[int, OwnCircuit]:
    """Return the circuits that lie beside a saved adapter.

    Args:
        folder: the adapter's, or its name on the Hub.
        name: what `circuit:` says.
        where: `subfolder`, `revision`, `token` and the like of the Hub.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    from transformers.utils.hub import cached_file

    known = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
    options = {key: value for key, value in where.items() if key in known and value is not None}
    found = cached_file(folder, FILE, _raise_exceptions_for_missing_entries=False, **options)
    if found is None:
        why = f"was trained with the adapter in {folder!r}, which holds no {FILE}: what circuit it was is not known"
        raise refusal("circuit", name, why, "the folder that the training wrote, copied whole")
    return read(Path(found), name)
