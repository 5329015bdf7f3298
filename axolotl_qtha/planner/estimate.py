"""The plan of a run: parameters, memory by part, circuits per step, and what to change where the GPU is too small."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from axolotl.utils.dict import DictDefault
from peft import PeftModel, get_peft_model

from ..args import adapter_config
from ..circuit.torch_engine import chunk_tokens
from ..config import QTHAConfig
from ..layer import QTHALayer
from ..model import select_targets
from ..plan import adapter_shape, ansatz, count_lora_parameters, count_parameters, resolve
from ..quantization import complete, connect
from .base import meta_base
from .memory import activations, optimiser_bytes, weight_bytes, workspace_bytes

CONTEXT_BYTES = 2**29  # what CUDA itself takes of a GPU, about
FRAGMENTATION = 0.05  # of torch's allocator, assumed
PAIRS = ("dpo", "ipo", "orpo", "simpo")  # `rl:` methods that run a chosen and a rejected answer side by side
FUSED_LOSSES = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy")
SHORTEST = 256  # tokens: no shorter sequence is advised
RANKS, CORES = (2, 4, 6, 8, 10, 12), (2, 3, 4)


@dataclass(frozen=True)
class Target:
    """Adapted layers of one name and size."""

    name: str
    count: int
    in_features: int
    out_features: int
    in_factors: tuple[int, ...]  # empty with `mpo: none`
    out_factors: tuple[int, ...]
    bonds: tuple[int, ...]  # between the cores, of both operators
    parameters: int  # of one layer
    lora_parameters: int


@dataclass(frozen=True)
class Memory:
    """Expected bytes on one GPU, by part. What is not sharded (DDP, one GPU) is counted whole."""

    weights: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int  # kept for backward, with checkpointing as configured
    activations_with_checkpointing: int
    activations_without_checkpointing: int
    circuit: int
    working: int  # what comes on top at the peak: logits, a block computed again, a dequantised weight
    total: int


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    base_model: str
    dtype: str
    quantisation: str
    rank: int
    bond_dim: int | None
    mid_dim: int | None
    quantum: str
    targets: list[Target]
    parameters: int
    lora_parameters: int
    micro_batch_size: int
    sequence_len: int
    tokens_per_step: int  # on one GPU, with gradient accumulation
    gradient_checkpointing: bool
    memory: Memory | None
    memory_unknown: str  # why memory is None
    circuits_per_step: int
    shift_circuits: int  # further ones for the gradient of each, with the parameter shift
    qubits: int
    gates: dict[str, int]  # of one circuit
    gpus: list[tuple[str, int]]  # name and bytes
    advice: list[str]

    @property
    def needed(self) -> int | None:
        """Bytes a GPU must have: the total, CUDA's own and the allocator's loss."""
        return None if self.memory is None else int(self.memory.total * (1 + FRAGMENTATION)) + CONTEXT_BYTES

    @property
    def fits(self) -> bool | None:
        """Whether every GPU is large enough; None without a GPU or an estimate."""
        if self.needed is None or not self.gpus:
            return None
        return all(self.needed <= size for _, size in self.gpus)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return dataclasses.asdict(self) | {"needed": self.needed, "fits": self.fits}


@dataclass(frozen=True)
class Setting:
    """A shape of the adapter that meets a budget."""

    rank: int
    num_cores: int
    bond_dim: int
    mid_dim: int
    parameters: int
    share: float  # of LoRA of this rank


def local_gpus() -> list[tuple[str, int]]:
    """Return name and bytes of this machine's GPUs."""
    every = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [(properties.name, properties.total_memory) for properties in every]


