"""Scores of answers to any data set that Axolotl has tokenised: the question is what comes before the last labelled tokens."""

from __future__ import annotations

import re
from typing import Any

from ...trained.calibration_text import IGNORED
from ..tasks import Metric, Scored
from ..tasks.answers import generate, overlap, overlaps, together

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


def score(kind: str, count: int, tokens: int, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> Scored:
    """Return the figures of METRICS[kind], and each answer.

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
    asked = [tokenizer.decode(question, skip_special_tokens=True) for question, _ in pairs]
    written = generate(model, tokenizer, [question for question, _ in pairs], tokens)
    texts = [text for text, _ in written]
    if kind == "text":
        each = overlaps(texts, true, words)
        return Scored(overlap(texts, true, words, each), together(asked, texts, true, each))
    marked = marks(written, true)
    return Scored(means(marked), together(asked, texts, true, marked))


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


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return WORD.findall(text.lower())


def marks(written: list[tuple[str, bool]], true: list[str]) -> list[dict[str, bool]]:
    """Return of each answer (text, whether it ended) whether it is right, and complete."""
    numbers = [(number(text), ended, number(known)) for (text, ended), known in zip(written, true, strict=True)]
    return [
        {"accuracy": found is not None and found == known, "answer_completeness": ended and found is not None}
        for found, ended, known in numbers
    ]


def means(marked: list[dict[str, bool]]) -> dict[str, float]:
    """Return the shares of answers that have each mark."""
    return {name: sum(mark[name] for mark in marked) / len(marked) for name in marked[0]}


def number(text: str) -> float | None:
    """Return the last number of a text; commas may group its digits."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
