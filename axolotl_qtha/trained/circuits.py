"""The trained circuits of an adapter's folder, by the name of the layer: from its two files alone, without the base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import alternatives, refusal
from ..tuner.adapter_file import PREFIX
from ..tuner.config import QTHAConfig
from ..tuner.saving import WEIGHTS
from ..tuner.share import owners
from ..tuner.sizes import ansatz

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

INSIDE = ".qtha_adapter."  # between a layer's name and its tensors' in the file


def trained_circuit(folder: Path, layer: str | None, block: int = 0) -> tuple[QuantumCircuit, int]:
    """Return the circuit of a trained layer, its angles bound and z free, and how many such circuits the layer has.

    Its name is the layer's, with the block where there are several, and its metadata say both.

    Args:
        folder: of the trained adapter.
        layer: its name in the base model, or the end of it, if only one ends so.
        block: which of the layer's circuits.

    Raises:
        ValueError: naming `--layer` with names that are there, or `--block`; or if the adapter runs no circuit.
    """
    config, name, angles = trained_angles(folder, layer)
    circuit, blocks = ansatz(config), config.blocks
    if not 0 <= block < blocks:
        works = "`--block 0`" if blocks == 1 else f"0 to {blocks - 1}"
        raise refusal("--block", block, f"is none of the {blocks} circuits of {name}", works)
    bound = circuit.bound(None, angles.chunk(blocks, dim=1)[block])
    bound.name = name if blocks == 1 else f"{name}-{block}"
    bound.metadata = {"layer": name, "block": block}
    return bound, blocks


def trained_angles(folder: Path, layer: str | None) -> tuple[QTHAConfig, str, Tensor]:
    """Return a layer's configuration, full name, and angles (rows, columns) in radians; for the rest see `trained_circuit`."""
    config = cast(QTHAConfig, QTHAConfig.from_pretrained(str(folder)))
    if not config.has_circuit:
        raise refusal("--lora-model-dir", str(folder), f"has `quantum: {config.quantum}`, without a circuit", "`quantum: qtha`")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        keys = [key.removeprefix(PREFIX) for key in file.keys() if INSIDE in key]  # noqa: SIM118  no dictionary
        names = sorted({key.partition(INSIDE)[0] for key in keys}, key=_in_order)
        name = _chosen(layer, names)
        with_angles = [key.partition(INSIDE)[0] for key in keys if key.endswith(f"{INSIDE}angles")]
        whose = {own: own for own in names}
        if config.share:  # which of those that share them has them in the file is of no interest
            whose = {own: found.branch for own, found in owners(config.share, dict.fromkeys(names, (0, 0))).items()}
        owner = next((own for own in with_angles if whose[own] == whose[name]), None)
        if owner is None:
            raise ValueError(f"{folder / WEIGHTS} holds no angles of {name}. What works: an adapter folder copied whole.")
        angles = file.get_tensor(f"{PREFIX}{owner}{INSIDE}angles").to(torch.float64)
    own = config.of_layer(name)
    return own, name, angles.view(-1, ansatz(own).columns(own.rank))


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return what sorts layer 10 behind layer 2."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def _chosen(layer: str | None, names: list[str]) -> str:
    """Return the one name that a layer has, or ends in.

    Raises:
        ValueError: if there is none or there are several, with names to choose from.
    """
    found = [name for name in names if layer is not None and f".{name}".endswith(f".{layer}")]
    if layer in names:
        return layer
    if len(found) == 1:
        return found[0]
    if layer is None:
        raise refusal("--layer", layer, "names no layer", _some(names))
    if found:
        raise refusal("--layer", layer, f"is the end of {len(found)} names", _some(found))
    raise refusal("--layer", layer, "is no layer of the adapter", _some(alternatives(layer, names).replace("`", "").split(", ")))


def _some(names: list[str]) -> str:
    """Return the first five names."""
    more = f" and {len(names) - 5} others" if len(names) > 5 else ""
    return ", ".join(f"`--layer {name}`" for name in names[:5]) + more
