"""Scores of answers to any data set that Axolotl has tokenised: the question is what comes before the last labelled tokens."""

from __future__ import annotations

import re
from typing import Any

import torch

from ...export.text import IGNORED
from ..tasks import Metric

BATCH = 16  # questions answered at a time
# A Chinese or Japanese character is a word of its own: these languages put no spaces between words.
WORD = re.compile(r"[\u3400-\u9fff\u3040-\u30ff]|[^\W\u3400-\u9fff\u3040-\u30ff]+")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
METRICS: dict[str, dict[str, Metric]] = {
    "text": {
        "rouge1": Metric("F1 of words shared with the true answer, mean over answers; Chinese by character", "x 100"),
        "rouge2": Metric("F1 of pairs of words shared with the true answer, mean over answers", "x 100"),
        "rougeL": Metric("F1 of the longest common subsequence of words, mean over answers", "x 100"),
        "bleu4": Metric("BLEU-4 of all answers together, of the same words", "x 100"),
    },
    "arithmetic": {
        "accuracy": Metric("answers whose last number is that of the true answer", "share of 1"),
        "answer_completeness": Metric("answers that hold a number and end by themselves", "share of 1"),
    },
}


def score(kind: str, count: int, tokens: int, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of METRICS[kind].

    Args:
        kind: `text` or `arithmetic`.
        count: rows that are answered, at most.
        tokens: of an answer, at most.
        model: in eval mode.
        tokenizer: the model's.
        rows: tokenised, with `input_ids` and `labels`.

    Raises:
        ValueError: if rows have no question.
    """
    pairs = [question_and_answer(row) for row in rows[:count]]
    true = [tokenizer.decode(answer, skip_special_tokens=True) for _, answer in pairs]
    written = write_answers(model, tokenizer, [question for question, _ in pairs], tokens)
    return overlap([text for text, _ in written], true) if kind == "text" else grade(written, true)


def question_and_answer(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the tokens of the last answer, and those before it.

    Raises:
        ValueError: if there are none before it.
    """
    ids, labels = list(row["input_ids"]), list(row["labels"])
    end = next((place + 1 for place in reversed(range(len(labels))) if labels[place] != IGNORED), 0)
    start = next((place + 1 for place in reversed(range(end)) if labels[place] == IGNORED), 0)
    if not start:
        raise ValueError("score: rows without a question. What works: a data set of questions, and `train_on_inputs: false`.")
    return ids[:start], ids[start:end]


@torch.no_grad()
def write_answers(model: Any, tokenizer: Any, questions: list[list[int]], tokens: int) -> list[tuple[str, bool]]:
    """Return a greedy answer to each question, and whether it ended by itself."""
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


class Words:
    """Cuts a text into words, for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words."""
        return WORD.findall(text.lower())


def overlap(written: list[str], true: list[str]) -> dict[str, float]:
    """Return how much of the words of the true answers is in those written."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    words = Words()
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=words)
    found = [scorer.score(reference, answer) for answer, reference in zip(written, true, strict=True)]
    result = {kind: 100 * sum(each[kind].fmeasure for each in found) / len(found) for kind in ("rouge1", "rouge2", "rougeL")}
    ours, theirs = ([" ".join(words.tokenize(text)) for text in texts] for texts in (written, true))
    return result | {"bleu4": corpus_bleu(ours, [theirs], tokenize="none").score}


def grade(written: list[tuple[str, bool]], true: list[str]) -> dict[str, float]:
    """Return the shares of answers (text, whether it ended) that are right, and complete."""
    right = [number(text) is not None and number(text) == number(answer) for (text, _), answer in zip(written, true, strict=True)]
    complete = [ended and number(text) is not None for text, ended in written]
    return {"accuracy": sum(right) / len(right), "answer_completeness": sum(complete) / len(complete)}


def number(text: str) -> float | None:
    """Return the last number of a text; commas may group its digits."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
