"""Answers that a model writes to alpaca rows."""

from __future__ import annotations

from typing import Any

import torch

from .task import Row

BATCH = 24  # prompts answered at a time


def prompts(rows: list[Row]) -> list[str]:
    """Return what Axolotl's `type: alpaca` puts before the answers."""
    from axolotl.prompters import AlpacaPrompter

    made = AlpacaPrompter()
    return [next(iter(made.build_prompt(row["instruction"], row.get("input") or None))) for row in rows]


@torch.no_grad()
def write_answers(model: Any, tokenizer: Any, rows: list[Row], tokens: int) -> list[str]:
    """Return a greedy answer of at most `tokens` tokens to each row; the model is in eval mode, as it was, afterwards."""
    texts = prompts(rows)
    device = model.get_input_embeddings().weight.device
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers: list[str] = []
    for start in range(0, len(texts), BATCH):
        ids = [tokenizer(text)["input_ids"] for text in texts[start : start + BATCH]]
        longest = max(map(len, ids))
        batch = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
        settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": pad, "use_cache": True}
        written = model.generate(input_ids=batch, attention_mask=mask, **settings)
        answers += tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
