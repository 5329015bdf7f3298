"""Tasks of one's own: blocks in the suite's YAML, with data sets as Axolotl has them."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..tasks import Data, Prepared, Scoring, Task, prepare
from .score import METRICS, score


class Block(Data):
    """A task of one's own.

    Raises:
        ValueError: if there is nothing to score.
    """

    score: Literal["text", "arithmetic"] | None = Field(
        default=None, description="How answers to the test set are scored: `text` ROUGE and BLEU, `arithmetic` the last number."
    )
    score_rows: Annotated[int, Field(ge=1, strict=True)] = Field(default=200, description="Answers that are scored, at most.")
    score_tokens: Annotated[int, Field(ge=1, strict=True)] = Field(default=256, description="Tokens of an answer, at most.")

    @model_validator(mode="after")
    def _test_to_score(self) -> Block:
        if self.score and self.test is None:
            raise ValueError(f"score: {self.score!r} needs a test set. What works: a `test:` entry, or no `score`.")
        return self


def ready(task: Task | Block, base: str, root: Path) -> Prepared:
    """Return a task ready to be trained on; see `tasks.prepare`."""
    prepared = prepare(task, base, root)
    if not isinstance(task, Block) or task.score is None:
        return prepared
    scoring = Scoring(METRICS[task.score], partial(score, task.score, task.score_rows, task.score_tokens))
    return dataclasses.replace(prepared, scoring=scoring)
