"""Strong scaling, predicted: the time of one optimiser step on 1, 2, 4, ... ranks that share the same global batch.

Compute is FLOPs / achieved FLOP/s, see `flops.py`.

Communication is the alpha-beta model of a ring of N ranks (Thakur, Rabenseifner and Gropp, 2005; NCCL): each of an all-reduce's
2 (N - 1) steps, of an all-gather's or reduce-scatter's N - 1, moves 1/N of the bytes. Per optimiser step:

| | gradients | parameters |
|---|---|---|
| DDP | one all-reduce, in buckets of 25 MiB | - |
| ZeRO-1 | one all-reduce | one all-gather of what was updated |
| ZeRO-2 | an all-reduce a micro batch (DeepSpeed's use_multi_rank_bucket_allreduce) | one all-gather of what was updated |
| ZeRO-3 | a reduce-scatter a micro batch | all-gathers in every forward and backward; one of the small ones kept whole |
| FSDP2 | one reduce-scatter a block | all-gathers in every forward and backward |

Left out: the optimiser's own time, data loading, waiting for the slowest rank, transfers to and from an offloading CPU, DPO's
reference model, and dequantisation (it is in --tflops, if that was measured on a training).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..errors import refusal
from ..settings.training_run import TrainingRun
from ..timing import seconds
from ..tuner.config import QTHAConfig
from .estimate import adapted, gpu_bytes
from .flops import Flops, step_flops
from .memory import Footprint, footprint
from .sharding import BUCKET, HALF_BYTES, Shards, bucket_entries, shards

DDP_BUCKET = 25 * 2**20  # bytes, torch's default
CPU_TOKENS = 512  # of a measured matmul


@dataclass(frozen=True)
class Network:
    """Rings: within a node, and over several."""

    bandwidth: float = 300e9  # bytes per second and GPU inside a node: NVLink of an H100 node
    network: float = 50e9  # between nodes: 400 Gb/s InfiniBand for each GPU
    latency: float = 10e-6  # seconds of one step of a ring
    gpus_per_node: int = 8

    def gather(self, size: float, ranks: int, calls: int = 1) -> float:
        """Return the seconds of all-gathers or reduce-scatters of `size` bytes in all."""
        speed = self.bandwidth if ranks <= self.gpus_per_node else min(self.bandwidth, self.network)
        return (ranks - 1) * (size / ranks / speed + calls * self.latency)

    def all_reduce(self, size: float, ranks: int, calls: int = 1) -> float:
        """Return the seconds of all-reduces of `size` bytes in all: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size, ranks, calls)


@dataclass(frozen=True)
class Row:
    """Predicted seconds of one optimiser step; `lora` is LoRA of the same rank, on the same layers."""

    ranks: int
    micro_batches: int  # of each rank
    compute: float
    communication: float
    hidden: float  # the step, if communication hides behind compute as far as it can
    exposed: float  # the step, if none does
    speedup: float  # of `exposed`, over the first row
    efficiency: float  # speed-up over what as many times the ranks of the first row could give
    lora_communication: float
    lora_exposed: float
    gpu_bytes: int | None  # a GPU must have


@dataclass(frozen=True)
class Scaling:
    """A strong-scaling table."""

    base_model: str
    sharing: str
    offloads: bool
    global_batch: int  # sequences of an optimiser step
    tokens: int  # of an optimiser step
    flops: Flops
    lora_flops: float  # of one token
    tflops: float  # of one rank
    measured: str  # how tflops was measured; empty if it was given
    network: Network
    rows: list[Row]
    left_out: list[int]  # ranks that the global batch does not spread over evenly


