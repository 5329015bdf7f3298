"""The plan as tables, for a person."""

from __future__ import annotations

import torch
from axolotl.utils.logging import get_logger
from rich.console import Console
from rich.table import Table

from ..settings.meta_base import UnknownBase
from ..settings.training_run import TrainingRun
from ..terminal import console
from ..tuner.described import compared
from .estimate import CONTEXT_BYTES, FRAGMENTATION, Plan, Setting, local_gpus, make_plan
from .memory import Memory
from .scaling import Network, Scaling

LOG = get_logger(__name__)
AER_SECONDS = 1e-4  # a small circuit on Aer without noise, as measured on this project's CPU


def show_plan(plan: Plan, out: Console) -> None:
    """Print the plan."""
    out.print(_targets(plan))
    out.print(_verdict(plan), highlight=False)
    if plan.memory is None:
        out.print(f"Memory is not known: the model cannot run without weights ({plan.memory_unknown}).", markup=False)
    else:
        out.print(_memory(plan, plan.memory))
        out.print(_fit(plan), highlight=False, markup=False)
    if plan.circuits_per_step:
        gates = ", ".join(f"{count} {gate.upper()}" for gate, count in plan.gates.items())
        fewer = ", fewer where layers share one" if plan.shared else ""
        circuit = f"{plan.qubits} qubit{'s' * (plan.qubits > 1)} and {gates}"
        again = "; each is simulated forward twice (checkpointing) and backward once" if plan.gradient_checkpointing else ""
        out.print(
            f"Circuits per step and {_place(plan)}: {plan.circuits_per_step:,} ({plan.circuits_per_token} per adapted layer and "
            f"token{fewer}, {plan.tokens_per_step:,} tokens) of {circuit}{again}. They are "
            f"{plan.circuits_share:.1%} of a step's arithmetic.",
            highlight=False,
        )
    if plan.slow:
        out.print(plan.slow, highlight=False, markup=False)
    if plan.shift_circuits:
        circuits = plan.circuits_per_step * (1 + plan.shift_circuits)
        out.print(
            f"Aer runs each of them, and {plan.shift_circuits:,} shifted ones for its gradient: {circuits:,} circuits, at 0.1 ms "
            f"each {_duration(circuits * AER_SECONDS)} a step. Less with fewer target_modules, tokens, rank, qubits or "
            "circuit_layers, or with `gradient: adjoint`.",
            highlight=False,
        )


def show_in_short(plan: Plan, out: Console) -> None:
    """Print two lines of the plan: parameters beside LoRA's, and memory."""
    memory = _fit(plan) if plan.memory else f"Memory is not known: the model cannot run without weights ({plan.memory_unknown})."
    for line in (_verdict(plan), memory):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def show_before_training(run: TrainingRun) -> None:
    """Print the plan of a training that begins; wrong `qtha:` settings stop here, before the weights are downloaded."""
    try:
        with torch.random.fork_rng(devices=[]):  # the training draws the same numbers as without a plan
            plan = make_plan(run, local_gpus(), advise=False)
    except UnknownBase as error:  # the run itself may yet know how to load it
        LOG.info(f"no plan: {error}")
        return
    show_plan(plan, console())
    if plan.fits is False:
        LOG.warning("this may not fit the GPU; `axolotl qtha-plan` with this configuration says what would.")


def show_settings(settings: list[Setting], budget: float, rank: int, out: Console) -> None:
    """Print the shapes that meet a budget."""
    table = Table(title=f"settings within {budget:.0%} of LoRA's parameters at the same rank")
    for column in ("rank", "num_cores", "bond_dim", "mid_dim", "parameters", "of LoRA"):
        table.add_column(column, justify="right")
    for i, row in enumerate(settings):
        style = "bold" if row.rank == rank else None
        cells = (row.rank, row.num_cores, row.bond_dim, row.mid_dim, f"{row.parameters:,}", f"{row.share:.1%}")
        last = i + 1 == len(settings) or settings[i + 1].rank != row.rank
        table.add_row(*map(str, cells), style=style, end_section=last)
    out.print(table)
    out.print("Each has the widest bond_dim, then the widest mid_dim, that its rank and num_cores allow.", highlight=False)


