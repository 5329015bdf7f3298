"""How Pauli observables are read out: turned to Z and measured together where they agree qubit by qubit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from qiskit import QuantumCircuit
from qiskit.quantum_info import PauliList


@dataclass(frozen=True)
class Group:
    """Observables that one measurement of all qubits tells: qubit by qubit they are the same Pauli operator, or the identity."""

    which: list[int]  # of the circuit's observables
    basis: str  # what each qubit is measured in, a Pauli label
    support: np.ndarray  # (observables, qubits): whether each acts on a qubit

    def turned(self, circuit: QuantumCircuit) -> QuantumCircuit:
        """Return the circuit with gates after it that turn what is measured to Z; the same object, where that is Z already."""
        if not set(self.basis) & set("XY"):
            return circuit
        result = circuit.copy()
        for qubit, letter in enumerate(reversed(self.basis)):
            if letter == "Y":
                result.sdg(qubit)
            if letter in "XY":
                result.h(qubit)
        return result

    def values(self, slope: np.ndarray | float = 1.0, offset: np.ndarray | float = 0.0) -> np.ndarray:
        """Return what each observable counts for each outcome, (2**qubits, observables): qubit 0 is the lowest bit.

        Args:
            slope: of each qubit's read-out, (qubits): Z is read as slope * Z + offset, on average.
            offset: likewise.
        """
        qubits = self.support.shape[1]
        outcomes = np.arange(2**qubits)[:, None]
        z = slope * (1.0 - 2.0 * (outcomes >> np.arange(qubits) & 1)) + offset  # (2**qubits, qubits)
        result: np.ndarray = np.where(self.support, z[:, None], 1.0).prod(axis=2)
        return result


def groups(observables: tuple[str, ...]) -> list[Group]:
    """Return the measurements that tell all observables, Pauli labels; those of Z alone are one.

    >>> [group.basis for group in groups(("IZ", "ZI", "XX"))]
    ['ZZ', 'XX']
    """
    paulis = PauliList(list(observables))
    parts = paulis.group_commuting(qubit_wise=True)
    index = {label: [i for i, other in enumerate(observables) if other == label] for label in observables}
    found = []
    for part in parts:
        labels = part.to_labels()
        letters = [next((label[i] for label in labels if label[i] != "I"), "I") for i in range(len(labels[0]))]
        which = sorted(i for label in set(labels) for i in index[label])
        support = np.array([[letter != "I" for letter in reversed(observables[i])] for i in which])
        found.append(Group(which, "".join(letters), support))
    return sorted(found, key=lambda group: group.which)
