"""What one rank keeps of a run on many: DDP, DeepSpeed's ZeRO-1, 2 and 3, FSDP2.

| kept by each rank of N | DDP | ZeRO-1 | ZeRO-2 | ZeRO-3, FSDP2 |
|---|---|---|---|---|
| optimiser states | all | 1/N | 1/N | 1/N |
| gradients | all | all | 1/N | 1/N |
| frozen weights, adapter | all | all | all | 1/N, and what is gathered at the peak |

Never sharded: buffers, and the scales of 4-bit weights, which bitsandbytes keeps beside the parameter. ZeRO casts what is
trained to the 16 bits of `bf16:` or `fp16:`, and keeps a float32 master copy with the optimiser's states. Its buckets for
gradients are as large as the settings say, however small the adapter. Not counted: float32 gradients, made while the optimiser
steps, when no activations are left (DeepSpeed's own estimators count them).

Gathered at the peak (DeepSpeed 0.18.9, partitioned_param_coordinator.py; torch 2.13, _fsdp_param_group.py):

* ZeRO-3: its fetching, prefetching and releasing is followed through a forward and backward, module by module; what it gathers
  at a time is there twice, in the buffer that it arrives in and as parameters. Parameters up to
  `stage3_param_persistence_threshold` stay whole on every rank.
* FSDP2: the parameters outside the wrapped blocks all the time, and two blocks: the one that computes and the next.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from ..settings.meta_base import QuantisedLinear
from ..settings.parallel import zero_stage
from ..settings.training_run import TrainingRun

MASTER_BYTES = 4  # of ZeRO's float32 copy of what is trained
HALF_BYTES = 2
BUCKET = 500_000_000  # entries, DeepSpeed's default for gradients and for updated parameters
PLACES = {"cpu": "on the CPU", "nvme": "on NVMe"}


@dataclass(frozen=True)
class Sharing:
    """How a run is shared among its ranks."""

    kind: str  # "", "deepspeed" or "fsdp"
    stage: int  # as ZeRO counts: what is sharded is 0 nothing, 1 optimiser states, 2 gradients too, 3 parameters too
    settings: dict[str, Any]  # of zero_optimization or fsdp_config; without what is "auto"
    half: bool  # what is gathered and reduced has 16 bits
    parameters_at: str = ""  # where the sharded parameters are if not on the GPU, a value of PLACES
    optimiser_at: str = ""

    def name(self, ranks: int) -> str:
        """Return a short name, such as "ZeRO-3, parameters on the CPU"."""
        if not self.kind:
            return "DDP" if ranks > 1 else "not shared"
        name = "FSDP2" if self.kind == "fsdp" else f"ZeRO-{self.stage}" if self.stage else "DeepSpeed without ZeRO"
        away = [("optimiser", self.optimiser_at), ("parameters", self.parameters_at)]
        return name + "".join(f", {what} {place}" for what, place in away if place)


def sharing(run: TrainingRun, hidden_size: int = 0) -> Sharing:
    """Return how a run is shared.

    Args:
        run: the training.
        hidden_size: of the base, for what transformers and Accelerate put in the place of "auto".

    Raises:
        ValueError: if DeepSpeed's settings name no stage that there is.
    """
    half, whole = run.half, run.deepspeed
    if run.fsdp:
        place = PLACES["cpu"] if run.fsdp.get("offload_params") else ""
        return Sharing("fsdp", 3, run.fsdp, half, place, place)
    if not whole:
        return Sharing("", 0, {}, half)
    filled = {  # DeepSpeed's own default takes the place of any other "auto"
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero = whole.get("zero_optimization") or {}
    settings = {key: filled.get(key) if value == "auto" else value for key, value in zero.items()}
    enabled = [(whole.get(kind) or {}).get("enabled", "auto") for kind in ("bf16", "fp16")]
    half = any(value is True for value in enabled) or (half and "auto" in enabled)
    places = [PLACES.get(str((zero.get(key) or {}).get("device")), "") for key in ("offload_param", "offload_optimizer")]
    stage = zero_stage(whole)
    return Sharing("deepspeed", stage, settings, half, places[0] if stage == 3 else "", places[1] if stage else "")


@dataclass(frozen=True)
class Gathers:
    """All-gathers of parameters in one forward and backward."""

    peak: int = 0  # bytes on top of a rank's own, the most at any time
    total: int = 0  # bytes gathered
    calls: int = 0


@dataclass(frozen=True)
class Shards:
    """Bytes of a model's parameters that the ranks share, and of what they exchange."""

    sharing: Sharing
    frozen: int  # bytes of frozen weights that can be sharded
    trained: int  # entries
    trained_bytes: int
    persistent_frozen: int  # bytes that ZeRO-3 keeps whole on every rank
    persistent_trained: int
    buckets: int  # bytes of DeepSpeed's buffers for gradients
    blocks: int  # decoder blocks
    gathers: Gathers
    quantised: bool

    def weights(self, whole: int, ranks: int) -> int:
        """Return one rank's bytes of the frozen weights, of `whole` in all."""
        if self.sharing.stage < 3:
            return whole
        own = 0 if self.sharing.parameters_at else math.ceil(self.frozen / ranks)
        return whole - self.frozen + own + self.persistent_frozen

    def loading(self, whole: int, ranks: int) -> int:
        """Return the bytes each rank's GPU holds while the base is loaded, where that is more than its share; else 0.

        transformers quantises on the GPU, and uses zero.Init for full precision only (PreTrainedModel.get_init_context).
        """
        return whole if self.quantised and self.sharing.stage == 3 and ranks > 1 else 0

    def adapter(self, ranks: int) -> int:
        """Return one rank's bytes of what is trained."""
        if self.sharing.stage < 3:
            return self.trained_bytes
        return (0 if self.sharing.parameters_at else math.ceil(self.trained_bytes / ranks)) + self.persistent_trained

    def gradients(self, ranks: int) -> int:
        """Return one rank's bytes of gradients, in the dtype of what is trained."""
        if self.sharing.stage < 2:
            return self.trained_bytes
        return 0 if self.sharing.optimiser_at else math.ceil(self.trained_bytes / ranks)

    def optimiser(self, states: int, ranks: int) -> int:
        """Return one rank's bytes of the optimiser's states, of `states` in all, and of ZeRO's master copy."""
        states += MASTER_BYTES * self.trained if self.sharing.kind == "deepspeed" else 0
        if self.sharing.optimiser_at:
            return 0
        return math.ceil(states / ranks) if self.sharing.stage else states


