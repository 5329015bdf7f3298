"""Counting parameters and meeting a parameter budget, from sizes alone: nothing here touches a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..circuit.ansatz import Ansatz
from ..circuit.recognised import ansatz_of, circuit_of, without_entanglers
from ..errors import refusal
from .config import QTHAConfig
from .mpo import Factors, MPOShape, factorize
from .share import ALL, LayerSize, Owned

DEFAULT_BUDGET = 0.24
LARGEST_MID = 8  # mid_dim is searched up to this many times the rank
LARGER_RANKS, FEW_CORES = (2, 4, 8, 12, 16, 24, 32, 48, 64), (2, 3, 4)  # tried where a budget is not met


@dataclass(frozen=True)
class AdapterShape:
    """Every size inside the adapter of one linear layer of shape (out_features, in_features)."""

    in_features: int
    out_features: int
    rank: int
    mpo_a: MPOShape | None  # in_features -> mid_dim; None with `mpo: none`
    mpo_b: MPOShape | None  # mid_dim -> out_features
    branch_table: tuple[int, int]  # of the numbers that drive the branch: angles, or the weights of a classical network
    has_branch: bool
    trains_branch: bool
    learns_scale: bool
    owned: Owned = ALL  # what it does not share with a layer before it

    @property
    def parts(self) -> dict[str, int]:
        """Trainable parameters by part, without those of a layer before it that it shares."""
        r, own = self.rank, self.owned
        if self.mpo_a is None or self.mpo_b is None:
            parts = {"a": own.a * r * self.in_features, "b": own.b * r * self.out_features}
        else:
            parts = {
                "mpo_a": own.a * self.mpo_a.num_parameters,
                "w_a": own.a * r * self.mpo_a.outputs.padded,
                "w_b": own.b * r * self.mpo_b.inputs.padded,
                "mpo_b": own.b * self.mpo_b.num_parameters,
            }
        parts["w_c"] = r * r
        if self.has_branch:
            parts["w_q"] = own.branch * r * r
        if self.trains_branch:
            parts["branch"] = own.branch * math.prod(self.branch_table)
        if self.learns_scale:
            parts["scale"] = own.branch * r
        return parts

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(self.parts.values())


def ansatz(config: QTHAConfig) -> Ansatz:
    """Return the circuit of a configuration; a token has `config.blocks` of them side by side.

    Raises:
        ValueError: naming `circuit`, where one of the user's own cannot be had.
    """
    return _ansatz(config, config.rank)


def _ansatz(config: QTHAConfig, rank: int) -> Ansatz:
    """Return the circuit of a layer of this rank."""
    qubits = config.qubits_at(rank)
    if config.circuit is None:
        return Ansatz(qubits, config.circuit_layers, config.gate_order)
    own = circuit_of(config.circuit, qubits, config.circuit_layers, config.own_circuits)
    return ansatz_of(without_entanglers(config.circuit, own) if config.quantum == "product" else own)


def _branch_table(config: QTHAConfig, rank: int) -> tuple[int, int]:
    """Return the shape of the branch's table. A classical network has as much as the circuit it stands in for."""
    if config.has_circuit:
        circuit = _ansatz(config, rank)
        return circuit.rows, circuit.columns(rank)
    return (4 * config.circuit_layers, rank) if config.is_classical else (0, rank)


def adapter_shape(
    config: QTHAConfig, in_features: int, out_features: int, owned: Owned = ALL, rank: int | None = None
) -> AdapterShape:
    """Return the sizes of the adapter on a (out_features, in_features) layer; bond_dim and mid_dim must be set.

    Args:
        config: the adapter's configuration.
        in_features: of the layer.
        out_features: of the layer.
        owned: what the layer does not share with one before it.
        rank: of the layer, where it is another than the configuration's.
    """
    return _shape(config, LayerSize(in_features, out_features, owned, rank), config.mid_dim, config.bond_dim)


