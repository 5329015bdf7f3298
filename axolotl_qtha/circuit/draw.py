"""The circuit as text and picture, and what it costs in the gates of a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qiskit import QuantumCircuit, transpile
from rich.table import Table

from .ansatz import Ansatz
from .noise import basis, device, used

SIMULATOR = "simulator"
CHOICES = "`simulator`, or `fake:` with the name of a device, e.g. `fake:torino`"


@dataclass(frozen=True)
class Cost:
    """What a circuit takes in one set of gates."""

    name: str
    gates: dict[str, int]
    depth: int
    two_qubit_gates: int
    two_qubit_depth: int
    qubits: int  # that gates act on, those passed through on the way included


def cost(name: str, circuit: QuantumCircuit) -> Cost:
    """Count a circuit's gates; depths are in moments, the longest path through all gates or through those on two qubits."""
    return Cost(
        name,
        dict(circuit.count_ops()),
        circuit.depth(),
        circuit.num_nonlocal_gates(),
        circuit.depth(lambda gate: gate.operation.num_qubits == 2),
        len(used(circuit)),
    )


def costs(ansatz: Ansatz, backend: str) -> list[Cost]:
    """Return the cost of the circuit as written, and on a backend: `simulator` (RY, RZ, CX) or `fake:<name>`.

    Raises:
        ValueError: if the backend is unknown or has too few qubits.
    """
    circuit = ansatz.circuit()
    if backend == SIMULATOR:
        compiled = transpile(circuit, basis_gates=basis(circuit), optimization_level=0)
    else:
        target = device(backend, ansatz.qubits, "--backend", CHOICES)
        compiled = transpile(circuit, target, optimization_level=3, seed_transpiler=0)
    return [cost("as written", circuit), cost(f"on {backend}", compiled)]


def text(ansatz: Ansatz, width: int) -> str:
    """Return the circuit in characters, folded at `width` columns."""
    return str(ansatz.circuit().draw("text", fold=width))


def picture(ansatz: Ansatz, path: Path) -> None:
    """Write the circuit as a picture (PNG, PDF or SVG, by the file's ending)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = ansatz.circuit().draw("mpl", fold=24, idle_wires=False)
    FigureCanvasAgg(figure)  # no display needed
    figure.savefig(path, dpi=150, bbox_inches="tight")


def table(costs: list[Cost]) -> Table:
    """Return the costs as a table."""
    table = Table(title="the circuit in gates")
    for column in ("", "qubits", "gates", "depth", "two-qubit gates", "two-qubit depth"):
        table.add_column(column, justify="left" if column in ("", "gates") else "right")
    for row in costs:
        gates = ", ".join(f"{count} {gate}" for gate, count in sorted(row.gates.items()))
        table.add_row(row.name, str(row.qubits), gates, str(row.depth), str(row.two_qubit_gates), str(row.two_qubit_depth))
    return table