def shards(run: TrainingRun, model: PeftModel) -> Shards:
    """Return what the ranks share of a model with adapters, on the meta device."""
    config: Any = model.get_base_model().config
    config = config if hasattr(config, "hidden_size") else config.get_text_config()
    how = sharing(run, config.hidden_size)
    sizes = _sizes(model, how)
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    blocks = list(decoder_blocks(model, how.settings.get("transformer_layer_cls_to_wrap")))
    persistent: set[int] = set()
    gathers = Gathers()
    if how.kind == "fsdp":
        gathers = _fsdp2(model, blocks, sizes, how.settings.get("reshard_after_forward") is not False)
    elif how.stage == 3:
        width = HALF_BYTES if how.half else 4
        limit = width * _number(how, "stage3_param_persistence_threshold", 100_000)
        persistent = {key for key, size in sizes.items() if size <= limit}
        steps = _trace(model, blocks, run.gradient_checkpointing)
        gathers = _zero3([[id(p) for p in step] for step in steps], sizes, persistent, how, width)
    return Shards(
        sharing=how,
        frozen=sum(size for key, size in sizes.items() if key not in trained),
        trained=sum(trained.values()),
        trained_bytes=_trained_bytes(model, how),
        persistent_frozen=sum(sizes[key] for key in persistent if key not in trained),
        persistent_trained=sum(sizes[key] for key in persistent if key in trained),
        buckets=_buckets(how),
        blocks=len(blocks),
        gathers=gathers,
        quantised=any(isinstance(module, QuantisedLinear) for module in model.modules()),
    )


def decoder_blocks(model: PeftModel, names: str | list[str] | None = None) -> Iterator[nn.Module]:
    """Yield the blocks that are checkpointed and wrapped one by one: of the classes named, else as transformers has them."""
    base: Any = model.get_base_model()
    named = names.split(",") if isinstance(names, str) else names
    wanted = {name.strip() for name in named or getattr(base, "_no_split_modules", None) or []}
    yield from (module for module in base.modules() if type(module).__name__ in wanted)


