"""Circuits of the user's own, as an adapter's configuration has them: by the function that `circuit:` names, or kept with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..circuit import circuit_file
from ..circuit.own import OwnCircuit
from ..circuit.recognised import circuits_of

Self = TypeVar("Self", bound="OwnCircuits")


class OwnCircuits:
    """The part of `QTHAConfig` that knows them, whose fields these are."""

    circuit: str | None
    circuit_layers: int
    ranks: Any
    qubits_at: Callable[[int], int]
    own_circuits: dict[int, OwnCircuit] | None = None  # those beside the file it was read from, by how many numbers they take

    @property
    def circuits_used(self) -> list[OwnCircuit]:
        """The circuits that layers have, one for each rank that is cut into them; see `recognised.circuits_of`."""
        assert self.circuit is not None
        return circuits_of(self.circuit, map(self.qubits_at, self.ranks), self.circuit_layers, self.own_circuits)

    def changed(self: Self, **settings: Any) -> Self:
        """Return the configuration with other settings, and the circuits that were kept with it."""
        result: Self = replace(self, **settings)  # type: ignore[type-var]  # QTHAConfig, a dataclass
        result.own_circuits = self.own_circuits
        return result

    def read_circuits(self, folder: str, **where: Any) -> None:
        """Take the circuits that lie beside a saved configuration; see `circuit_file.beside`."""
        if self.circuit is not None:
            self.own_circuits = circuit_file.beside(folder, self.circuit, **where)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, and the circuits beside it."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if self.circuit is not None:
            circuit_file.write(Path(save_directory), self.circuits_used)
