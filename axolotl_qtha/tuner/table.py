"""Which matrices, cores and angles an adapter has, and where each lies in the few flat tensors that are trained and saved.

A step waits for the launches, gathers and updates of tensors, not for their size, so there are few:

* `cores`: all that makes the two large matrices A and B; with `share: {inputs: true}` two tensors, `cores_a` and `cores_b`,
* `fusion`: W_C, and with a branch W_Q; with `share:`, W_Q is `fusion_q`, a tensor by itself,
* `angles` of the circuits, or `units`, the weights of the classical network in their place,
* `scale`: with `angle_scale: learned`.

Flat, in row-major order: FSDP2 shards the first axis and pads it to a multiple of the ranks, and that of a first core has size 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import QTHAConfig
from .sizes import AdapterShape

CIRCUIT = ("angles", "units", "scale")  # tensors of the circuit, or of a classical network: what `circuit_lr` is for
# With core_gain `balanced`, a step changes a tensor, relative to its size, by this share of what it changes LoRA's A by.
GAIN_SHARE = 0.3
# Up to this rank; above, with `by_rank`, by less: A z, W_C and B add up r changes of one direction each, so that their product
# changes by the root of the rank more for each factor that a step changes by the same share.
LARGEST_RANK = 8


@dataclass(frozen=True)
class Part:
    """One matrix, core or table of angles."""

    tensor: str  # that holds it
    start: int  # where in it
    shape: tuple[int, ...]
    std: float = 1.0  # of its initial values
    gain: float = 1.0  # what is stored, times this, is what acts

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


def table(config: QTHAConfig, shape: AdapterShape) -> dict[str, Part]:
    """Return the parts of an adapter by name, tensor by tensor, each from its start on without a gap."""
    parts: dict[str, Part] = {}
    ends: dict[str, int] = {}
    r, balanced = shape.rank, config.core_gain != "none"
    slower = max(1.0, r / LARGEST_RANK) ** 0.5 if config.core_gain == "by_rank" else 1.0

    def add(name: str, tensor: str, sizes: tuple[int, ...], std: float = 1.0, side: int | None = None) -> None:
        gain = _gain(std / slower, side) if balanced and side is not None else 1.0
        parts[name] = Part(tensor, ends.get(tensor, 0), sizes, std, gain)
        ends[tensor] = parts[name].start + parts[name].size

    cores = dict.fromkeys("ab", "cores") if config.share is None or not config.share.inputs else {s: f"cores_{s}" for s in "ab"}
    if shape.mpo_a is None or shape.mpo_b is None:
        add("a", cores["a"], (r, shape.in_features), shape.in_features**-0.5)
        add("b", cores["b"], (shape.out_features, r), 0.0)
    else:
        mid = shape.mpo_a.outputs.padded
        for name, mpo, size in (("mpo_a", shape.mpo_a, shape.in_features), ("mpo_b", shape.mpo_b, shape.out_features)):
            for k, core in enumerate(mpo.core_shapes):
                std = (core[2] * math.sqrt(core[0] * core[3])) ** -0.5
                # The core that starts at zero starts as LoRA's B does, so it needs no gain.
                last = name == "mpo_b" and k == len(mpo.core_shapes) - 1
                add(f"{name}_{k}", cores[name[-1]], core, 0.0 if last else std, None if last else size)
            if name == "mpo_a":
                add("w_a", cores["a"], (r, mid), mid**-0.5, shape.in_features)
        add("w_b", cores["b"], (mid, r), r**-0.5, shape.out_features)
    add("w_c", "fusion", (r, r), math.sqrt(2 / r), shape.in_features)
    if shape.has_branch:
        # By itself W_Q starts at zero and learns as LoRA's B does, without a gain. Within `fusion` it has W_C's, for which the
        # operator has one number; that of a product starts as W_C does.
        gained = not config.share or config.quantum == "qwthn"
        tensor = "fusion_q" if config.share else "fusion"
        add("w_q", tensor, (r, r), math.sqrt(2 / r), shape.in_features if gained else None)
    if config.is_classical:
        add("units", "units", shape.branch_table, 3**-0.5)
    elif config.has_circuit:
        add("angles", "angles", shape.branch_table)
    if shape.learns_scale:
        add("scale", "scale", (r,))
    return parts


def tensor_sizes(parts: dict[str, Part]) -> dict[str, int]:
    """Return the number of entries of each flat tensor, by name."""
    return {part.tensor: part.start + part.size for part in parts.values()}  # the last of each counts


def _gain(std: float, size: int) -> float:
    """Return the constant that a part is divided by before it is stored.

    Adam moves every entry by the learning rate, whatever its size. The entries of LoRA's A are small, of standard deviation
    1/sqrt(3 size), so A learns fast; the entries of a core are much larger.

    Args:
        std: standard deviation of the part's entries.
        size: in_features or out_features, whichever is on the part's side.
    """
    return max(1.0, GAIN_SHARE * std * math.sqrt(3 * size))