def _shape(config: QTHAConfig, layer: LayerSize, mid_dim: int | None, bond_dim: int | None) -> AdapterShape:
    in_features, out_features, owned, rank = layer
    rank = rank or config.rank
    mpo_a = mpo_b = None
    assert config.mpo != "auto"  # `fitting.py` has settled it
    if config.mpo == "tt":
        assert bond_dim is not None
        assert mid_dim is not None
        mid = factorize(max(mid_dim, rank), config.num_cores)
        mpo_a = MPOShape(mid, _factors(config.in_factors, in_features, config.num_cores), bond_dim)
        mpo_b = MPOShape(_factors(config.out_factors, out_features, config.num_cores), mid, bond_dim)
    return AdapterShape(
        in_features,
        out_features,
        rank,
        mpo_a,
        mpo_b,
        branch_table=_branch_table(config, rank),
        has_branch=config.quantum != "none",
        trains_branch=config.quantum not in ("none", "frozen"),
        learns_scale=config.has_circuit and config.angle_scale == "learned",
        owned=owned,
    )


def _factors(given: dict[int, list[int]] | None, size: int, cores: int) -> Factors:
    if given and size in given:
        return Factors(size, tuple(given[size]))
    return factorize(size, cores)


Size = tuple[int, int] | LayerSize


def count_parameters(config: QTHAConfig, sizes: Iterable[Size]) -> int:
    """Return the trainable parameters on layers of the given (in_features, out_features)."""
    return sum(count * adapter_shape(config, *size).num_parameters for size, count in Counter(sizes).items())


def count_lora_parameters(rank: int, sizes: Iterable[Size]) -> int:
    """Return the trainable parameters of LoRA of the same rank on the same layers, (in_features, out_features) each.

    A layer that has a rank of its own, as a `LayerSize`, is counted with that.

    >>> count_lora_parameters(8, [(3584, 3584), (3584, 18944)])
    237568
    """
    layers = (LayerSize(*size) for size in sizes)
    return sum((layer.rank or rank) * (layer.inputs + layer.outputs) for layer in layers)


def resolve(config: QTHAConfig, sizes: Sequence[Size]) -> QTHAConfig:
    """Return the configuration with bond_dim and mid_dim set, as large as param_budget allows.

    A param_budget that was not asked for, the default, gives way where nothing meets it: to the smallest adapter there is.

    Args:
        config: the adapter's configuration.
        sizes: (in_features, out_features) of every adapted layer.

    Raises:
        ValueError: if no bond_dim and mid_dim meet a budget that was asked for; names settings that were found to work.
    """
    for key, index in (("in_factors", 0), ("out_factors", 1)):
        named, present = getattr(config, key) or {}, {size[:2][index] for size in sizes}
        if unused := sorted(set(named) - present):
            raise refusal(
                key, {size: named[size] for size in unused}, "names sizes no adapted layer has", f"sizes of {sorted(present)}"
            )
    if config.mpo == "none":
        if config.param_budget is not None:
            _check_budget(config, config.param_budget, sizes)
        return config
    found, total = _settled(config, sizes)
    if found is not None:
        return found
    lora = count_lora_parameters(config.rank, sizes)
    if config.bond_dim is not None and config.mid_dim is not None:
        why = f"is below bond_dim {config.bond_dim} and mid_dim {config.mid_dim}: {total:,} parameters of LoRA's {lora:,}"
        otherwise = "no param_budget"
    else:
        why = f"cannot be met at rank {config.rank} on these {len(sizes)} modules (LoRA: {lora:,} parameters)"
        least, _ = _settled(config.changed(param_budget=None), sizes)
        assert least is not None
        otherwise = f"no param_budget, with `bond_dim: {least.bond_dim}, mid_dim: {least.mid_dim}`: {total:,} parameters"
    raise refusal("param_budget", config.param_budget, why, _advice(config, sizes, total, lora, otherwise))


def _check_budget(config: QTHAConfig, budget: float, sizes: Sequence[Size]) -> None:
    """Refuse a param_budget that full matrices do not keep to."""
    total, lora = count_parameters(config, sizes), count_lora_parameters(config.rank, sizes)
    if total > budget * lora:
        shared = f" and `share: {config.share.model_dump()}`" if config.share else ""
        why = f"is not kept to with `mpo: none`{shared}: {total:,} parameters of LoRA's {lora:,}"
        raise refusal("param_budget", budget, why, "`share: {layers: auto, inputs: true}`, or no param_budget")