def show_scaling(scaling: Scaling, out: Console) -> None:
    """Print a strong-scaling table."""
    title = (
        f"PREDICTED time of an optimiser step: {scaling.base_model}, {scaling.sharing}, global batch {scaling.global_batch} "
        f"sequences ({scaling.tokens:,} tokens)"
    )
    table = Table(title=title)
    for column in (
        "ranks",
        "micro\nbatches",
        "compute\nms",
        "commun.\nms",
        "step ms,\nall hidden",
        "step ms,\nnone hidden",
        "speed-up",
        "effi-\nciency",
        "LoRA\ncommun. ms",
        "LoRA step ms,\nnone hidden",
        "GiB a GPU\nneeds",
    ):
        table.add_column(column, justify="right")
    for row in scaling.rows:
        times = (row.compute, row.communication, row.hidden, row.exposed)
        table.add_row(
            f"{row.ranks}",
            f"{row.micro_batches}",
            *(_ms(value) for value in times),
            f"{row.speedup:.2f}",
            f"{row.efficiency:.1%}",
            *(_ms(value) for value in (row.lora_communication, row.lora_exposed)),
            "-" if row.gpu_bytes is None else f"{row.gpu_bytes / 2**30:,.1f}",
        )
    out.print(table)
    out.print(_assumed(scaling), highlight=False, markup=False)


def _ms(seconds: float) -> str:
    """Return milliseconds, with two digits after the point where there are few before it."""
    return f"{1e3 * seconds:,.{2 if seconds < 10 else 1}f}"


def _assumed(scaling: Scaling) -> str:
    """Return what the table rests on."""
    flops, net = scaling.flops, scaling.network
    rate = f"{scaling.tflops:,.3g} TFLOP/s per rank, {scaling.measured or 'as given with --tflops'}"
    lines = [
        "Nothing of this was run: it is a model of a run.",
        f"Compute: {flops.total / 1e9:,.2f} GFLOP a token (frozen layers {flops.linear / flops.total:.1%}, attention "
        f"{flops.attention / flops.total:.1%}, adapters {flops.adapter / flops.total:.1%}, circuits about "
        f"{flops.circuit / flops.total:.1%}), at {rate}.",
        f"Rings: {net.bandwidth / 1e9:g} GB/s per GPU inside a node of {net.gpus_per_node}{_default(net, 'bandwidth')}, over "
        f"several {min(net.network, net.bandwidth) / 1e9:g} GB/s{_default(net, 'network')}, {net.latency * 1e6:g} us a step"
        f"{_default(net, 'latency')}.",
        "LoRA has the same rank and layers: more bytes to exchange, no circuit (counted at the same rate, which circuits do not "
        "reach).",
    ]
    if scaling.measured and "CPU" in scaling.measured:
        lines.append("These are the times of ranks as slow as this CPU: for GPUs give --tflops.")
    if scaling.offloads:
        lines.append("Transfers between GPU and CPU are not counted: a run that offloads takes longer.")
    if scaling.left_out:
        counts = ", ".join(map(str, scaling.left_out))
        lines.append(f"Left out: {counts} ranks, over which {scaling.global_batch} sequences make no whole micro batches.")
    if scaling.rows[0].ranks > 1:
        lines.append(f"Speed-up and efficiency are over {scaling.rows[0].ranks} ranks.")
    return "\n".join(lines)


def _default(network: Network, key: str) -> str:
    words = {"bandwidth": "NVLink of an H100", "network": "400 Gb/s InfiniBand", "latency": "assumed"}
    return f" ({words[key]})" if getattr(network, key) == getattr(Network(), key) else ""


