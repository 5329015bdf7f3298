"""Sizes of an adapter in words, for logs, plans and cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .config import QTHAConfig
from .share import LayerSize
from .sizes import DEFAULT_BUDGET, Size, adapter_shape, ansatz, count_lora_parameters, count_parameters, least


def gave_way(config: QTHAConfig, sizes: Sequence[Size]) -> str:
    """Return what became of a default param_budget that cannot be met on these layers, in words; "" where it is met."""
    total, lora = count_parameters(config, sizes), count_lora_parameters(config.rank, sizes)
    if config.mpo == "none" or config.param_budget is not None or total <= DEFAULT_BUDGET * lora:
        return ""
    smallest = least(config, sizes)
    if (smallest.bond_dim, smallest.mid_dim) != (config.bond_dim, config.mid_dim):  # they were asked for
        return ""
    return (
        f"The default param_budget {DEFAULT_BUDGET} cannot be met on layers this small: this is the least that rank "
        f"{config.rank} takes there, {total / lora:.3g} of LoRA's parameters."
    )


def compared(total: int, lora: int) -> str:
    """Return how many parameters fewer or more than LoRA's, in per cent.

    >>> compared(24, 100), compared(110, 100)
    ('76.0% fewer', '10.0% more')
    """
    return f"{abs(1 - total / lora):.1%} {'fewer' if total <= lora else 'more'}"


def branch(config: QTHAConfig) -> str:
    """Return the branch in short.

    >>> branch(QTHAConfig(rank=32)), branch(QTHAConfig(rank=8, quantum="silu")), branch(QTHAConfig(quantum="none"))
    ('quantum: qtha (8 circuits of 4 qubits)', 'quantum: silu (1 ring of 8 units)', 'quantum: none')
    """
    if config.quantum == "none":
        return "quantum: none"
    kinds = ("circuit", "qubit") if config.has_circuit else ("ring", "unit")
    units = config.circuit_qubits if config.circuit is None else ansatz(config).qubits
    words = [f"{n} {word}{'s' * (n > 1)}" for n, word in zip((config.blocks, units), kinds, strict=True)]
    own = f" by {config.circuit}" if config.circuit else ""
    return f"quantum: {config.quantum} ({' of '.join(words)}{own})"


def in_ranks(config: QTHAConfig, sizes: Sequence[Size]) -> str:
    """Return which ranks `rank_pattern` gives how many layers, in words; "" without one.

    >>> in_ranks(QTHAConfig(rank=8, rank_pattern={"k_proj": 2}), [LayerSize(64, 64), LayerSize(64, 32, rank=2)])
    'rank_pattern: rank 2 on 1 layer, rank 8 on 1 layer.'
    """
    if not config.rank_pattern:
        return ""
    counts = Counter(LayerSize(*size).rank or config.rank for size in sizes)
    words = [f"rank {rank} on {n} layer{'s' * (n > 1)}" for rank, n in sorted(counts.items())]
    return f"rank_pattern: {', '.join(words)}."


def describe(config: QTHAConfig, sizes: Sequence[Size]) -> list[str]:
    """Return lines for the log: what was chosen, the parameters against LoRA's, and which sizes were padded."""
    total, lora = count_parameters(config, sizes), count_lora_parameters(config.rank, sizes)
    network = "full matrices (mpo: none)" if config.mpo == "none" else f"bond_dim {config.bond_dim}, mid_dim {config.mid_dim}"
    network += f", share {config.share.model_dump()}" if config.share else ""
    lines = [
        f"QTHA on {len(sizes)} modules: rank {config.rank}, {network}, {branch(config)}; {total:,} trainable "
        f"parameters, {compared(total, lora)} than LoRA of the same rank ({lora:,})."
    ]
    lines += [f"  {in_ranks(config, sizes)}"] if config.rank_pattern else []
    if note := gave_way(config, sizes):
        lines.append(f"  {note}")
    if config.mpo == "tt":
        shapes = {size: adapter_shape(config, *size) for size in sorted(set(sizes))}
        factors = {
            f for shape in shapes.values() if shape.mpo_a and shape.mpo_b for f in (shape.mpo_a.inputs, shape.mpo_b.outputs)
        }
        for factor in sorted(factors, key=lambda f: f.size):
            split = " x ".join(str(i) for i in factor.sizes)
            note = f" (padded to {factor.padded}: {factor.size} does not split evenly)" if factor.padded != factor.size else ""
            lines.append(f"  size {factor.size} -> {split}{note}")
        share = 1 - sum(shapes[size].parts["mpo_a"] + shapes[size].parts["mpo_b"] for size in sizes) / total
        if share > 0.5:
            lines.append(
                f"  {share:.0%} of the parameters are in rank-sized matrices and angles. On layers this narrow fewer "
                "target_modules (the MLP's) or fewer circuit_layers leave the tensor networks more."
            )
    if config.has_circuit and config.gate_order == "2025-05":
        lines.append(f"  gate_order 2025-05: the last ring's {config.rank} angles have no effect and get no gradient.")
    return lines
