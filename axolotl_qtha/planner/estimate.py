"""The plan of a run: parameters, memory by part, circuits per step, and what to change where the GPU is too small."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model

from ..circuit.torch_engine import slowness
from ..errors import refusal
from ..settings.public_facts import quantised_as
from ..settings.training_run import TrainingRun
from ..tuner.config import QTHAConfig
from ..tuner.described import branch, gave_way, in_ranks
from ..tuner.layer import QTHALayer, adapted_sizes
from ..tuner.running import AER
from ..tuner.share import in_words
from ..tuner.sizes import adapter_shape, ansatz, count_lora_parameters, count_parameters, resolve
from ..tuner.targets import select_targets
from .flops import gate_counts, step_flops
from .memory import Memory, footprint, weight_bytes
from .sharding import shards

CONTEXT_BYTES = 2**29  # what CUDA itself takes of a GPU, about
FRAGMENTATION = 0.05  # of torch's allocator, assumed
ZERO3 = "example_configs/deepspeed/zero3.json"
ZERO3_SETTINGS = {  # the part of ZERO3 that decides on memory, to plan with where the file is not at hand
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": 0,
    "stage3_gather_16bit_weights_on_model_save": True,
}
SHORTEST = 256  # tokens: no shorter sequence is advised
RANKS, CORES = (2, 4, 6, 8, 12, 16, 32, 64), (2, 3, 4)


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
    parameters: int  # of one layer, with those that it shares
    total: int  # of all these layers, what they share counted once
    lora_parameters: int  # of one layer


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    base_model: str
    dtype: str
    quantisation: str
    rank: int
    bond_dim: int | None
    mid_dim: int | None
    quantum: str  # the branch, in short
    shared: str  # tensors that layers share, in words; "" where they share none
    targets: list[Target]
    parameters: int
    lora_parameters: int
    note: str  # ranks of a rank_pattern, a default param_budget that gave way; "" for neither
    micro_batch_size: int
    sequence_len: int
    tokens_per_step: int  # on one GPU, with gradient accumulation
    gradient_checkpointing: bool
    memory: Memory | None
    memory_unknown: str  # why memory is None
    circuits_per_step: int
    circuits_per_token: int  # side by side in each adapted layer
    circuits_share: float  # of a step's arithmetic
    shift_circuits: int  # further circuits for the gradient of each, by parameter shift
    qubits: int  # of one circuit
    gates: dict[str, int]  # of one circuit
    slow: str  # what is to be said of a circuit that no fast engine runs
    gpus: list[tuple[str, int]]  # name and bytes
    ranks: int
    sharing: str  # how they share the run, in short
    loading: int  # bytes each rank holds while the base is loaded, where that is more than its share
    advice: list[str]

    @property
    def needed(self) -> int | None:
        """Bytes a GPU must have: the total, CUDA's own and the allocator's loss."""
        return None if self.memory is None else gpu_bytes(max(self.memory.total, self.loading))

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


def gpu_bytes(used: int) -> int:
    """Return the bytes a GPU must have for a run that uses so many."""
    return int(used * (1 + FRAGMENTATION)) + CONTEXT_BYTES


def local_gpus() -> list[tuple[str, int]]:
    """Return name and bytes of this machine's GPUs."""
    every = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [(properties.name, properties.total_memory) for properties in every]