def _duration(seconds: float) -> str:
    """Return a time in its natural unit."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _targets(plan: Plan) -> Table:
    table = Table(title=f"{plan.base_model}: {sum(target.count for target in plan.targets)} adapted layers")
    for column in ("layer", "in x out", "in factors", "out factors", "bond", "mid", "parameters", "LoRA", "ratio"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for target in plan.targets:
        bonds = sorted(set(target.bonds))  # small sizes cannot fill the widest bond
        table.add_row(
            f"{target.count} x {target.name}",
            f"{target.in_features} x {target.out_features}",
            " x ".join(map(str, target.in_factors)) or "-",
            " x ".join(map(str, target.out_factors)) or "-",
            "-".join(map(str, bonds)) or "-",
            str(plan.mid_dim or "-"),
            f"{target.total / target.count:,.0f}",  # the mean, where layers share some
            f"{target.lora_parameters:,}",
            f"{target.total / target.count / target.lora_parameters:.3f}",
        )
    table.add_section()
    ratio = plan.parameters / plan.lora_parameters
    table.add_row("all", "", "", "", "", "", f"{plan.parameters:,}", f"{plan.lora_parameters:,}", f"{ratio:.3f}")
    return table


def _verdict(plan: Plan) -> str:
    network = "full matrices" if plan.bond_dim is None else f"bond_dim {plan.bond_dim}, mid_dim {plan.mid_dim}"
    compare = compared(plan.parameters, plan.lora_parameters)
    network += f", {plan.shared}" if plan.shared else ""
    verdict = f"rank {plan.rank}, {network}, {plan.quantum}: {compare} trainable parameters than LoRA of rank {plan.rank}."
    return f"{verdict} {plan.note}".strip()


def _memory(plan: Plan, memory: Memory) -> Table:
    table = Table(title=f"expected memory of one {_place(plan)}, {plan.micro_batch_size} x {plan.sequence_len} tokens")
    unit, divisor = ("GiB", 2**30) if memory.total >= 2**30 else ("MiB", 2**20)
    table.add_column("part")
    table.add_column(unit, justify="right")
    if plan.ranks > 1 or plan.sharing != "not shared":
        table.add_row(f"{plan.ranks} rank{'s' * (plan.ranks > 1)}, {plan.sharing}: memory of one rank", "", style="bold")
    on = "on" if plan.gradient_checkpointing else "off"
    for name, size in (
        (f"frozen weights ({plan.dtype}, quantisation: {plan.quantisation})", memory.weights),
        ("adapter", memory.adapter),
        ("gradients", memory.gradients),
        ("optimiser states", memory.optimiser),
        (f"activations kept for backward (checkpointing {on})", memory.activations),
        ("circuit workspace", memory.circuit),
        (f"working memory at the peak (logits, recomputation, {_weights(plan)})", memory.working),
    ):
        table.add_row(name, f"{size / divisor:,.2f}")
    table.add_section()
    table.add_row("total", f"{memory.total / divisor:,.2f}", style="bold")
    with_it, without = memory.activations_with_checkpointing, memory.activations_without_checkpointing
    table.caption = f"activations: {with_it / divisor:,.2f} {unit} with checkpointing, {without / divisor:,.2f} without"
    if plan.loading > memory.weights:
        table.caption += f"\nwhile the base is loaded every rank holds all of it, {plan.loading / divisor:,.2f} {unit}"
    return table


def _place(plan: Plan) -> str:
    return "GPU" if plan.gpus else "process"


def _weights(plan: Plan) -> str:
    sharded = plan.sharing.startswith(("ZeRO-3", "FSDP2"))
    return (
        "dequantised and gathered weights, buckets"
        if sharded
        else "dequantised weight" + ", buckets" * plan.sharing.startswith("ZeRO")
    )


def _fit(plan: Plan) -> str:
    assert plan.needed is not None
    need = f"{_gib(plan.needed)} GiB with {_gib(CONTEXT_BYTES)} GiB for CUDA and {FRAGMENTATION:.0%} lost in the allocator"
    if not plan.gpus:
        return f"There is no GPU here. On one it would take about {need}."
    names = ", ".join(sorted({f"{name} ({_gib(size)} GiB)" for name, size in plan.gpus}))
    if plan.fits:
        return f"Fits: about {need}, on {names}."
    advice = "".join(f"\n  - {text}" for text in plan.advice)
    return f"Does not fit: about {need}, on {names}." + (f" What would fit:{advice}" if advice else "")


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
