"""Answers that a model writes, and how much of the true ones is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from .task import Row, Scores

BATCH = 24  # prompts answered at a time
ROUGE = ("rouge1", "rouge2", "rougeL")


def prompts(rows: list[Row]) -> list[str]:
    """Return what Axolotl's `type: alpaca` puts before the answers."""
    from axolotl.prompters import AlpacaPrompter

    made = AlpacaPrompter()
    return [next(iter(made.build_prompt(row["instruction"], row.get("input") or None))) for row in rows]


def write_answers(model: Any, tokenizer: Any, rows: list[Row], tokens: int) -> list[str]:
    """Return a greedy answer of at most `tokens` tokens to each row."""
    questions = [tokenizer(text)["input_ids"] for text in prompts(rows)]
    return [answer for answer, _ in generate(model, tokenizer, questions, tokens)]


@torch.no_grad()
def generate(model: Any, tokenizer: Any, questions: list[list[int]], tokens: int) -> list[tuple[str, bool]]:
    """Return a greedy answer of at most `tokens` tokens to each question in tokens, and whether it ended by itself.

    The model is in eval mode.
    """
    device = model.get_input_embeddings().weight.device
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": pad, "use_cache": True}
    answers: list[tuple[str, bool]] = []
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=device)
        new = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, longest:]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = (new == tokenizer.eos_token_id).any(-1).tolist()
        answers += zip((text.strip() for text in texts), ended, strict=True)
    return answers


def overlaps(written: list[str], true: list[str], words: Callable[[str], list[str]] | None = None) -> list[Scores]:
    """Return ROUGE-1, 2 and L (F1, times 100) of each answer; for the arguments see `overlap`."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), tokenizer=None if words is None else SimpleNamespace(tokenize=words))
    pairs = zip(written, true, strict=True)
    return [{kind: 100 * each.fmeasure for kind, each in scorer.score(known, answer).items()} for answer, known in pairs]


def overlap(
    written: list[str],
    true: list[str],
    words: Callable[[str], list[str]] | None = None,
    each: list[Scores] | None = None,
) -> Scores:
    """Return ROUGE-1, 2 and L (F1, mean over answers) and BLEU-4 (of all together), times 100.

    Args:
        written: answers.
        true: those of the data.
        words: cuts a text into words. Default: as rouge-score and sacrebleu do, for languages with spaces between words.
        each: what `overlaps` said of each answer, where it was asked.
    """
    from sacrebleu import corpus_bleu

    found = each or overlaps(written, true, words)
    result = {kind: sum(scores[kind] for scores in found) / len(found) for kind in ROUGE}
    if words is not None:
        written, true = ([" ".join(words(text)) for text in texts] for texts in (written, true))
    return result | {"bleu4": corpus_bleu(written, [true], tokenize="13a" if words is None else "none").score}


def together(questions: list[str], written: list[str], true: list[str], scores: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each answer: `question`, `answer`, `true`, and its scores.

    Args:
        questions: as the model has read them.
        written: answers.
        true: those of the data.
        scores: of each answer by itself.
    """
    columns = zip(questions, written, true, scores, strict=True)
    return [{"question": question, "answer": answer, "true": known, **own} for question, answer, known, own in columns]
