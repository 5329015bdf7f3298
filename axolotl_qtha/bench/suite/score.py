"""Scores of answers to any data set that Axolotl has tokenised: the question is what comes before the last labelled tokens."""

from __future__ import annotations

import re
from typing import Any

from ...trained.calibration_text import IGNORED
from ..tasks import Metric
from ..tasks.answers import generate, overlap

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
    written = generate(model, tokenizer, [question for question, _ in pairs], tokens)
    return overlap([text for text, _ in written], true, words) if kind == "text" else grade(written, true)


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


def grade(written: list[tuple[str, bool]], true: list[str]) -> dict[str, float]:
    """Return the shares of answers (text, whether it ended) that are right, and complete."""
    right = [number(text) is not None and number(text) == number(answer) for (text, _), answer in zip(written, true, strict=True)]
    complete = [ended and number(text) is not None for text, ended in written]
    return {"accuracy": sum(right) / len(right), "answer_completeness": sum(complete) / len(complete)}


def number(text: str) -> float | None:
    """Return the last number of a text; commas may group its digits."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
