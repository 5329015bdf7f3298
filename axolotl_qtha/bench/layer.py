"""Time, memory and launches of one adapted linear layer, beside the frozen layer alone and PEFT's LoRA.

Forward and backward of one layer in float32 (on CUDA bfloat16 under autocast, as Axolotl trains), x needing a gradient as inside
a model. The variants take turns, so that a drift of the machine's speed hits all alike; printed are medians, and the median of
the ratios to LoRA within each turn. `diagnostics` is what measuring the adapter takes at every 10th step, as a share of the
steps' time.

Launches are those of a forward and backward that adds to gradients of the parameters that exist, as all but the first of gradient
accumulation do; those of the frozen layer are among them. Where it runs, LoRA stands there as Axolotl's fused kernels compute
o_proj, too; those for q, k, v and the MLP take several layers at a time, and are in `bench.step`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from axolotl_qtha import QTHAConfig
from axolotl_qtha.bench import arguments, launches
from axolotl_qtha.bench.bases import random_linear
from axolotl_qtha.bench.fused_lora import one_layer, why_not
from axolotl_qtha.bench.launches import Launches, measured
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.torch_engine import expectation_values
from axolotl_qtha.settings.args import DIAGNOSTICS_STEPS
from axolotl_qtha.terminal import console
from axolotl_qtha.timing import kept_bytes, peak_bytes, seconds
from axolotl_qtha.training.diagnostics import active_adapters, gradient_norms, measure, sample

SHAPES = ((3584, 3584), (3584, 18944))
RANKS = (4, 8)
TOKENS = (512, 2048)
CUTS = ((8, 8), (16, 4), (32, 4), (32, 8), (64, 4))  # rank and qubits of each circuit


class _Model(nn.Module):
    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        self.proj = layer
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = bits == 4, bits == 8  # as PEFT finds out which LoRA layer it needs

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            y: Tensor = self.proj(x)
        return y


def variants(layer: nn.Linear, rank: int, bits: int = 16, fused: bool = False) -> dict[str, nn.Module]:
    """Return the frozen layer and its adapted forms, which all hold the same layer; `fused`: with Axolotl's LoRA kernel."""

    def adapted(config: Any) -> Any:
        return get_peft_model(_Model(layer, bits), config)  # type: ignore[arg-type]

    def qtha(**settings: Any) -> nn.Module:
        model: nn.Module = adapted(QTHAConfig(rank=rank, target_modules=["proj"], **settings))
        return model

    lora = LoraConfig(r=rank, target_modules=["proj"])
    models = {
        "base": _Model(layer, bits).requires_grad_(False),
        "lora": adapted(lora),
        "qtha": qtha(),
        "qtha, quantum: none": qtha(quantum="none"),
    }
    if fused:
        models["lora, fused"] = adapted(lora)
        wrapped = models["lora, fused"].get_submodule("base_model.model.proj")
        wrapped.forward = one_layer(wrapped)
    return models


