"""What the ranks of a run exchange in an optimiser step, QTHA beside PEFT's LoRA of the same rank on the same frozen base.

Nothing is computed from formulas: processes train a decoder with random weights in float32 (gloo on a CPU, NCCL where there are
enough GPUs), and every collective of a step is recorded at c10d's operators, with its tensors. Shared as Axolotl 0.19 shares it:
DDP without a search for unused parameters; ZeRO by example_configs/deepspeed; FSDP2 by decoder block, and for LoRA each A and B
besides (axolotl.monkeypatch.accelerate.fsdp2); gradients clipped to 1.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from axolotl_qtha.bench import arguments
from axolotl_qtha.bench.step import SHAPES, adapters, random_base
from axolotl_qtha.terminal import console

SHARINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
BASE, LORA, LORA_BLOCKS = "none", "lora", "lora, by block"
CAPTION = """\
calls, MiB: collectives a rank takes part in, and what it sends into them (a broadcast counts on every rank); one step after the
first ones, in float32. gradients: of these the sums of gradients, during backward; ZeRO-2 and 3 exchange them in every
micro-batch, the others once a step. ring MiB: what a rank would put on the wire under the ring algorithm."""
SHARDED = """
Most of what ZeRO-3 and FSDP2 exchange are the frozen weights, the same for all adapters: `none` has no adapter and trains one
norm; `no base` is what comes on top of it. `lora` under fsdp2 is wrapped as Axolotl does it, each A and B of its own; `lora, by
block` as QTHA is."""
MOST_STEPS = 8  # until two in a row exchange the same; ZeRO-3 records its order of modules in the first ones

# The operators of c10d that may be met: the collective, and which argument holds what this rank sends into it.
_IN_PLACE = {"allreduce_": "all_reduce", "allreduce_coalesced_": "all_reduce", "reduce_": "reduce", "broadcast_": "broadcast"}
_FUNCTIONAL = {"all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
_INTO = {
    "all_gather": ("allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"),
    "reduce_scatter": ("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"),
}
OPERATORS: dict[str, tuple[str, int | None]] = {
    **{name: (collective, 0) for name, collective in (_IN_PLACE | _FUNCTIONAL).items()},
    **{name: (collective, 1) for collective, names in _INTO.items() for name in names},
    "barrier": ("barrier", None),
}
NO_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd")
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter")


class Collectives(TorchDispatchMode):
    """Counts the collectives this rank issues while it is entered, also those of C++ such as DDP's reducer.

    `counts` maps (phase, collective, dtype) to [calls, bytes into them, bytes on the ring]; `phase` is set by the user.

    Raises:
        NotImplementedError: on an operator of c10d that it does not know, rather than leave it out.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.phase = ranks, ""
        self.counts: dict[tuple[str, str, str], list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor goes first, and what it sends comes here again
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            self._record(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: Any) -> None:
        if name in NO_COLLECTIVES:
            return
        if name not in OPERATORS:
            raise NotImplementedError(f"the collective {name!r} is not known here; known: {', '.join(OPERATORS)}")
        collective, position = OPERATORS[name]
        tensors = [] if position is None else [leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        count = self.counts.setdefault((self.phase, collective, dtype), [0, 0, 0])
        for k, value in enumerate((1, size, ring_bytes(collective, size, self.ranks))):
            count[k] += value


def ring_bytes(collective: str, size: int, ranks: int) -> int:
    """Return the bytes one of N ranks puts on the wire under the ring algorithm, which NCCL and gloo may or may not choose.

    Args:
        collective: as in OPERATORS.
        size: bytes s this rank sends into it: all_reduce 2 (N-1)/N s; all_gather (N-1)/N of what is gathered, N s;
            reduce_scatter (N-1)/N s; broadcast and reduce s.
        ranks: N.
    """
    others = ranks - 1
    shares = {"all_reduce": 2 * others, "all_gather": others * ranks, "reduce_scatter": others}
    return round(size * shares.get(collective, ranks) / ranks)


@dataclass(frozen=True)
class Job:
    """One run to measure; `tokens` are those of a micro-batch, one sequence."""

    sharing: str  # of SHARINGS
    adapter: str  # of adapters_of(sharing)
    config: PreTrainedConfig
    rank: int = 8
    quantum: str = "qtha"
    accumulation: int = 2
    ranks: int = 2
    tokens: int = 32


class RankModel:
    """One rank's model and optimiser, wrapped for a kind of sharing."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job = job
        base: Any = random_base(job.config, 16, torch.device("cpu"))
        base.to(device)
        base.enable_input_require_grads()  # backward runs through all blocks, whatever is trained
        if job.adapter == BASE:
            base.model.norm.weight.requires_grad_(True)  # something must be trained: the last norm
            self.model: Any = base
        else:
            configs = list(adapters(job.rank, job.quantum).values())
            self.model = get_peft_model(base, configs[0 if job.adapter.startswith(LORA) else 1])
        self.model.train()
        torch.manual_seed(dist.get_rank())
        self.batches = torch.randint(job.config.vocab_size, (job.accumulation, 1, job.tokens)).to(device)
        if job.sharing == "ddp":
            # Axolotl sets ddp on several ranks, and with it ddp_find_unused_parameters to false where the YAML is silent
            self.model = DistributedDataParallel(self.model, device_ids=[device.index] if device.type == "cuda" else None)
        elif job.sharing == "fsdp2":
            self._shard(base, init_device_mesh(device.type, (job.ranks,)))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.parameters, self.tensors = sum(parameter.numel() for parameter in self.trained), len(self.trained)
        self.optimizer = torch.optim.AdamW(self.trained)
        if job.sharing.startswith("zero"):
            import deepspeed

            settings = deepspeed_settings(int(job.sharing[-1]), job.config.hidden_size, job.accumulation)
            self.model, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=settings)

    def _shard(self, base: Any, mesh: DeviceMesh) -> None:
        layers = [module for module in base.modules() if isinstance(module, LoraLayer)] if self.job.adapter == LORA else []
        parts = [part for layer in layers for part in (*layer.lora_A.values(), *layer.lora_B.values())]
        for module in (*parts, *base.model.layers, self.model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def step(self, seen: Collectives) -> None:
        """Train on the micro-batches, and update once: as transformers' trainer and Accelerate do."""
        zero, fsdp = self.job.sharing.startswith("zero"), self.job.sharing == "fsdp2"
        for k, ids in enumerate(self.batches):
            last = k == len(self.batches) - 1
            if fsdp:
                self.model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if zero or fsdp or last else self.model.no_sync():
                seen.phase = "forward"
                loss = self.model(input_ids=ids, labels=ids).loss / self.job.accumulation
                seen.phase = "backward"
                if zero:
                    self.model.set_gradient_accumulation_boundary(is_boundary=last)
                    self.model.backward(loss, scale_wrt_gas=False)
                else:
                    loss.backward()
        seen.phase = "step"
        if zero:
            with torch.no_grad():  # gloo writes what it gathers into a view that autograd tracks; nothing to NCCL
                self.model.step()  # clips, too
        else:
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


def deepspeed_settings(stage: int, hidden_size: int, accumulation: int) -> dict[str, Any]:
    """Return example_configs/deepspeed/zero{stage}.json with each `auto` as transformers and Accelerate fill it in."""
    zero = {"stage": stage, "overlap_comm": True} | ({"contiguous_gradients": True} if stage > 1 else {})
    if stage == 3:
        zero |= {
            "reduce_bucket_size": hidden_size**2,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    settings = {"gradient_accumulation_steps": accumulation, "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 1}
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9, **settings}


def run_rank(rank: int, job: Job, folder: str) -> None:
    """Train as one of the ranks until two steps in a row exchange the same, and write what to `folder`/`rank`.json.

    Raises:
        RuntimeError: if the steps keep differing.
    """
    with joined(rank, job.ranks, folder) as device:
        run = RankModel(job, device)
        before: dict[Any, list[int]] | None = None
        for _ in range(MOST_STEPS):
            with Collectives(job.ranks) as seen:
                run.step(seen)
            if seen.counts == before:
                break
            before = seen.counts
        else:
            raise RuntimeError(f"{job.sharing}, {job.adapter}: the steps do not settle, the last one exchanged {before}")
        counts = [[*key, *count] for key, count in sorted(seen.counts.items())]
        row = {"parameters": run.parameters, "tensors": run.tensors, "device": device.type, "counts": counts}
        Path(folder, f"{rank}.json").write_text(json.dumps(row))


@contextlib.contextmanager
def joined(rank: int, ranks: int, folder: str) -> Iterator[torch.device]:
    """Join a process group that meets in a file, as one of its ranks; gives the rank's device."""
    cuda = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    with open(os.devnull, "w") as nowhere:  # DeepSpeed prints and warns at every turn; errors reach the parent in another way
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}  # DeepSpeed reads them
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def start(function: Any, ranks: int, *args: Any) -> list[Any]:
    """Run function(rank, *args, folder) as that many ranks; return the JSON each leaves in folder/rank.json.

    Forked from a process that has made the imports, which take longer than the steps.
    """
    multiprocessing.set_forkserver_preload(["axolotl_qtha.bench.step", "deepspeed", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(function, (*args, folder), ranks, start_method="forkserver")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def measure(job: Job) -> dict[str, Any]:
    """Return what one rank sends in an optimiser step: in all, of gradients, and by phase and collective; in bytes.

    Raises:
        RuntimeError: if the ranks send different amounts.
    """
    rows = start(run_rank, job.ranks, job)
    if any(row != rows[0] for row in rows):
        raise RuntimeError(f"{job.sharing}, {job.adapter}: the ranks differ: {rows}")
    counts = rows[0]["counts"]
    # in backward, and of real numbers: DDP may also add up which parameters were used
    gradients = [c for c in counts if c[0] == "backward" and c[1] in REDUCTIONS and "int" not in c[2]]
    names = ("phase", "collective", "dtype", "collectives", "bytes", "ring_bytes")
    return {
        **{key: getattr(job, key) for key in ("sharing", "adapter", "ranks", "accumulation")},
        **{key: rows[0][key] for key in ("device", "parameters", "tensors")},
        **{names[k]: sum(c[k] for c in counts) for k in (3, 4, 5)},
        **{f"gradient_{names[k]}": sum(c[k] for c in gradients) for k in (3, 4, 5)},
        "detail": [dict(zip(names, c, strict=True)) for c in counts],
    }


def adapters_of(sharing: str, quantum: str) -> list[str]:
    """Return what is measured: without an adapter where frozen weights are exchanged, too."""
    ours = [f"qtha, quantum: {quantum}"]
    return {"zero3": [BASE, LORA], "fsdp2": [BASE, LORA, LORA_BLOCKS]}.get(sharing, [LORA]) + ours


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row of one sharing its bytes relative to LoRA's: `to_lora`, and `to_lora_without_base`."""
    size = {row["adapter"]: row["bytes"] for row in rows}
    base = size.get(BASE, 0)
    for row in rows:
        row["to_lora"] = row["bytes"] / size[LORA]
        row["to_lora_without_base"] = (row["bytes"] - base) / (size[LORA] - base)


def main() -> None:
    """Run the benchmark and print its table."""
    options = arguments.parser(__doc__, rank=8, quantum="qtha")
    options.add_argument("--only", choices=SHARINGS, nargs="+", default=SHARINGS, help="ways to share a run")
    options.add_argument("--model", choices=list(SHAPES), default="small", help="shape of the base")
    options.add_argument("--ranks", type=int, default=2, help="processes that share a run")
    options.add_argument("--accumulation", type=int, default=2, help="micro-batches per optimiser step")
    options.add_argument("--tokens", type=int, default=32, help="tokens per micro-batch, which change nothing")
    args = options.parse_args()
    if args.ranks < 2 or args.accumulation < 1:
        options.error(
            f"--ranks {args.ranks} --accumulation {args.accumulation}. What works: --ranks 2, --accumulation 1, or more"
        )
    if torch.cuda.device_count() < args.ranks:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    out = console(130)
    jobs = [(sharing, adapter) for sharing in args.only for adapter in adapters_of(sharing, args.quantum)]
    rows: dict[str, list[dict[str, Any]]] = {sharing: [] for sharing in args.only}
    sizes = (args.rank, args.quantum, args.accumulation, args.ranks, args.tokens)
    for sharing, adapter in track(jobs, description="measuring", console=out):
        rows[sharing].append(measure(Job(sharing, adapter, SHAPES[args.model], *sizes)))
    for group in rows.values():
        compare(group)
    show(out, rows, f"{args.model} on {args.ranks} ranks, adapters of rank {args.rank}")
    arguments.write_json(args, [row for group in rows.values() for row in group])


def show(out: Console, rows: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Print the table."""
    first = next(iter(rows.values()))[0]
    batches = f"{first['accumulation']} micro-batch{'es' if first['accumulation'] > 1 else ''}"
    table = Table(title=f"exchanged in an optimiser step of {batches}, {title} ({first['device']})")
    columns = ("sharing", "adapter", "trained", "calls", "MiB", "gradients: calls", "MiB", "ring MiB", "x LoRA", "no base x LoRA")
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k < 2 else "right")
    for sharing, group in rows.items():
        for row in group:
            mib = [f"{row[key] / 2**20:,.3f}" for key in ("bytes", "gradient_bytes", "ring_bytes")]
            calls, gradients = f"{row['collectives']:,}", f"{row['gradient_collectives']:,}"
            ratios = [f"{row['to_lora']:.3f}", "" if row["adapter"] == BASE else f"{row['to_lora_without_base']:.3f}"]
            table.add_row(sharing, row["adapter"], f"{row['parameters']:,}", calls, mib[0], gradients, mib[1], mib[2], *ratios)
        table.add_section()
    out.print(table)
    out.print(CAPTION + (SHARDED if {"zero3", "fsdp2"} & rows.keys() else ""), highlight=False)


if __name__ == "__main__":
    main()