def predict(
    run: TrainingRun, ranks: int, network: Network, tflops: float | None = None, global_batch: int | None = None
) -> Scaling:
    """Return the predicted strong scaling of a training.

    Args:
        run: the training.
        ranks: the most ranks.
        network: between them.
        tflops: TFLOP/s that one rank achieves in training; None measures a matmul on this machine.
        global_batch: sequences of an optimiser step, on any number of ranks; None for those of the YAML on `ranks`.

    Raises:
        ValueError: if the global batch spreads evenly over no number of ranks, or the base cannot be built.
    """
    micro = run.micro_batch_size
    batch = micro * run.accumulation * ranks if global_batch is None else global_batch
    counts = list(rank_counts(ranks))
    even = [count for count in counts if batch % (micro * count) == 0]
    if not even:
        works = f"a multiple of micro_batch_size ({micro}), such as {max(micro, round(batch / micro) * micro)}"
        raise refusal("--global-batch", batch, "spreads over no number of ranks in whole micro batches", works)
    model, weights = adapted(run)
    lora = lora_model(run, cast(QTHAConfig, model.active_peft_config))
    mine, theirs = shards(run, model), shards(run, lora)
    work = step_flops(model, run.sequence_len, run.gradient_checkpointing)
    measured = ""
    if tflops is None:
        tflops, measured = measure_tflops(model, run.tokens, run.dtype)
    used = _footprint(run, model, weights, mine)
    tokens = batch // micro * run.tokens
    lora_flops = work.total - work.circuit
    rows: list[Row] = []
    for count in even:
        micros = batch // (micro * count)
        compute, lora_compute = (tokens / count * each / (tflops * 1e12) for each in (work.total, lora_flops))
        moved, lora_moved = (communication(each, network, count, micros) for each in (mine, theirs))
        exposed = compute + moved
        speedup = rows[0].exposed / exposed if rows else 1.0
        need = gpu_bytes(max(used.of_rank(count).total, mine.loading(weights, count))) if used else None
        hidden, efficiency = max(compute, moved), speedup * even[0] / count
        rows.append(
            Row(count, micros, compute, moved, hidden, exposed, speedup, efficiency, lora_moved, lora_compute + lora_moved, need)
        )
    how = mine.sharing
    return Scaling(
        base_model=run.base_model,
        sharing=how.name(2),
        offloads=bool(how.parameters_at or how.optimiser_at),
        global_batch=batch,
        tokens=tokens,
        flops=work,
        lora_flops=lora_flops,
        tflops=tflops,
        measured=measured,
        network=network,
        rows=rows,
        left_out=[count for count in counts if count not in even],
    )


def rank_counts(most: int) -> Iterator[int]:
    """Yield 1, 2, 4, ... up to `most`, and `most` itself.

    >>> list(rank_counts(12))
    [1, 2, 4, 8, 12]
    """
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


def communication(shared: Shards, network: Network, ranks: int, micro_batches: int) -> float:
    """Return the seconds of communication in one optimiser step; 0 on one rank."""
    how, size, gathers = shared.sharing, shared.trained_bytes, shared.gathers
    if ranks == 1:
        return 0.0
    if how.stage == 0:
        return network.all_reduce(size, ranks, math.ceil(size / DDP_BUCKET))
    fetched = micro_batches * network.gather(gathers.total, ranks, gathers.calls)
    if how.kind == "fsdp":
        reduced = HALF_BYTES * shared.trained if how.half else size
        return fetched + network.gather(reduced, ranks, shared.blocks)
    calls = math.ceil(shared.trained / bucket_entries(how))
    if how.stage == 3:
        kept = shared.persistent_trained + shared.persistent_frozen
        return fetched + micro_batches * network.gather(size, ranks, calls) + network.gather(kept, ranks)
    updated = network.gather(size, ranks, math.ceil(shared.trained / BUCKET))
    return (micro_batches if how.stage == 2 else 1) * network.all_reduce(size, ranks, calls) + updated


def lora_model(run: TrainingRun, config: QTHAConfig) -> PeftModel:
    """Return the base with PEFT's LoRA of the same rank on the same layers, on the meta device."""
    same = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    others = {key: getattr(config, key) for key in same}
    lora = LoraConfig(r=config.rank, rank_pattern=config.rank_pattern or {}, task_type=config.task_type, **others)
    return cast(PeftModel, get_peft_model(run.base(), lora))


def measure_tflops(model: PeftModel, tokens: int, dtype: torch.dtype, repeats: int = 5) -> tuple[float, str]:
    """Return the TFLOP/s of a matmul with the base's largest layer but the head, and in words what was measured.

    A GPU multiplies in the training's dtype, a CPU in float32.
    """
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    layer = max(layers, key=lambda m: m.in_features * m.out_features)
    inputs, outputs = layer.in_features, layer.out_features
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU (no GPU here)"
    if device.type == "cpu":
        tokens, dtype = min(tokens, CPU_TOKENS), torch.float32
    x, weight = (torch.randn(rows, inputs, device=device, dtype=dtype) for rows in (tokens, outputs))
    times = [seconds(lambda: x @ weight.T, device) for _ in range(repeats + 2)][2:]  # the first two warm up
    rate = 2 * tokens * inputs * outputs / statistics.median(times) / 1e12
    name = str(dtype).removeprefix("torch.")
    return rate, f"measured on {place}: {tokens} x {inputs} times {inputs} x {outputs} in {name}"


def _footprint(run: TrainingRun, model: PeftModel, weights: int, shared: Shards) -> Footprint | None:
    try:
        return footprint(run, model, weights, shared)
    except Exception:  # a model whose forward looks at values; its plan says so
        return None
