"""What a model card says and draws of the circuit."""

from __future__ import annotations

from functools import cache

from ..circuit.ansatz import Ansatz
from ..circuit.circuit_file import FILE
from ..settings.public_facts import code
from ..tuner.config import QTHAConfig
from ..tuner.sizes import ansatz

WIDTH = 110  # columns of the drawing


def drawn(config: QTHAConfig) -> tuple[str, str]:
    """Return sentences on the circuit of an adapter, and the circuit in characters."""
    n, own = config.circuit_qubits, "its own circuit" if config.blocks == 1 else f"{config.blocks} of its own side by side"
    own += " (layers of a rank by rank_pattern have circuits of that rank)" if config.rank_pattern else ""
    own += "; modules that read the same input have one circuit in common" if config.share and config.share.inputs else ""
    every = f"Every adapted layer of the model has {own}."
    if config.circuit:
        circuit = ansatz(config)
        observed = ", ".join(map(code, circuit.described().observables))
        return (
            f"Given by {code(config.circuit)} and kept as {code(FILE)}, on {circuit.qubits} qubits: {n} of the {config.rank} "
            f"numbers of the bottleneck enter it, and {observed} are read out (the last letter is qubit 0). {every}"
        ), _drawing(circuit)
    again = f" A circuit has {config.circuit_layers} such layers, with angles of their own." if config.circuit_layers > 1 else ""
    head = f"One layer on {n} qubits: `z` are {n} of the {config.rank} numbers of the bottleneck, `theta` the angles, ■ marks a "
    head += "gate's control"
    if n == 1:  # nothing to entangle with
        head = f"One layer on one qubit: `z` is one of the {config.rank} numbers of the bottleneck, `theta` are the angles"
    drawing = _drawing(Ansatz(n, 1, config.gate_order))
    return f"{head}, and the expectation values of Z are read out. {every}{again}", drawing


@cache
def _drawing(ansatz: Ansatz) -> str:
    from ..circuit.draw import text

    return "\n".join(line.rstrip() for line in text(ansatz.circuit(), WIDTH).splitlines())