def _settled(config: QTHAConfig, sizes: Sequence[Size]) -> tuple[QTHAConfig | None, int]:
    """Return the configuration as `resolve` does, or None where it cannot meet its budget; and the fewest parameters it can have.

    The number is 0 where it does not matter: the budget is met.
    """
    limit = (config.param_budget or DEFAULT_BUDGET) * count_lora_parameters(config.rank, sizes)
    if config.bond_dim is not None and config.mid_dim is not None:
        total = count_parameters(config, sizes) if config.param_budget is not None else 0
        return (None, total) if total > limit else (config, 0)
    mids = list(_mid_dims(config)) if config.mid_dim is None else [config.mid_dim]
    counted = Counter(LayerSize(*size) for size in sizes)

    def total_of(mid: int, bond: int) -> int:
        return sum(count * _shape(config, size, mid, bond).num_parameters for size, count in counted.items())

    best = _widest(total_of, mids, config.bond_dim, max(max(size[:2]) for size in sizes), limit)
    total = 0
    if best is None:
        bond = config.bond_dim or 1
        total, mid = min((total_of(mid, bond), mid) for mid in mids)
        if config.param_budget is not None:
            return None, total
        best = mid, bond
    return config.changed(mid_dim=best[0], bond_dim=best[1]), total


def _mid_dims(config: QTHAConfig) -> Iterator[int]:
    """Yield the widths from rank up that split evenly over the cores."""
    for mid in range(config.rank, LARGEST_MID * config.rank + 1):
        factors = factorize(mid, config.num_cores)
        if factors.padded == mid and factors.sizes[0] <= 2 * factors.sizes[-1]:
            yield mid


def _widest(
    total_of: Callable[[int, int], int], mids: list[int], bond: int | None, widest_layer: int, limit: float
) -> tuple[int, int] | None:
    """Return the mid_dim and bond_dim within the limit with the widest bond, then the widest middle; None if there are none.

    Args:
        total_of: parameters, of a mid_dim and a bond_dim.
        mids: to choose from, ascending.
        bond: the bond_dim, if it is not free.
        widest_layer: the largest in_features or out_features.
        limit: the most parameters.
    """
    best, low = None, bond or 1
    for mid in mids:  # most take one count: that at the widest bond so far
        if total_of(mid, low) > limit:
            continue
        if bond is None:
            high, most = 2 * low, widest_layer * mid  # no bond can fill more
            while high <= most and total_of(mid, high) <= limit:
                low, high = high, 2 * high
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if total_of(mid, middle) <= limit else (low, middle)
        best = mid, low
    return best


def _advice(config: QTHAConfig, sizes: Sequence[Size], total: int, lora: int, otherwise: str) -> str:
    """Return settings that work where a param_budget is not met; those that keep to it have been tried.

    Args:
        config: the adapter's configuration.
        sizes: of its layers.
        total: parameters of the smallest adapter, which a larger budget allows; shares above 1 are not accepted.
        lora: parameters of LoRA.
        otherwise: what works in any case.
    """
    share = math.ceil(1e4 * total / lora - 1e-9) / 1e4  # rounded up, so that the printed value works
    works = [f"`param_budget: {share}`"] if total <= lora else []
    free: dict[str, Any] = {key: None for key in ("bond_dim", "mid_dim") if getattr(config, key) is not None}
    if free and _meets(config, sizes, free):
        works.append(f"this budget without {' and '.join(free)}")
    changes: list[tuple[str, list[Any]]] = [("rank", [rank for rank in LARGER_RANKS if rank > config.rank])]
    changes.append(("num_cores", [cores for cores in FEW_CORES if cores != config.num_cores]))
    if config.quantum != "none":
        changes += [("circuit_layers", [1]), ("quantum", ["none"])]
    for key, values in changes:
        found = next((value for value in values if _meets(config, sizes, {key: value})), None)
        works += [f"this budget with `{key}: {found}`"] if found is not None else []
    return ", or ".join([*works, otherwise])


def _meets(config: QTHAConfig, sizes: Sequence[Size], changes: dict[str, Any]) -> bool:
    """Return whether the budget can be met with these changes of the configuration."""
    try:
        return _settled(config.changed(**changes), sizes)[0] is not None
    except ValueError:  # they do not go with its other settings
        return False


def least(config: QTHAConfig, sizes: Sequence[Size]) -> QTHAConfig:
    """Return the configuration with the smallest bond_dim and mid_dim that these layers can have at its rank."""
    found, _ = _settled(config.changed(bond_dim=None, mid_dim=None), sizes)
    assert found is not None
    return found