def _sizes(model: PeftModel, how: Sharing) -> dict[int, int]:
    """Return the bytes of each parameter that can be sharded, as it is gathered."""
    base: Any = model.get_base_model()
    quantisation = getattr(base.config, "quantization_config", None) or {}
    # bitsandbytes' 4-bit weights are parameters, their scales are not; GPTQ and AWQ keep weights in buffers, which stay whole
    packed = 2 if quantisation.get("load_in_4bit") else 0
    layers = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    quantised = {id(layer.weight): layer.weight.numel() // packed if packed else 0 for layer in layers}
    width = {True: HALF_BYTES} if how.half else {}
    return {id(p): quantised.get(id(p), p.numel() * (width.get(p.requires_grad) or p.element_size())) for p in model.parameters()}


def _trained_bytes(model: PeftModel, how: Sharing) -> int:
    """Return the bytes of what is trained, as a rank stores it: FSDP2 casts only what it gathers."""
    cast = HALF_BYTES if how.half and how.kind == "deepspeed" else 0
    return sum(p.numel() * (cast or p.element_size()) for p in model.parameters() if p.requires_grad)


def _buckets(how: Sharing) -> int:
    """Return the bytes of DeepSpeed's buffers for gradients: two with overlap_comm in ZeRO-1 and 2, one in ZeRO-3."""
    if how.kind != "deepspeed" or not how.stage or how.settings.get("contiguous_gradients") is False:
        return 0
    count = 2 if how.settings.get("overlap_comm") and how.stage < 3 else 1
    return count * bucket_entries(how) * (HALF_BYTES if how.half else 4)


def bucket_entries(how: Sharing) -> int:
    """Return how many entries DeepSpeed reduces at a time."""
    return _number(how, "reduce_bucket_size", BUCKET)


def _number(how: Sharing, key: str, default: int) -> int:
    value = how.settings.get(key)
    return default if value is None else int(float(value))


def _fsdp2(model: PeftModel, blocks: list[nn.Module], sizes: dict[int, int], reshard: bool) -> Gathers:
    groups = [sum(sizes[key] for key in {id(p) for p in block.parameters()}) for block in blocks]
    inside = {id(p) for block in blocks for p in block.parameters()}
    root = sum(size for key, size in sizes.items() if key not in inside)
    whole = root + sum(groups)
    if not reshard:  # gathered once, and kept until backward
        return Gathers(whole + max([root, *groups]), whole, len(groups) + 1)
    # at the start of backward the root's parameters are there twice: as they arrive, and copied out
    return Gathers(root + max(root, sum(sorted(groups)[-2:])), 2 * whole, 2 * (len(groups) + 1))


def _trace(model: PeftModel, blocks: list[nn.Module], checkpointing: bool) -> list[list[nn.Parameter]]:
    """Return the parameters of every module that has some, in the order of a forward and backward."""
    starts = {id(block) for block in blocks}
    segments: list[tuple[bool, list[list[nn.Parameter]]]] = []
    left = 0  # modules of the present block still to come
    for module in model.get_base_model().modules():
        if id(module) in starts and not left:
            left = sum(1 for _ in module.modules())
            segments.append((True, []))
        elif not left and (not segments or segments[-1][0]):
            segments.append((False, []))
        own = list(module.parameters(recurse=False))
        if own:
            segments[-1][1].append(own)
        left = max(0, left - 1)
    forward = [step for _, segment in segments for step in segment]
    backward = []
    for block, segment in reversed(segments):
        backward += segment if block and checkpointing else []
        backward += segment[::-1]
    return forward + backward


def _zero3(trace: list[list[int]], sizes: dict[int, int], persistent: set[int], how: Sharing, width: int) -> Gathers:
    """Follow DeepSpeed's coordinator through a recorded trace (fetch_sub_module, release_sub_module); limits count entries."""
    bucket = width * _number(how, "stage3_prefetch_bucket_size", 50_000_000)
    most = width * _number(how, "stage3_max_live_parameters", 1_000_000_000)
    reuse = width * _number(how, "stage3_max_reuse_distance", 1_000_000_000)
    uses: defaultdict[int, list[int]] = defaultdict(list)
    before = [0]  # bytes that the modules before each step hold
    for step, keys in enumerate(trace):
        for key in keys:
            uses[key].append(step)
        before.append(before[-1] + sum(sizes[key] for key in keys))
    queue = deque((step, key) for step, keys in enumerate(trace) for key in keys)
    passed: dict[int, int] = {}  # the latest use that prefetching has seen
    live: set[int] = set()
    held = peak = total = calls = 0
    for step, keys in enumerate(trace):
        wanted = [key for key in dict.fromkeys(keys) if key not in live and key not in persistent]
        held += sum(sizes[key] for key in wanted)
        live.update(wanted)
        while queue and queue[0][0] <= step:
            queue.popleft()
        ahead: dict[int, int] = {}
        room = min(most - held, bucket)
        while queue and sum(ahead.values()) < room:
            use, key = queue.popleft()
            passed[key] = use
            if key not in live and key not in persistent:
                ahead[key] = sizes[key]
        live.update(ahead)
        held += sum(ahead.values())
        arriving = [sum(sizes[key] for key in wanted), sum(ahead.values())]
        peak = max(peak, held + max(arriving))
        total += sum(arriving)
        calls += sum(size > 0 for size in arriving)
        for key in keys:
            if key in live and passed.get(key, -1) <= step and not _soon(uses[key], before, step, reuse):
                live.remove(key)
                held -= sizes[key]
    return Gathers(peak, total, calls)


def _soon(uses: list[int], before: list[int], step: int, distance: int) -> bool:
    """Return whether a parameter is used again within `distance` bytes of other parameters."""
    at = bisect.bisect_right(uses, step)
    return at < len(uses) and before[uses[at]] - before[step + 1] < distance
