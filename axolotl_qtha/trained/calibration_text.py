"""The text an export is fitted and measured on: of the configuration's own data, or of a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of a token that is not to be predicted
HELD_OUT = 0.2  # share of the tokens that the export is measured on and not fitted to


@dataclass(frozen=True)
class Sequence:
    """One text: the token numbers, and the labels, which are the same or IGNORED."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    """Sequences padded to one length, (sequences, length) each."""

    ids: Tensor
    labels: Tensor
    mask: Tensor  # bool: real tokens

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return what the model is called with."""
        return {"input_ids": self.ids.to(device), "attention_mask": self.mask.to(device, torch.long)}

    def targets(self) -> Tensor:
        """Return the tokens to predict, (N)."""
        return self.labels[:, 1:][self.labels[:, 1:] != IGNORED]


@dataclass(frozen=True)
class Text:
    """What to fit to, and what to measure on."""

    fit: list[Sequence]
    held_out: list[Sequence]
    source: str  # for the report


def tokens(sequences: Iterable[Sequence]) -> int:
    """Return how many tokens they hold."""
    return sum(len(sequence.ids) for sequence in sequences)


def of_datasets(train: Any, evaluation: Any, wanted: int) -> Text:
    """Take about `wanted` tokens of Axolotl's tokenised training set to fit to, and a quarter of that of the evaluation set.

    Without an evaluation set the last fifth of what was taken is held out.
    """
    fit = list(_first(rows(train), wanted))
    if evaluation is not None and len(evaluation):
        held_out = list(_first(rows(evaluation), max(1, wanted // 4)))
        return Text(fit, held_out, "the training and evaluation data of the configuration")
    return _split(fit, "the training data of the configuration")


def of_file(path: Path, tokenizer: Any, length: int, wanted: int) -> Text:
    """Take about `wanted` tokens of a text file, or of the `text` fields of a .jsonl file, in pieces of `length` tokens.

    Raises:
        ValueError: if the file cannot be read, or holds no text.
    """
    try:
        raw = path.read_text()
        documents = [json.loads(line)["text"] for line in raw.splitlines() if line.strip()] if path.suffix == ".jsonl" else [raw]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"--calibration: {str(path)!r} cannot be read ({type(error).__name__}: {error}). What works: a text file in "
            'UTF-8, or a .jsonl file with lines such as {"text": "..."}.'
        ) from error
    pieces: list[Sequence] = []
    for document in documents:
        ids = tokenizer(document, verbose=False)["input_ids"]
        pieces += [Sequence(ids[start : start + length], ids[start : start + length]) for start in range(0, len(ids), length)]
    taken = list(_first((piece for piece in pieces if len(piece.ids) > 1), wanted))
    return _split(taken, path.name)


def check(text: Text, least: int, key: str) -> None:
    """Refuse text of which there is not enough.

    Args:
        text: what was found.
        least: tokens that the fit needs.
        key: the option or key it came from.

    Raises:
        ValueError: saying how many tokens there are and how many it takes.
    """
    found, held_out = tokens(text.fit), tokens(text.held_out)
    predicted = sum(label != IGNORED for sequence in text.held_out for label in sequence.labels[1:])
    if found < least or not predicted:
        raise ValueError(
            f"{key}: {text.source} gives {found:,} tokens to fit to and {held_out:,} held out, {predicted:,} of them to predict; "
            f"this rank and surrogate need {least:,} to fit to. What works: `--calibration FILE` with at least "
            f"{int(least / (1 - HELD_OUT)) + 1:,} tokens of text like that the adapter will see, and `--tokens` as many."
        )


def batches(sequences: list[Sequence], most: int, pad: int) -> Iterator[Batch]:
    """Join sequences to batches of at most `most` tokens, padding included, or of one sequence."""
    waiting: list[Sequence] = []
    for sequence in sequences:
        longest = max([len(sequence.ids), *(len(other.ids) for other in waiting)])
        if waiting and longest * (len(waiting) + 1) > most:
            yield _pad(waiting, pad)
            waiting = []
        waiting.append(sequence)
    if waiting:
        yield _pad(waiting, pad)


def predicting(sequences: list[Sequence], most: int) -> list[Sequence]:
    """Return the first sequences, the last of them cut, that together predict at most `most` tokens."""
    kept: list[Sequence] = []
    left = most
    for sequence in sequences:
        wanted = [i for i, label in enumerate(sequence.labels) if i and label != IGNORED]
        if len(wanted) >= left:
            end = wanted[left - 1] + 1
            return [*kept, Sequence(sequence.ids[:end], sequence.labels[:end])] if left else kept
        kept.append(sequence)
        left -= len(wanted)
    return kept


def _pad(sequences: list[Sequence], pad: int) -> Batch:
    length = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        size = len(sequence.ids)
        ids[i, :size], labels[i, :size] = torch.tensor(sequence.ids), torch.tensor(sequence.labels)
        mask[i, :size] = True
    return Batch(ids, labels, mask)


def to_evaluate(train: Any, evaluation: Any) -> tuple[Any, str]:
    """Return Axolotl's evaluation set, or without one its training set, and which it is in words."""
    return (train, "the training data") if evaluation is None or not len(evaluation) else (evaluation, "the evaluation data")


def rows(data: Any) -> Iterator[Sequence]:
    """Yield the rows of a tokenised data set that predict something."""
    for row in data:
        if len(row["input_ids"]) > 1:
            yield Sequence(list(row["input_ids"]), list(row.get("labels") or row["input_ids"]))


def _first(sequences: Iterable[Sequence], wanted: int) -> Iterator[Sequence]:
    taken = 0
    for sequence in sequences:
        if taken >= wanted:
            return
        taken += len(sequence.ids)
        yield sequence


def _split(sequences: list[Sequence], source: str) -> Text:
    """Hold out the last fifth of the tokens, cutting the sequence that the border runs through."""
    wanted = int(tokens(sequences) * (1 - HELD_OUT))
    fit: list[Sequence] = []
    left = wanted
    for i, sequence in enumerate(sequences):
        if len(sequence.ids) > left:
            first = Sequence(sequence.ids[:left], sequence.labels[:left])
            rest = Sequence(sequence.ids[left:], sequence.labels[left:])
            return Text([*fit, *([first] if left > 1 else [])], [rest, *sequences[i + 1 :]], source)
        fit.append(sequence)
        left -= len(sequence.ids)
    return Text(fit, [], source)