def make_plan(cfg: DictDefault, gpus: list[tuple[str, int]], advise: bool = True) -> Plan:
    """Return the plan of a validated configuration.

    Args:
        cfg: Axolotl's configuration.
        gpus: name and bytes of each GPU the run will use.
        advise: whether to work out what to change where it does not fit (several plans more).

    Raises:
        ValueError: if the base cannot be built, or the adapter does not fit it.
    """
    model, weights = _adapted(cfg)
    config = cast(QTHAConfig, model.active_peft_config)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QTHALayer)}
    targets = _targets(config, layers)
    batch, length = _batch(cfg), cfg.sequence_len
    memory, unknown = None, ""
    try:
        memory = _memory(cfg, model, weights)
    except Exception as error:  # a model whose forward looks at values cannot run on the meta device
        unknown = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    tokens = batch * length * (cfg.gradient_accumulation_steps or 1)
    plan = Plan(
        base_model=cfg.base_model,
        dtype=str(cfg.torch_dtype).removeprefix("torch."),
        quantisation=_quantisation(getattr(model.config, "quantization_config", {})),
        rank=config.rank,
        bond_dim=config.bond_dim,
        mid_dim=config.mid_dim,
        quantum=config.quantum,
        targets=targets,
        parameters=sum(target.count * target.parameters for target in targets),
        lora_parameters=sum(target.count * target.lora_parameters for target in targets),
        micro_batch_size=cfg.micro_batch_size,
        sequence_len=length,
        tokens_per_step=tokens,
        gradient_checkpointing=bool(cfg.gradient_checkpointing),
        memory=memory,
        memory_unknown=unknown,
        circuits_per_step=tokens * len(layers) if config.has_circuit else 0,
        shift_circuits=_shift_circuits(config),
        qubits=config.rank if config.has_circuit else 0,
        gates=_gates(config) if config.has_circuit else {},
        gpus=gpus,
        advice=[],
    )
    return replace(plan, advice=_advice(cfg, plan)) if advise and plan.fits is False else plan


def find_settings(cfg: DictDefault, budget: float) -> list[Setting]:
    """Return shapes of the adapter with at most `budget` of the parameters of LoRA of the same rank, on the YAML's modules.

    Raises:
        ValueError: if `budget` is not a share in (0, 1], or nothing meets it.
    """
    config = adapter_config(cfg)
    sizes = list(select_targets(config, meta_base(cfg)).values())
    free: dict[str, Any] = {"bond_dim": None, "mid_dim": None, "param_budget": budget}
    settings = []
    for rank in sorted({config.rank, *RANKS}):
        for cores in sorted({config.num_cores, *CORES}):
            factors: dict[str, Any] = {} if cores == config.num_cores else {"in_factors": None, "out_factors": None}
            try:
                shape = resolve(replace(config, rank=rank, num_cores=cores, **free, **factors), sizes)
            except ValueError:
                continue
            total = count_parameters(shape, sizes)
            assert shape.bond_dim is not None
            assert shape.mid_dim is not None
            share = total / count_lora_parameters(rank, sizes)
            settings.append(Setting(rank, cores, shape.bond_dim, shape.mid_dim, total, share))
    if not settings:
        resolve(replace(config, **free), sizes)  # says what the smallest budget is
    return settings


def _adapted(cfg: DictDefault) -> tuple[PeftModel, int]:
    """Return the base with adapters on the meta device, and the bytes of the base alone."""
    base = meta_base(cfg)
    weights = weight_bytes(base)
    model = cast(PeftModel, get_peft_model(base, adapter_config(cfg)))
    model.train()
    base.enable_input_require_grads()
    return model, weights


def _batch(cfg: DictDefault) -> int:
    return cfg.micro_batch_size * (2 if getattr(cfg.rl, "value", cfg.rl) in PAIRS else 1)


