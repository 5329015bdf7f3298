"""Memory and time of a whole training step, QTHA beside PEFT's QLoRA on the same quantised base.

Forward, loss, backward and an AdamW step of a decoder with random weights, made on the device layer by layer: nothing is
downloaded, and a 7B shape never exists in full precision. float32 on a CPU; bfloat16 under autocast on CUDA, as Axolotl trains.
The adapters take turns on the same frozen weights, so that a drift of the machine's speed hits all alike; printed are
medians, and the median of the ratios to QLoRA within each turn.

Launches are those of each adapted layer: of a forward and backward that adds to gradients that exist, as all but the first of
gradient accumulation do, less those of the frozen base, divided by the number of adapted layers. The optimiser is left out.

Where they run, LoRA with Axolotl's own fused kernels stands beside PEFT's: a user has it instead.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from axolotl_qtha import QTHAConfig
from axolotl_qtha.bench import arguments, launches
from axolotl_qtha.bench.bases import SHAPES, random_base, stored_bytes
from axolotl_qtha.bench.fused_lora import FusedKernels, why_not
from axolotl_qtha.bench.launches import Launches, measured
from axolotl_qtha.terminal import console
from axolotl_qtha.timing import peak_bytes, seconds

FUSED = "qlora, fused"


def adapters(rank: int, quantum: str) -> dict[str, Any]:
    """Return the adapters that are compared, on all linear layers but the head."""
    qtha = QTHAConfig(rank=rank, quantum=cast(Any, quantum), target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "qlora": LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        f"qtha, quantum: {quantum}": qtha,
    }


class AdaptedBase:
    """One adapter on the shared base, with its optimiser; the base carries it between `attach` and `detach`.

    Args:
        base: frozen.
        config: of the adapter.
        ids: the batch, (sequences, tokens).
        fused: whether the adapter, a LoRA, runs in Axolotl's kernels.
    """

    def __init__(self, base: PreTrainedModel, config: Any, ids: torch.Tensor, fused: bool = False) -> None:
        self.model: PeftModel = cast(PeftModel, get_peft_model(base, config))
        self.model.train()
        self.base, self.ids = base, ids
        self.layers: dict[str, Any] = {
            name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)
        }
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        self.kernels = FusedKernels(self.model) if fused else None
        self.detach()

    def attach(self) -> None:
        """Put the adapted layers in the place of the frozen ones."""
        for name, layer in self.layers.items():
            self.base.set_submodule(name, layer)
        if self.kernels:
            self.kernels.attach()

    def detach(self) -> None:
        """Put the frozen layers back."""
        if self.kernels:
            self.kernels.detach()
        for name, layer in self.layers.items():
            self.base.set_submodule(name, layer.get_base_layer())

    def loss(self) -> torch.Tensor:
        """Return the loss on the batch."""
        return loss(self.model, self.ids)

    def step(self) -> None:
        """Train on the batch once."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def launches(self, base: Launches) -> Launches:
        """Return what each of the adapted layers launches beyond the base."""
        result = accumulating(self.model, self.ids).beyond(base, len(self.layers))
        self.optimizer.zero_grad()
        return result

    def kept_bytes(self) -> int:
        """Return the bytes that last from step to step beside the frozen weights: the adapter and the optimiser's states."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*self.trained, *states])


def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss on a batch; without autocast PEFT's LoRA would keep a float32 copy of every bfloat16 input."""
    device = ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        result: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return result


def accumulating(model: nn.Module, ids: torch.Tensor) -> Launches:
    """Return what the second of two forwards and backwards launches; the gradients of both stay."""

    def run() -> None:
        loss(model, ids).backward()

    run()
    return measured(run, ids.device)


