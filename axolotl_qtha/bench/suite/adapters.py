"""What is compared, as keys of Axolotl's YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...tuner.arguments import IDLE
from ...tuner.choices import CORES
from ...tuner.share import LayerSize
from ...tuner.sizes import count_lora_parameters

LORA, EQUAL = "lora", "lora-equal"
# QTHA and its controls, as keys of the `qtha:` block. All but `lora-circuit` share a budget.
QTHA: dict[str, dict[str, Any]] = {
    "qtha": {"quantum": "qtha"},
    "mpo-only": {"quantum": "none"},
    "silu": {"quantum": "silu"},
    "sine": {"quantum": "sine"},
    "frozen": {"quantum": "frozen"},
    "product": {"quantum": "product"},
    "qwthn": {"quantum": "qwthn"},
    "lora-circuit": {"mpo": "none", "quantum": "qtha"},
}
ADAPTERS = {
    LORA: "PEFT's LoRA",
    EQUAL: "PEFT's LoRA of the smallest rank with at least as many parameters as `qtha`",
    "dora": "PEFT's DoRA",
    "qtha": "QTHA",
    "mpo-only": "QTHA without a circuit",
    "silu": "QTHA with a classical network of the same wiring and size in the circuit's place",
    "frozen": "QTHA with a random circuit that is not trained",
    "product": "QTHA with a trained circuit without entangling gates",
    "lora-circuit": "QTHA without tensor networks: LoRA's matrices around a circuit",
    "qwthn": "the paper's first version: product in place of the sum",
    "sine": "as `silu`, with a periodic nonlinearity",
}
CONTROLS = ("mpo-only", "silu", "sine", "frozen", "product")  # what says whether a trained circuit adds anything


def has_budget(block: dict[str, Any]) -> bool:
    """Return whether the size of QTHA with these keys follows from the suite's budgets."""
    fixed = "bond_dim" in block and "mid_dim" in block
    if block.get("mpo") == "none":  # then it says how many layers share, if anything
        fixed = (block.get("share") or {}).get("layers") != "auto"
    return not (fixed or "param_budget" in block)


def joined(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the `qtha:` keys of an adapter: those of all, but for what does nothing in it and would be refused, and its own.

    >>> joined({"circuit_layers": 4, "num_cores": 4}, {"quantum": "none"})
    {'num_cores': 4, 'quantum': 'none'}
    >>> joined({"core_gain": "none", "num_cores": 4}, {"mpo": "none"})  # W_C and W_Q have a gain, too
    {'core_gain': 'none', 'mpo': 'none'}
    """
    quantum = own.get("quantum", common.get("quantum"))
    idle = {key for key, values in IDLE.items() if quantum in values}
    idle |= {*CORES, "num_cores"} if own.get("mpo", common.get("mpo")) == "none" else set()
    return {key: value for key, value in common.items() if key not in idle} | own


def settings(
    adapter: str, rank: int, budget: float | None, modules: list[str], block: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the keys of Axolotl's YAML.

    Args:
        adapter: what is compared.
        rank: of the run; `lora-equal` has its own.
        budget: share of the parameters of LoRA at the rank of the run, where its size follows from the suite's budgets.
        modules: the layers.
        block: keys of the `qtha:` block, of a variant; its own rank among them, if that is another.
    """
    block = QTHA.get(adapter) if block is None else block
    if block is not None:
        own = block.get("rank", rank)
        block = {"rank": own, "alpha": 2 * own, "target_modules": modules, **block}
        if budget is not None:
            block["param_budget"] = budget * (rank / own)  # at the run's own rank the very number
        return {"adapter": "qtha", "plugins": ["axolotl_qtha.QTHAPlugin"], "qtha": block}
    keys = {
        "adapter": "lora",
        "lora_r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "lora_target_modules": modules,
        # Axolotl's fused kernels need a GPU; without them all adapters run as PEFT has them.
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
    }
    return keys | ({"peft_use_dora": True} if adapter == "dora" else {})


def equal_rank(parameters: int, sizes: Sequence[LayerSize]) -> int:
    """Return the smallest rank at which LoRA has at least as many parameters."""
    return -(-parameters // count_lora_parameters(1, sizes))
