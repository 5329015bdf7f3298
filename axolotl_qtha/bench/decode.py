"""Time per token of `generate()`, greedy: QTHA with kept folds and without, beside PEFT's LoRA and the base alone.

All linear layers but the head carry adapters, made of random numbers that are not zero: what they say does not matter here. The
variants share the base's weights and take turns, so that a drift of the machine's speed hits all alike; printed are medians, and
the median of the ratios to LoRA within each turn. The time of the prompt is shared out among the new tokens. On CUDA the base is
bfloat16, as users generate there; on a CPU it is as it was saved.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from axolotl_qtha import QTHAConfig
from axolotl_qtha.bench import arguments
from axolotl_qtha.terminal import console
from axolotl_qtha.timing import seconds
from axolotl_qtha.tuner.adapter import QTHAAdapter
from axolotl_qtha.tuner.fold_cache import folding_each_time

BASE = Path(__file__).parents[2] / "example_configs" / "quickstart" / "base"
PROMPT = 16  # tokens
LORA, CACHED, UNCACHED = "lora", "qtha, cached", "qtha, uncached"


def loaded(model: str, device: torch.device) -> PreTrainedModel:
    """Return a base, by its folder or name, on the device and in eval mode."""
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if device.type == "cuda" else "auto")
    return cast(PreTrainedModel, base.to(device).eval())


def shared(base: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model that has the same tensors."""
    tensors = [*base.parameters(), *base.buffers()]
    return deepcopy(base, {id(tensor): tensor for tensor in tensors})


def adapted(base: PreTrainedModel, config: Any) -> Any:
    """Return a copy of the model with an adapter that changes its output, in eval mode."""
    model = get_peft_model(shared(base), config)
    for module in model.modules():  # LoRA's B, QTHA's last core: a new adapter changes nothing
        parts = (
            [module.stored(name) for name in module.table] if isinstance(module, QTHAAdapter) else list(module.parameters(False))
        )
        for part in parts:
            if part.requires_grad and not part.any():
                nn.init.normal_(part, std=0.02)
    return model.eval()


def variants(base: PreTrainedModel, rank: int, quantum: str) -> dict[str, Any]:
    """Return the models that are compared."""
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    qtha = adapted(base, QTHAConfig(rank=rank, alpha=2 * rank, quantum=cast(Any, quantum), **common))
    return {
        "base": shared(base),
        LORA: adapted(base, LoraConfig(r=rank, lora_alpha=2 * rank, **common)),
        CACHED: qtha,
        UNCACHED: qtha,
    }


def context(name: str) -> Any:
    """Return the context a variant runs in."""
    return folding_each_time() if name == UNCACHED else nullcontext()


def decoding(name: str, model: Any, ids: Tensor, tokens: int) -> Callable[[], None]:
    """Return a function that decodes `tokens` new tokens after the prompts `ids` (batch, prompt)."""
    padding = model.generation_config.pad_token_id
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1, "use_cache": True}

    def run() -> None:
        with context(name):
            result = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0 if padding is None else padding, **settings
            )
        assert result.shape[1] == ids.shape[1] + tokens, tuple(result.shape)

    return run


def difference(models: dict[str, Any], ids: Tensor) -> float:
    """Return the largest difference of a logit of the prompts between kept folds and none, as a share of the largest logit."""
    logits = []
    with torch.no_grad():
        for name in (CACHED, UNCACHED):
            with context(name):
                logits.append(models[name](input_ids=ids).logits.double())
    return float((logits[0] - logits[1]).abs().max() / logits[1].abs().max())


def measure(base: PreTrainedModel, rank: int, quantum: str, batch: int, tokens: int, turns: int) -> list[dict[str, Any]]:
    """Return a row per variant: parameters, milliseconds per step of a batch, ratio to LoRA."""
    torch.manual_seed(0)
    models = variants(base, rank, quantum)
    ids = torch.randint(3, base.config.vocab_size, (batch, PROMPT), device=base.device)
    runs = {name: decoding(name, model, ids, tokens) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(turns + 1), description="measuring", console=Console(stderr=True)):
        for name, run in runs.items():
            took = seconds(run, base.device) / tokens
            if turn:  # the first warms up
                times[name].append(took)
    return [
        {
            "variant": name,
            "rank": rank,
            "quantum": quantum,
            "batch": batch,
            "tokens": tokens,
            "parameters": sum(p.numel() for p in models[name].parameters() if p.requires_grad) if name != "base" else 0,
            "milliseconds": 1e3 * statistics.median(values),
            "to_lora": statistics.median(a / b for a, b in zip(values, times[LORA], strict=True)),
            "logit_difference": difference(models, ids) if name == CACHED else None,
        }
        for name, values in times.items()
    ]


def main() -> None:
    """Run the benchmark and print its table."""
    options = arguments.parser(__doc__, rank=4, quantum="qtha")
    options.add_argument("--model", default=str(BASE), help="folder or name of the base")
    options.add_argument("--batch", type=int, default=1, help="sequences decoded at a time")
    options.add_argument("--tokens", type=int, default=128, help="new tokens of each sequence")
    options.add_argument("--turns", type=int, default=9, help="turns of each measurement")
    args = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = loaded(args.model, device)
    rows = measure(base, args.rank, args.quantum, args.batch, args.tokens, args.turns)
    table = Table(
        title=f"decoding {args.tokens} tokens, {Path(args.model).name}, rank {args.rank}, batch {args.batch}, "
        f"{device} ({str(base.dtype).removeprefix('torch.')}), {torch.get_num_threads()} threads, {args.turns} turns"
    )
    for column in ("variant", "parameters", "ms per token (median)", "x LoRA"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(row["variant"], f"{row['parameters']:,}", f"{row['milliseconds']:.2f}", f"{row['to_lora']:.2f}")
    out = console(130)
    out.print(table)
    cached = next(row for row in rows if row["variant"] == CACHED)
    out.print(f"logits, cached against uncached: at most {cached['logit_difference']:.1e} of the largest apart")
    arguments.write_json(args, rows)


if __name__ == "__main__":
    main()