def _memory(cfg: DictDefault, model: PeftModel, weights: int) -> Memory:
    config = cast(QTHAConfig, model.active_peft_config)
    batch, length = _batch(cfg), cfg.sequence_len
    logits = not any(cfg[key] for key in FUSED_LOSSES)
    runs = {wanted: activations(model, batch, length, wanted, logits) for wanted in (True, False)}
    mine = runs[bool(cfg.gradient_checkpointing)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapter = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    optimiser = optimiser_bytes(getattr(cfg.optimizer, "value", cfg.optimizer) or "adamw_torch", model)
    here = config.has_circuit and config.quantum_backend == "torch"  # Aer has memory of its own, for one chunk of circuits
    circuit = workspace_bytes(config.rank, batch * length, chunk_tokens(config.rank)) if here else 0
    parts = {
        "weights": weights,
        "adapter": adapter,
        "gradients": adapter,
        "optimiser": optimiser,
        "activations": mine.kept,
        "circuit": circuit,
        "working": mine.peak - mine.kept,
    }
    return Memory(
        **parts,
        activations_with_checkpointing=runs[True].kept,
        activations_without_checkpointing=runs[False].kept,
        total=sum(parts.values()),
    )


def _targets(config: QTHAConfig, layers: dict[str, Any]) -> list[Target]:
    counts = Counter((name.rsplit(".", 1)[-1], m.in_features, m.out_features) for name, m in layers.items())
    targets = []
    for (name, inputs, outputs), count in counts.items():
        shape = adapter_shape(config, inputs, outputs)
        bonds = tuple(bond for mpo in (shape.mpo_a, shape.mpo_b) if mpo for bond in mpo.bonds[1:-1])
        targets.append(
            Target(
                name,
                count,
                inputs,
                outputs,
                shape.mpo_a.inputs.sizes if shape.mpo_a else (),
                shape.mpo_b.outputs.sizes if shape.mpo_b else (),
                bonds,
                shape.num_parameters,
                count_lora_parameters(config.rank, [(inputs, outputs)]),
            )
        )
    return targets


def _gates(config: QTHAConfig) -> dict[str, int]:
    kinds = Counter("ry" if moment.kind in ("encode", "rotate") else "crz" for moment in ansatz(config).moments())
    return {gate: moments * config.rank for gate, moments in kinds.items()}


def _shift_circuits(config: QTHAConfig) -> int:
    simulation = config.simulation
    if not config.has_circuit or simulation.backend == "torch" or simulation.gradient == "adjoint":
        return 0
    from ..circuit.aer import shift_circuits

    return shift_circuits(ansatz(config))


def _quantisation(settings: dict[str, Any]) -> str:
    if not settings:
        return "none"
    if settings.get("load_in_4bit"):
        double = ", double quantisation" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"4-bit {settings.get('bnb_4bit_quant_type', 'fp4')}{double}"
    return "8-bit" if settings.get("load_in_8bit") else str(settings.get("quant_method"))


def _advice(cfg: DictDefault, plan: Plan) -> list[str]:
    """Return changes that make it fit: each that does alone, or else the first few together."""
    changes = _changes(cfg, plan)
    texts = [text for text, change in changes if _changed(cfg, plan, [change]).fits]
    if texts:
        return texts
    for count in range(2, len(changes) + 1):
        if _changed(cfg, plan, [change for _, change in changes[:count]]).fits:
            return ["; and ".join(text for text, _ in changes[:count])]
    return ["a larger GPU, a smaller base_model, or the base shared over several GPUs (DeepSpeed ZeRO-3, FSDP2)"]


def _changes(cfg: DictDefault, plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    changes: list[tuple[str, dict[str, Any]]] = []
    if not plan.gradient_checkpointing:
        changes.append(("`gradient_checkpointing: true`", {"gradient_checkpointing": True}))
    if plan.quantisation == "none":
        changes.append(("`load_in_4bit: true`", {"load_in_4bit": True}))
    if cfg.micro_batch_size > 1:
        steps = cfg.micro_batch_size * (cfg.gradient_accumulation_steps or 1)
        text = f"`micro_batch_size: 1` (and `gradient_accumulation_steps: {steps}`)"
        changes.append((text, {"micro_batch_size": 1}))
    if not any(cfg[key] for key in FUSED_LOSSES):
        text = "`plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]` with `cut_cross_entropy: true`"
        changes.append((text, {"cut_cross_entropy": True}))
    length = cfg.sequence_len // 2
    while length >= SHORTEST:
        changes.append((f"`sequence_len: {length}`", {"sequence_len": length}))
        length //= 2
    return changes


def _changed(cfg: DictDefault, plan: Plan, changes: list[dict[str, Any]]) -> Plan:
    """Return the plan with the changes made."""
    merged: dict[str, Any] = {}
    for change in changes:
        merged |= change
    changed = DictDefault({**cfg, **merged})
    if merged.get("load_in_4bit"):  # as the YAML's own key would
        connect(changed)
        complete(changed)
    return make_plan(changed, plan.gpus, advise=False)