def measure(
    base: PreTrainedModel, rank: int, quantum: str, ids: torch.Tensor, checkpointing: bool, repeats: int, fused: bool = False
) -> list[dict[str, Any]]:
    """Return a row per adapter: parameters, peak bytes, seconds and their ratios to QLoRA, launches of a layer."""
    weights = stored_bytes(base)
    base.enable_input_require_grads()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    configs = adapters(rank, quantum)
    if fused:
        configs[FUSED] = configs["qlora"]
    runs = {name: AdaptedBase(base, config, ids, fused=name == FUSED) for name, config in configs.items()}
    peaks, times = dict[str, int](), {name: list[float]() for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            run.attach()
            if turn == 0:  # the warm-up makes the optimiser's states and what the libraries allocate once
                run.step()
            elif turn == 1:
                peaks[name] = weights + run.kept_bytes() + peak_bytes(run.step, ids.device)
            else:
                times[name].append(seconds(run.step, ids.device))
            run.detach()
    frozen, launched = accumulating(base, ids), dict[str, Launches]()
    for name, run in runs.items():
        run.attach()
        launched[name] = run.launches(frozen)
        run.detach()
    base.gradient_checkpointing_disable()
    base.disable_input_require_grads()
    tokens = ids.numel()
    return [
        {
            "rank": rank,
            "adapter": name,
            "checkpointing": checkpointing,
            "parameters": sum(parameter.numel() for parameter in runs[name].trained),
            "peak_bytes": peaks[name],
            "step_bytes": peaks[name] - weights,
            "peak_to_qlora": peaks[name] / peaks["qlora"],
            "step_to_qlora": (peaks[name] - weights) / (peaks["qlora"] - weights),
            "seconds": statistics.median(values),
            "tokens_per_second": tokens / statistics.median(values),
            "time_to_qlora": statistics.median(a / b for a, b in zip(values, times["qlora"], strict=True)),
            "launches": asdict(launched[name]),
        }
        for name, values in times.items()
    ]


def main() -> None:
    """Run the benchmark and print its table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = "qwen2.5-7b" if device.type == "cuda" else "small"
    options = arguments.parser(__doc__, ranks=[8], quantum="qtha", repeats=3)
    options.add_argument("--model", choices=list(SHAPES), default=default, help="shape of the base")
    options.add_argument("--bits", type=int, choices=(4, 8, 16), default=4, help="bits of the frozen weights")
    options.add_argument("--batch", type=int, default=2, help="sequences per step")
    options.add_argument("--tokens", type=int, default=2048 if device.type == "cuda" else 512, help="tokens per sequence")
    options.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="gradient checkpointing (default: both)")
    args = options.parse_args()
    base = random_base(SHAPES[args.model], args.bits, device)
    ids = torch.randint(SHAPES[args.model].vocab_size, (args.batch, args.tokens), device=device)
    out, missing = console(150), why_not(device, args.bits)
    table = Table(title=f"training step, {args.model} in {args.bits} bits, {args.batch} x {args.tokens} tokens, {device}")
    columns = ("rank", "adapter", "checkpoints", "parameters", "peak MiB", "x QLoRA", "no weights", "tokens/s", "time x QLoRA")
    for column in (*columns, *launches.headings(device)):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    rows = []
    both = (False, True) if args.checkpointing is None else (args.checkpointing,)
    cells = [(rank, checkpointing) for rank in args.ranks for checkpointing in both]
    for rank, checkpointing in track(cells, description="measuring", console=out):
        for row in measure(base, rank, args.quantum, ids, checkpointing, args.repeats, fused=not missing):
            rows.append(row)
            table.add_row(
                str(rank),
                row["adapter"],
                "on" if checkpointing else "off",
                f"{row['parameters']:,}",
                f"{row['peak_bytes'] / 2**20:,.1f}",
                f"{row['peak_to_qlora']:.3f}",
                f"{row['step_bytes'] / 2**20:,.1f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['time_to_qlora']:.2f}",
                *launches.cells(Launches(**row["launches"]), device),
            )
        table.add_section()
    out.print(table)
    out.print("The peak holds the frozen weights, the adapter, the optimiser's states and all of the step; on CUDA not what")
    out.print("the libraries allocate once. `no weights` is the peak without the frozen weights.")
    out.print(f"{launches.legend(device)} Of each adapted layer: forward + backward, beyond the base.")
    if missing:
        out.print(missing)
    arguments.write_json(args, rows)


if __name__ == "__main__":
    main()