def make_plan(run: TrainingRun, gpus: list[tuple[str, int]], advise: bool = True, ranks: int | None = None) -> Plan:
    """Return the plan of a training; its memory is that of one rank.

    Args:
        run: the training.
        gpus: name and bytes of each GPU the run will use.
        advise: whether to work out what to change where it does not fit (several plans more).
        ranks: processes that share the run, one GPU each; None: the processes that run now, else as many as there are GPUs.

    Raises:
        ValueError: if the base cannot be built, or the adapter does not fit it.
    """
    if ranks is None:
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else max(1, len(gpus))
    model, weights = adapted(run)
    config = cast(QTHAConfig, model.active_peft_config)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QTHALayer)}
    targets = _targets(config, layers)
    shared = shards(run, model)
    memory, unknown = None, ""
    try:
        memory = footprint(run, model, weights, shared).of_rank(ranks)
    except Exception as error:  # a model whose forward looks at values cannot run on the meta device
        unknown = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    tokens, sizes = run.tokens * run.accumulation, adapted_sizes(model)
    ranks_run = [cast(int, size.rank) for size in sizes if config.has_circuit and size.owned.runs]  # shared, it runs once
    of_layers = [rank // config.qubits_at(rank) for rank in ranks_run]
    work = step_flops(model, run.sequence_len, run.gradient_checkpointing)
    plan = Plan(
        base_model=run.base_model,
        dtype=str(run.dtype).removeprefix("torch."),
        quantisation=quantised_as(getattr(model.config, "quantization_config", None)),
        rank=config.rank,
        bond_dim=config.bond_dim,
        mid_dim=config.mid_dim,
        quantum=branch(config),
        shared=in_words(config.share, layers),
        targets=targets,
        parameters=sum(target.total for target in targets),
        lora_parameters=sum(target.count * target.lora_parameters for target in targets),
        note=" ".join(filter(None, (in_ranks(config, sizes), gave_way(config, sizes)))),
        micro_batch_size=run.micro_batch_size,
        sequence_len=run.sequence_len,
        tokens_per_step=tokens,
        gradient_checkpointing=run.gradient_checkpointing,
        memory=memory,
        memory_unknown=unknown,
        circuits_per_step=tokens * sum(of_layers),
        circuits_per_token=config.blocks if config.has_circuit else 0,
        circuits_share=work.circuit / work.total,
        shift_circuits=_shift_circuits(config),
        qubits=ansatz(config).qubits if config.has_circuit else 0,
        gates=gate_counts(config) if config.has_circuit else {},
        slow=_slow(config),
        gpus=gpus,
        ranks=ranks,
        sharing=shared.sharing.name(ranks),
        loading=shared.loading(weights, ranks),
        advice=[],
    )
    return replace(plan, advice=_advice(run, plan)) if advise and plan.fits is False else plan


def find_settings(run: TrainingRun, budget: float) -> list[Setting]:
    """Return shapes of the adapter with at most `budget` of the parameters of LoRA of the same rank, on the YAML's modules.

    Raises:
        ValueError: if `budget` is not a share in (0, 1], or nothing meets it, or with `mpo: none`.
    """
    base = run.base()
    config = run.adapter_settings.config_for(base)
    config.mpo = "tt" if config.mpo == "auto" else config.mpo
    if config.mpo == "none":
        why = "leaves out the tensor networks, whose bond_dim and mid_dim would be found"
        raise refusal("mpo", config.mpo, why, "`mpo: tt`, or `share: {layers: auto}`, which keeps to param_budget by itself")
    sizes = list(select_targets(config, base).values())
    free: dict[str, Any] = {"bond_dim": None, "mid_dim": None, "param_budget": budget}
    settings = []
    for rank in sorted({config.rank, *RANKS}):
        free["qubits"] = config.qubits if config.qubits and rank % config.qubits == 0 else None
        for cores in sorted({config.num_cores, *CORES}):
            factors: dict[str, Any] = {} if cores == config.num_cores else {"in_factors": None, "out_factors": None}
            try:
                shape = resolve(config.changed(rank=rank, num_cores=cores, **free, **factors), sizes)
            except ValueError:
                continue
            total = count_parameters(shape, sizes)
            assert shape.bond_dim is not None
            assert shape.mid_dim is not None
            share = total / count_lora_parameters(rank, sizes)
            settings.append(Setting(rank, cores, shape.bond_dim, shape.mid_dim, total, share))
    if not settings:
        resolve(config.changed(**free), sizes)  # raises, with the smallest budget that can be met
    return settings


def adapted(run: TrainingRun) -> tuple[PeftModel, int]:
    """Return the base with adapters on the meta device, and the bytes of the base alone."""
    base = run.base()
    weights = weight_bytes(base)
    model = cast(PeftModel, get_peft_model(base, run.adapter_settings.config_for(base)))
    model.train()
    base.enable_input_require_grads()
    return model, weights


def _targets(config: QTHAConfig, layers: dict[str, Any]) -> list[Target]:
    owned: dict[tuple[str, int, int, int], list[int]] = {}
    for name, layer in layers.items():
        shape = layer.qtha_adapter[layer.active_adapters[0]].shape
        kind = name.rsplit(".", 1)[-1], layer.in_features, layer.out_features, shape.rank
        owned.setdefault(kind, []).append(shape.num_parameters)
    targets = []
    for (name, inputs, outputs, rank), entries in owned.items():
        shape = adapter_shape(config, inputs, outputs, rank=rank)
        bonds = tuple(bond for mpo in (shape.mpo_a, shape.mpo_b) if mpo for bond in mpo.bonds[1:-1])
        targets.append(
            Target(
                name,
                len(entries),
                inputs,
                outputs,
                shape.mpo_a.inputs.sizes if shape.mpo_a else (),
                shape.mpo_b.outputs.sizes if shape.mpo_b else (),
                bonds,
                shape.num_parameters,
                sum(entries),
                count_lora_parameters(rank, [(inputs, outputs)]),
            )
        )
    return targets


def _slow(config: QTHAConfig) -> str:
    """Return what is to be said of a circuit that no fast engine runs, "" of others."""
    if config.circuit is None or config.quantum_backend != "torch" or not ansatz(config).is_own:
        return ""
    return slowness(ansatz(config))


def _shift_circuits(config: QTHAConfig) -> int:
    simulation = config.simulation
    if not config.has_circuit or simulation.backend not in AER or simulation.gradient == "adjoint":
        return 0
    from ..circuit.shifts import GateAngles, shift_circuits

    return shift_circuits(GateAngles(ansatz(config)))


def _advice(run: TrainingRun, plan: Plan) -> list[str]:
    """Return changes that make it fit: each that does alone, or else the first few together."""
    changes = _changes(run, plan)
    texts = [text for text, change in changes if _changed(run, plan, [change]).fits]
    if texts:
        return texts
    for count in range(2, len(changes) + 1):
        if _changed(run, plan, [change for _, change in changes[:count]]).fits:
            return ["; and ".join(text for text, _ in changes[:count])]
    return ["a larger GPU, a smaller base_model, or the base shared over several GPUs (DeepSpeed ZeRO-3, FSDP2)"]


def _changes(run: TrainingRun, plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    changes: list[tuple[str, dict[str, Any]]] = []
    if not plan.gradient_checkpointing:
        changes.append(("`gradient_checkpointing: true`", {"gradient_checkpointing": True}))
    if plan.quantisation == "none":
        changes.append(("`load_in_4bit: true`", {"load_in_4bit": True}))
    if plan.ranks > 1 and not (
        run.deepspeed or run.fsdp or run.quantised_to == "load_in_8bit"
    ):  # the weights are whole on every rank
        changes.append((f"`deepspeed: {ZERO3}`", {"deepspeed": {"zero_optimization": ZERO3_SETTINGS}}))
    if run.micro_batch_size > 1:
        steps = run.micro_batch_size * run.accumulation
        text = f"`micro_batch_size: 1` (and `gradient_accumulation_steps: {steps}`)"
        changes.append((text, {"micro_batch_size": 1}))
    if not run.fused_loss:
        text = "`plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]` with `cut_cross_entropy: true`"
        changes.append((text, {"cut_cross_entropy": True}))
    length = run.sequence_len // 2
    while length >= SHORTEST:
        changes.append((f"`sequence_len: {length}`", {"sequence_len": length}))
        length //= 2
    return changes


def _changed(run: TrainingRun, plan: Plan, changes: list[dict[str, Any]]) -> Plan:
    """Return the plan with the changes made."""
    merged: dict[str, Any] = {}
    for change in changes:
        merged |= change
    return make_plan(run.changed(merged), plan.gpus, advise=False, ranks=plan.ranks)
