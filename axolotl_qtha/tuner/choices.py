"""The words that keys of a `QTHAConfig` may have as values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..circuit.ansatz import GATE_ORDERS
from ..circuit.simulation import Backend
from ..errors import refusal
from . import arguments

Quantum = Literal["qtha", "none", "silu", "sine", "frozen", "product", "qwthn"]
TensorNetwork = Literal["auto", "tt", "none"]
AngleScale = Literal["raw", "learned", "tanh"]
GateOrder = Literal["2025-06", "2025-05"]
CoreGain = Literal["by_rank", "balanced", "none"]
BranchInit = Literal["zero", "kaiming", None]
Init = Literal["kaiming", "tt_svd"]
CORES = ("bond_dim", "mid_dim", "in_factors", "out_factors")  # keys that only tensor networks have
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


def form(keys: Mapping[str, Any]) -> TensorNetwork:
    """Return `mpo`, where `auto` what other keys make of it; `auto` still, if it is left to the layers' sizes.

    >>> form({}), form({"bond_dim": 4}), form({"share": {"layers": 4}}), form({"share": {"layers": "auto"}})
    ('auto', 'tt', 'tt', 'none')
    """
    mpo: TensorNetwork = keys.get("mpo") or "auto"
    if mpo != "auto":
        return mpo
    cores = keys.get("num_cores", arguments.USUAL["num_cores"]) != arguments.USUAL["num_cores"]
    if cores or keys.get("init") == "tt_svd" or any(keys.get(key) is not None for key in CORES):
        return "tt"
    if (share := keys.get("share")) is None:
        return "auto"
    layers = share.get("layers") if isinstance(share, Mapping) else getattr(share, "layers", None)
    return "none" if layers == "auto" else "tt"


def check_form(config: Any) -> None:
    """Refuse keys of tensor networks where there are none.

    Raises:
        ValueError: naming the key.
    """
    if config.mpo != "none":
        return
    for key in CORES:
        if (value := getattr(config, key)) is not None:
            why = "needs the matrix product operators, which `mpo: none` leaves out"
            raise refusal(key, value, why, f"no `{key}`, or `mpo: tt`")
    if config.init == "tt_svd":
        raise refusal("init", config.init, "decomposes into cores, which `mpo: none` leaves out", "`mpo: tt`")