def step(model: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Run one forward and backward."""
    for parameter in model.parameters():
        parameter.grad = None
    x.grad = None
    model(x).backward(grad)


def accumulating(model: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Run one forward and backward that adds to the parameters' gradients."""
    x.grad = None
    model(x).backward(grad)


def diagnostics(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return what a measured step of a training does besides; for a QTHA model that has its gradients."""
    adapters = dict(active_adapters(model))
    with torch.no_grad():
        z = {name: nn.functional.linear(x, adapter.fold_a().to(x.dtype)) for name, adapter in adapters.items()}

    def run() -> object:
        samples = {name: sample(value) for name, value in z.items()}
        return measure(adapters, samples, gradient_norms(adapters.values()))

    return run


def layer_rows(
    shape: tuple[int, int], rank: int, tokens: int, repeats: int, device: torch.device, bits: int = 16
) -> list[dict[str, Any]]:
    """Measure all variants of one cell."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = random_linear(nn.Linear(*shape, bias=False, device="meta"), bits, device, dtype)
    models = variants(layer, rank, bits, fused=not why_not(device, bits))
    x = torch.randn(1, tokens, shape[0], device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(1, tokens, shape[1], device=device, dtype=dtype)
    runs = {name: lambda model=model: step(model, x, grad) for name, model in models.items()}
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}  # also the warm-up
    watched = {name: diagnostics(models[name], x) for name in models if name.startswith("qtha")}
    for run in watched.values():
        run()
    launched = {name: measured(partial(accumulating, model, x, grad), device) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    shares: dict[str, list[float]] = {name: [] for name in watched}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
            if name in watched:
                shares[name].append(seconds(watched[name], device) / (DIAGNOSTICS_STEPS * times[name][-1]))
    return [
        {
            "in": shape[0],
            "out": shape[1],
            "rank": rank,
            "tokens": tokens,
            "variant": name,
            "parameters": sum(p.numel() for p in models[name].parameters() if p.requires_grad),
            "milliseconds": 1e3 * statistics.median(values),
            "to_lora": statistics.median(a / b for a, b in zip(values, times["lora"], strict=True)),
            "peak_mib": peaks[name] / 2**20,
            "launches": asdict(launched[name]),
            **({"diagnostics": statistics.median(shares[name])} if name in shares else {}),
        }
        for name, values in times.items()
    ]


def rank_rows(device: torch.device, tokens: int, repeats: int) -> list[dict[str, float | int]]:
    """Measure the circuits of ranks alone, cut in several ways, beside rank 8 as one circuit; in turns, forward + backward."""
    runs = {}
    for rank, qubits in CUTS:
        ansatz = Ansatz(qubits, 2)
        z = torch.randn(tokens, rank, device=device, requires_grad=True)
        angles = torch.randn(ansatz.rows, rank, device=device, requires_grad=True)

        def run(z: Tensor = z, angles: Tensor = angles, ansatz: Ansatz = ansatz) -> object:
            return torch.autograd.grad(expectation_values(z, angles, ansatz).sum(), (z, angles))

        run()
        runs[rank, qubits] = run
    turns = [{cut: seconds(run, device) for cut, run in runs.items()} for _ in range(repeats)]
    return [
        {
            "rank": cut[0],
            "qubits": cut[1],
            "circuits": cut[0] // cut[1],
            "milliseconds": 1e3 * statistics.median(turn[cut] for turn in turns),
            "to_first": statistics.median(turn[cut] / turn[CUTS[0]] for turn in turns),
        }
        for cut in CUTS
    ]


def circuit_rows(device: torch.device, tokens: int = 2048, qubits: int = 8) -> list[dict[str, int]]:
    """Return what the circuit keeps for backward, by its number of layers."""
    rows = []
    for layers in (1, 2, 4, 8):
        ansatz = Ansatz(qubits, layers)
        z = torch.randn(tokens, qubits, device=device, requires_grad=True)
        angles = nn.Parameter(torch.randn(ansatz.rows, qubits, device=device))

        def run(z: Tensor = z, angles: Tensor = angles, ansatz: Ansatz = ansatz) -> Tensor:
            return expectation_values(z, angles, ansatz)

        rows.append({"qubits": qubits, "layers": layers, "tokens": tokens, "kept_bytes": kept_bytes(run)})
    return rows


def _shape(text: str) -> tuple[int, int]:
    inputs, outputs = text.split("x")
    return int(inputs), int(outputs)


def main() -> None:
    """Run the benchmark and print its tables."""
    options = arguments.parser(__doc__, repeats=5, tokens=TOKENS, ranks=RANKS)
    options.add_argument("--shapes", nargs="+", default=[f"{a}x{b}" for a, b in SHAPES], help="layers as INxOUT")
    options.add_argument("--bits", type=int, choices=(4, 8, 16), default=16, help="bits of the frozen weight")
    args = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cells = [(_shape(shape), rank, tokens) for shape in args.shapes for rank in args.ranks for tokens in args.tokens]
    out, missing = console(150), why_not(device, args.bits)
    layers = "one layer" if args.bits == 16 else f"one layer in {args.bits} bits"
    table = Table(title=f"forward + backward of {layers}, {device}, {torch.get_num_threads()} threads, {args.repeats} turns")
    columns = ("layer", "rank", "tokens", "variant", "parameters", "ms (median)", "x LoRA", "peak MiB", "diagnostics")
    for column in (*columns, *launches.headings(device)):
        table.add_column(column, justify="left" if column in ("layer", "variant") else "right")
    rows = []
    for shape, rank, tokens in track(cells, description="measuring", console=out):
        for row in layer_rows(shape, rank, tokens, args.repeats, device, args.bits):
            rows.append(row)
            table.add_row(
                f"{row['in']}x{row['out']}",
                str(rank),
                str(tokens),
                str(row["variant"]),
                f"{row['parameters']:,}",
                f"{row['milliseconds']:.1f}",
                f"{row['to_lora']:.3f}",
                f"{row['peak_mib']:.1f}",
                f"{row['diagnostics']:.2%}" if "diagnostics" in row else "",
                *launches.cells(Launches(**row["launches"]), device),
            )
        table.add_section()
    out.print(table)
    out.print(launches.legend(device))
    if missing:
        out.print(missing)
    cuts = rank_rows(device, max(args.tokens), max(args.repeats, 9))
    circuits = Table(title=f"circuits alone, 2 layers, {max(args.tokens)} tokens")
    for column in ("rank", "circuits x qubits", "ms (median)", "x rank 8 as 1 x 8"):
        circuits.add_column(column, justify="right")
    for cut in cuts:
        cut_as = f"{cut['circuits']} x {cut['qubits']}"
        circuits.add_row(str(cut["rank"]), cut_as, f"{cut['milliseconds']:.1f}", f"{cut['to_first']:.2f}")
    out.print(circuits)
    kept = circuit_rows(device)
    memory = Table(title=f"kept for backward by the circuit, {kept[0]['qubits']} qubits, {kept[0]['tokens']} tokens")
    for column in ("layers", "KiB"):
        memory.add_column(column, justify="right")
    for entry in kept:
        memory.add_row(str(entry["layers"]), f"{entry['kept_bytes'] / 1024:.1f}")
    out.print(memory)
    arguments.write_json(args, {"layers": rows, "circuits": cuts, "circuit": kept})


if __name__ == "__main__":
    main()
