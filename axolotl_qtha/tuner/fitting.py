"""What is left to `param_budget`: whether layers share their matrices (`mpo: auto`), and how many (`share: {layers: auto}`)."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import refusal
from .choices import Quantum
from .config import QTHAConfig
from .share import LayerSize, Share, groups, owned
from .sizes import DEFAULT_BUDGET, count_lora_parameters, count_parameters

# Branches of the size of a trained circuit, in place of smaller ones; `silu` needs no number of qubits.
FULL: dict[str, Quantum] = {"none": "silu", "frozen": "qtha", "product": "qtha"}


def settle(config: QTHAConfig, sizes: Mapping[str, LayerSize]) -> None:
    """Set `mpo` and `share` in the configuration where they are left to the budget.

    Full matrices that layers share train to a lower loss than tensor networks of that size (docs/benchmarks.md). Tensor networks
    are taken where none of the layers can share, or not within the budget, or ranks and sizes differ within a group. Without a
    branch, or with a smaller one, the form is that of a trained circuit, so that what controls it differs in nothing else.

    Args:
        config: the adapter's configuration; completed in place.
        sizes: of the adapted layers, by name.

    Raises:
        ValueError: as `fitted`, for a `share:` that was asked for.
    """
    if config.mpo == "auto":
        share = Share(layers="auto", inputs=True)
        shared = config.changed(mpo="none", share=share, param_budget=config.param_budget or DEFAULT_BUDGET)
        try:
            share = fitted(shared.changed(quantum=FULL.get(config.quantum, config.quantum)), sizes)
        except ValueError:
            config.mpo = "tt"
            return
        config.mpo, config.share = "none", fitted(shared, sizes) if config.quantum in FULL else share
    elif config.share and config.share.layers == "auto":
        config.share = fitted(config, sizes)


def fitted(config: QTHAConfig, sizes: Mapping[str, LayerSize]) -> Share:
    """Return what is shared, in as many groups of layers as meet the budget.

    A param_budget that was not asked for, the default, gives way where nothing meets it: all layers then share.

    Args:
        config: the adapter's configuration, with `mpo: none` and `share: {layers: auto}`.
        sizes: of the adapted layers, by name.

    Raises:
        ValueError: if one group of all layers does not meet a budget that was asked for; or as `share.owners`.
    """
    assert config.share is not None
    lora = count_lora_parameters(config.rank, sizes.values())
    most = max(2, *(len(same) for same in groups(sizes).values()))
    for count in range(most if config.share.inputs else most - 1, 0, -1):
        share = Share.in_groups(count, most, config.share.inputs)
        total = count_parameters(config, owned(share, sizes).values())
        if total <= (config.param_budget or DEFAULT_BUDGET) * lora:
            return share
    if config.param_budget is None:
        return share
    works = ["a smaller rank", "no param_budget"]
    works += [] if config.share.inputs else ["`share: {layers: auto, inputs: true}`"]
    works += ["`quantum: none`"] if config.quantum != "none" else []
    raise refusal(
        "param_budget",
        config.param_budget,
        f"cannot be met at rank {config.rank} with one A and B for each kind of layer: {total:,} parameters of LoRA's {lora:,}",
        ", or ".join(works),
    )
