"""Memory and time of a whole training step, QTHA beside PEFT's QLoRA on the same quantised base.

Forward, loss, backward and an AdamW step of a decoder with random weights, made on the device layer by layer: nothing is
downloaded, and a 7B shape never exists in full precision. float32 on a CPU; bfloat16 under autocast on CUDA, as Axolotl trains.
Both adapters take turns on the same frozen weights, so that a drift of the machine's speed hits both alike; printed are
medians, and the median of the ratios to QLoRA within each turn.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from axolotl_qtha import QTHAConfig
from axolotl_qtha.bench import arguments
from axolotl_qtha.terminal import console
from axolotl_qtha.timing import peak_bytes, seconds

SHAPES: dict[str, PreTrainedConfig] = {
    "small": LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}


def random_base(config: PreTrainedConfig, bits: int, device: torch.device) -> PreTrainedModel:
    """Return a decoder with random weights on the device, its linear layers but the head in `bits` bits (4, 8 or 16)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, _random_linear(module, bits, device, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            parent, _, leaf = name.rpartition(".")
            value = torch.randn(parameter.shape, device=device, dtype=dtype) * config.initializer_range
            setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.ones_like(value) if "norm" in name else value, False))
    model.tie_weights()
    rotary = model.model.rotary_emb  # its tables are made from the configuration, which the meta device could not
    with device:
        model.model.rotary_emb = type(rotary)(config=config)
    model.config.use_cache = False
    # As transformers' loader says it; without this PEFT takes its LoRA layer for full precision, which copies inputs.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    return cast(PreTrainedModel, model)


def _random_linear(layer: nn.Linear, bits: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    bias = layer.bias is not None
    weight = torch.randn(layer.out_features, layer.in_features, dtype=dtype, device=device) * 0.02
    sizes = (layer.in_features, layer.out_features, bias)
    new: Any
    if bits == 4:
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", quant_storage=dtype, device="meta")
        quantised: Any = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", quant_storage=dtype, module=new)
        new.weight = quantised.to(device)
    elif bits == 8:
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        quantised = bnb.nn.Int8Params(weight.to("cpu", torch.float16), requires_grad=False)
        new.weight = quantised.to(device)
    else:
        new = nn.Linear(*sizes, device="meta")
        new.weight = nn.Parameter(weight, False)
    if bias:
        new.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=device), False)
    return cast(nn.Linear, new)


def adapters(rank: int, quantum: str) -> dict[str, Any]:
    """Return the adapters that are compared, on all linear layers but the head."""
    qtha = QTHAConfig(rank=rank, quantum=cast(Any, quantum), target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "qlora": LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        f"qtha, quantum: {quantum}": qtha,
    }


class AdaptedBase:
    """One adapter on the shared base, with its optimiser; the base carries it between `attach` and `detach`."""

    def __init__(self, base: PreTrainedModel, config: Any, ids: torch.Tensor) -> None:
        self.model: PeftModel = cast(PeftModel, get_peft_model(base, config))
        self.model.train()
        self.base, self.ids = base, ids
        self.layers: dict[str, Any] = {
            name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)
        }
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        self.detach()

    def attach(self) -> None:
        """Put the adapted layers in the place of the frozen ones."""
        for name, layer in self.layers.items():
            self.base.set_submodule(name, layer)

    def detach(self) -> None:
        """Put the frozen layers back."""
        for name, layer in self.layers.items():
            self.base.set_submodule(name, layer.get_base_layer())

    def loss(self) -> torch.Tensor:
        """Return the loss on the batch; without autocast PEFT's LoRA would keep a float32 copy of every bfloat16 input."""
        device = self.ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            result: torch.Tensor = self.model(input_ids=self.ids, labels=self.ids).loss
        return result

    def step(self) -> None:
        """Train on the batch once."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept_bytes(self) -> int:
        """Return the bytes that last from step to step beside the frozen weights: the adapter and the optimiser's states."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*self.trained, *states])


def measure(
    base: PreTrainedModel, rank: int, quantum: str, ids: torch.Tensor, checkpointing: bool, repeats: int
) -> list[dict[str, Any]]:
    """Return a row per adapter: parameters, peak bytes, seconds and their ratios to QLoRA."""
    weights = stored_bytes(base)
    base.enable_input_require_grads()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    runs = {name: AdaptedBase(base, config, ids) for name, config in adapters(rank, quantum).items()}
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
        }
        for name, values in times.items()
    ]


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, and of the scales of 4-bit weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


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
    out = console(130)
    table = Table(title=f"training step, {args.model} in {args.bits} bits, {args.batch} x {args.tokens} tokens, {device}")
    columns = ("rank", "adapter", "checkpoints", "parameters", "peak MiB", "x QLoRA", "no weights", "tokens/s", "time x QLoRA")
    for column in columns:
        table.add_column(column, justify="left" if column == "adapter" else "right")
    rows = []
    both = (False, True) if args.checkpointing is None else (args.checkpointing,)
    cells = [(rank, checkpointing) for rank in args.ranks for checkpointing in both]
    for rank, checkpointing in track(cells, description="measuring", console=out):
        for row in measure(base, rank, args.quantum, ids, checkpointing, args.repeats):
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
            )
        table.add_section()
    out.print(table)
    out.print("The peak holds the frozen weights, the adapter, the optimiser's states and all of the step; on CUDA not what")
    out.print("the libraries allocate once. `no weights` is the peak without the frozen weights.")
    arguments.write_json(args, rows)


if __name__ == "__main__":
    main()
