"""The words that keys of a `QTHAConfig` may have as values."""

from __future__ import annotations

from typing import Any, Literal, get_args

from ..circuit.ansatz import GATE_ORDERS
from ..circuit.simulation import Backend
from . import arguments

Quantum = Literal["qtha", "none", "silu", "sine", "frozen", "product", "qwthn"]
TensorNetwork = Literal["tt", "none"]
AngleScale = Literal["raw", "learned", "tanh"]
GateOrder = Literal["2025-06", "2025-05"]
CoreGain = Literal["by_rank", "balanced", "none"]
BranchInit = Literal["zero", "kaiming"]
Init = Literal["kaiming", "tt_svd"]
CIRCUIT_MODES = ("qtha", "frozen", "product", "qwthn")  # values of `quantum` that run a circuit


def check(config: Any) -> None:
    """Refuse a key of a configuration whose value is none of its words.

    Raises:
        ValueError: naming them.
    """
    choices: dict[str, Any] = {
        "quantum": Quantum,
        "mpo": TensorNetwork,
        "angle_scale": AngleScale,
        "gate_order": GateOrder,
        "init": Init,
        "branch_init": BranchInit,
        "core_gain": CoreGain,
        "quantum_backend": Backend,
    }
    assert set(get_args(GateOrder)) == set(GATE_ORDERS)
    for key, kind in choices.items():
        arguments.check_choice(key, getattr(config, key), get_args(kind))
