"""Compare adapters on SmolLM2-135M-Instruct and GSM8K on a CPU: short runs in bfloat16, one line of JSON for each.

`axolotl qtha-bench` is the tool for this where there is a GPU. On a CPU, Axolotl trains in float32 alone; this loop has the
frozen base in bfloat16 (adapters and their optimiser are float32), which is five times as fast on a CPU that multiplies
bfloat16, and takes short questions: a run of 100 steps takes 5 minutes on one core. Everything else is as simple as it can be:
AdamW without weight decay, cosine with a few steps of warm-up, gradients clipped at 1; the loss is that of the answers' tokens,
in nats a token. With `--test` the model is also tested on other rows: loss, and answers whose last number is the right one.

    python example_configs/smollm2/make_base.py
    python example_configs/smollm2/compare_on_cpu.py --data gsm8k/train.jsonl --lora 8 --rates 6e-3 --seeds 1 2 3
    python example_configs/smollm2/compare_on_cpu.py --data gsm8k/train.jsonl --rates 6e-3 --seeds 1 2 3 \
        --qtha "{rank: 8, alpha: 16, quantum: none}"

The protocol of the paper's authors (../bench/paper.yml) on short questions, one rank and seed, with their QTHA; an hour each:

    python example_configs/smollm2/compare_on_cpu.py --data gsm8k/train.jsonl --test gsm8k/test.jsonl --rates 5e-5 \
        --modules q_proj v_proj --steps 282 --batch 32 --warm-up 28 --longest 170 --rows 3000 --lora 8
    ... --qtha "{rank: 8, alpha: 16, mpo: tt, bond_dim: 8, mid_dim: 256, num_cores: 4, circuit_layers: 8, qubits: 8,
        core_gain: none, angle_scale: raw, branch_init: kaiming}"
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_qtha import QTHAConfig
from axolotl_qtha.bench.suite.score import score

BASE = Path(__file__).parent / "base"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALIKE = 8  # batches that are sorted by length together
LONGEST_ANSWER = 256  # tokens
Row = tuple[list[int], list[int]]  # tokens of the question, of the answer


def read_rows(path: Path, base: Path, longest: int) -> list[Row]:
    """Return question and answer of each row as tokens, without those of more than `longest` together."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts = f"USER: {row['question']}\nASSISTANT:", f" {row['answer']}"
        question, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        rows.append((question, [*answer, tokenizer.eos_token_id]))
    return [row for row in rows if len(row[0]) + len(row[1]) <= longest]


def batches(rows: list[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Yield batches of rows of much the same length, for ever."""
    order, shuffled = list(rows), random.Random(seed)
    group = size * min(ALIKE, len(rows) // size)
    while True:
        shuffled.shuffle(order)
        for start in range(0, len(order) - group + 1, group):
            part = sorted(order[start : start + group], key=lambda row: len(row[0]) + len(row[1]))
            found = [part[k : k + size] for k in range(0, group, size)]
            shuffled.shuffle(found)
            yield from found


def summed_loss(model: Any, rows: list[Row]) -> tuple[Tensor, int]:
    """Return the sum over the answers' tokens of the negative log-likelihood, in nats, and how many tokens they are."""
    length = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for k, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        ids[k, :end] = torch.tensor(question + answer)
        mask[k, :end] = 1
        answers[k, len(question) : end] = True
    causal = model.base_model.model  # the head sees the tokens before those of the answers alone
    hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    logits = causal.lm_head(hidden[answers[:, 1:]]).float()
    wanted = ids[:, 1:][answers[:, 1:]]
    return F.cross_entropy(logits, wanted, reduction="sum"), len(wanted)


@torch.no_grad()
def validation_loss(model: Any, rows: list[Row], size: int) -> float:
    """Return the mean over the answers' tokens, in nats."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    parts = [summed_loss(model, rows[k : k + size]) for k in range(0, len(rows), size)]
    model.train()
    return sum(float(loss) for loss, _ in parts) / sum(count for _, count in parts)


def test(model: Any, rows: list[Row], options: argparse.Namespace) -> dict[str, float]:
    """Return the loss on rows, and the share of its own answers to them whose last number is that of the true answer."""
    loss = validation_loss(model, rows, 2 * options.batch)
    asked = [{"input_ids": question + answer, "labels": [-100] * len(question) + answer} for question, answer in rows]
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    return {"test_loss": loss} | score("arithmetic", len(rows), LONGEST_ANSWER, model.eval(), tokenizer, asked).figures


def run(
    config: PeftConfig, rows: list[Row], asked: list[Row], rate: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train once; return parameters, losses, what a test on the rows `asked` gives, and seconds."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16, attn_implementation="sdpa")
    model: Any = get_peft_model(base.requires_grad_(False), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    held, rest = rows[: options.held_out], rows[options.held_out :][: options.rows]
    feed, losses, start = batches(rest, options.batch, seed), [], time.perf_counter()
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / options.warm_up) * (1 + math.cos(math.pi * step / options.steps)) / 2
        loss, count = summed_loss(model, next(feed))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss) / count)
    last = losses[-20:]
    return {
        "parameters": sum(parameter.numel() for parameter in trained),
        "learning_rate": rate,
        "seed": seed,
        "validation_loss": validation_loss(model, held, 2 * options.batch),
        "training_loss": sum(last) / len(last),
        **(test(model, asked, options) if asked else {}),
        "seconds": round(time.perf_counter() - start),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run one adapter at each learning rate and seed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl (fields question, answer).")
    parser.add_argument("--base", type=Path, default=BASE, help="The base that make_base.py made.")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--lora", type=int, metavar="RANK", help="PEFT's LoRA of this rank, alpha twice it.")
    kind.add_argument("--qtha", metavar="KEYS", help="QTHA with these keys of the `qtha:` block, as YAML.")
    parser.add_argument("--rates", type=float, nargs="+", required=True, help="Learning rates.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="Of the adapter's start and the order of the data.")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="The layers; all linear ones unless named.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="Rows of a step.")
    parser.add_argument("--warm-up", type=int, default=8, help="Steps.")
    parser.add_argument("--held-out", type=int, default=160, help="The first rows, for validation.")
    parser.add_argument("--rows", type=int, help="Rows that are trained on; all of the others unless given.")
    parser.add_argument("--longest", type=int, default=140, help="Rows with more tokens are left out.")
    parser.add_argument("--test", type=Path, help="GSM8K's test.jsonl: its first rows are answered, too.")
    parser.add_argument("--answers", type=int, default=200, help="How many.")
    parser.add_argument("--out", type=Path, help="File that the lines are added to.")
    options = parser.parse_args(arguments)
    rows = read_rows(options.data, options.base, options.longest)
    if len(rows) < options.held_out + options.batch:
        needed = f"--held-out {options.held_out} and --batch {options.batch}"
        parser.error(f"{needed} take more than the {len(rows)} rows of at most {options.longest} tokens")
    asked = read_rows(options.test, options.base, options.longest)[: options.answers] if options.test else []
    if options.test and not asked:
        parser.error(f"--test {options.test} has no row of at most {options.longest} tokens")
    for seed in options.seeds:
        for rate in options.rates:
            keys: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": options.modules}
            if options.lora:
                config: PeftConfig = LoraConfig(r=options.lora, lora_alpha=2 * options.lora, **keys)
            else:
                config = QTHAConfig(**{**keys, **yaml.safe_load(options.qtha), "seed": seed})
            named = {"lora": options.lora} if options.lora else {"qtha": options.qtha}
            line = json.dumps(named | run(config, rows, asked, rate, seed, options))
            print(line, flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
