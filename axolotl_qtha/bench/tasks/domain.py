"""Domain shift: a base that has read about Python, NumPy and PyTorch learns to answer questions about Qiskit.

The texts are the quickstart's (example_configs/quickstart/data), the figures those of the paper's dialogue task.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .answers import overlap, overlaps, prompts, together, write_answers
from .task import Metric, Row, Scored, Scoring, Task, read, write_rows

TEST_ROWS = 72  # the last of the training file
SCORED_ROWS, NEW_TOKENS = 48, 64


def write(base: Path, folder: Path) -> None:
    """Split the quickstart's data.

    Raises:
        ValueError: if they are not beside the base.
    """
    data = base.parent / "data"
    if not (data / "train.jsonl").is_file():
        works = "`base_model: example_configs/quickstart/base`, or tasks of your own"
        raise ValueError(f"tasks: 'domain' needs the quickstart's data, which are not in {str(data)!r}. What works: {works}.")
    rows = read(data / "train.jsonl")
    held_out = read(data / "validation.jsonl")
    write_rows(folder, train=rows[:-TEST_ROWS], validation=held_out, test=rows[-TEST_ROWS:])


def score(model: Any, tokenizer: Any, rows: list[Row]) -> Scored:
    """Return how much of the words of the true answers is in those written."""
    rows = rows[:SCORED_ROWS]
    written, true = write_answers(model, tokenizer, rows, NEW_TOKENS), [row["output"] for row in rows]
    each = overlaps(written, true)
    return Scored(overlap(written, true, each=each), together(prompts(rows), written, true, each))


METRICS = {
    "rouge1": Metric("F1 of words shared with the true answer, mean over answers (rouge-score)", "x 100"),
    "rouge2": Metric("F1 of pairs of words shared with the true answer, mean over answers", "x 100"),
    "rougeL": Metric("F1 of the longest common subsequence of words, mean over answers", "x 100"),
    "bleu4": Metric("BLEU-4 of all answers together (sacrebleu)", "x 100"),
}
DOMAIN = Task(
    "domain",
    "another domain: questions about Qiskit",
    {"ds_type": "json", "type": "alpaca"},
    {"sequence_len": 256, "train_on_inputs": False},
    write,
    Scoring(METRICS, score),
)
