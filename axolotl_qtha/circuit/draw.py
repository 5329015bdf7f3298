"""The circuit as text, picture and file, and what it costs in the gates of a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qiskit import QuantumCircuit, qasm3, qpy, transpile
from rich.table import Table

from ..errors import refusal
from .noise import device, plain_basis, used

SIMULATOR = "simulator"
CHOICES = "`simulator`, or `fake:` with the name of a device, e.g. `fake:torino`"
Format = Literal["qasm3", "qpy", "png", "pdf", "svg"]
ENDINGS: dict[str, Format] = {".qasm": "qasm3", ".qpy": "qpy", ".png": "png", ".pdf": "pdf", ".svg": "svg"}


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


def costs(circuit: QuantumCircuit, backend: str) -> list[Cost]:
    """Return the cost of a circuit as written, and on a backend: `simulator` (RY, RZ, CX) or `fake:<name>`.

    Raises:
        ValueError: if the backend is unknown or has too few qubits.
    """
    if backend == SIMULATOR:
        compiled = transpile(circuit, basis_gates=plain_basis(circuit), optimization_level=0)
    else:
        target = device(backend, circuit.num_qubits, "--backend", CHOICES)
        compiled = transpile(circuit, target, optimization_level=3, seed_transpiler=0)
    return [cost("as written", circuit), cost(f"on {backend}", compiled)]


def text(circuit: QuantumCircuit, width: int) -> str:
    """Return a circuit in characters, folded at `width` columns."""
    return str(circuit.draw("text", fold=width))


def format_of(path: Path) -> Format:
    """Return the format that a file's ending stands for.

    Raises:
        ValueError: if it stands for none.

    >>> format_of(Path("circuit.qasm"))
    'qasm3'
    """
    if path.suffix not in ENDINGS:
        raise refusal("--output", str(path), "has an ending of no known format", f"{', '.join(ENDINGS)}, or `--format`")
    return ENDINGS[path.suffix]


def write(circuit: QuantumCircuit, path: Path, format: Format) -> None:
    """Write a circuit as OpenQASM 3 (free parameters are inputs), as QPY (Qiskit's own, which loses nothing), or as a picture.

    Raises:
        ValueError: if the file cannot be written.
    """
    assert format in get_args(Format)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "qasm3":
            path.write_text(qasm3.dumps(circuit))
        elif format == "qpy":
            with path.open("wb") as file:
                qpy.dump(circuit, file)
        else:
            _picture(circuit, path, format)
    except OSError as error:
        raise refusal("--output", str(path), f"cannot be written: {error.strerror}", "another file") from error


def _picture(circuit: QuantumCircuit, path: Path, format: Format) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = circuit.draw("mpl", fold=24, idle_wires=False)
    FigureCanvasAgg(figure)  # no display needed
    figure.savefig(path, format=format, dpi=150, bbox_inches="tight")


def table(costs: list[Cost]) -> Table:
    """Return the costs as a table."""
    table = Table(title="the circuit in gates")
    for column in ("", "qubits", "gates", "depth", "two-qubit gates", "two-qubit depth"):
        table.add_column(column, justify="left" if column in ("", "gates") else "right")
    for row in costs:
        gates = ", ".join(f"{count} {gate}" for gate, count in sorted(row.gates.items()))
        table.add_row(row.name, str(row.qubits), gates, str(row.depth), str(row.two_qubit_gates), str(row.two_qubit_depth))
    return table
