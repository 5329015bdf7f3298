"""What a task is: data in three parts, and how answers to the test part are scored."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Row = dict[str, Any]
Scores = dict[str, float]
SPLITS = ("train", "validation", "test")
META = "meta.json"


@dataclass(frozen=True)
class Metric:
    """A figure of `score`."""

    meaning: str
    unit: str
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Scored:
    """What a model wrote, and what it is worth."""

    figures: Scores  # of all answers together
    answers: list[Row]  # one a question: `question`, `answer`, `true`, and the figures that an answer has by itself


@dataclass(frozen=True)
class Scoring:
    """Answers a model writes to rows of the test set, and figures about them."""

    metrics: dict[str, Metric]
    score: Callable[[Any, Any, list[Row]], Scored]  # (model, tokenizer, rows)


@dataclass(frozen=True)
class Task:
    """A task whose data are made, or shipped, here."""

    name: str
    title: str
    dataset: dict[str, Any]  # entry of Axolotl's `datasets:`, without `path`
    settings: dict[str, Any]  # further keys of Axolotl's
    write: Callable[[Path, Path], None]  # from the base's folder, {train, validation, test}.jsonl and maybe meta.json
    scoring: Scoring | None = None
    version: int = 1  # of the data: counted up with what `write` writes


class Data(BaseModel):
    """A task of one's own: a block in the suite's YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9_]+(-[a-z0-9_]+)*$", description="What it is called in tables and files.")
    train: dict[str, Any] = Field(description="Entry of Axolotl's `datasets:`.")
    validation: dict[str, Any] = Field(description="Entry of `test_datasets:`; chooses the learning rate.")
    test: dict[str, Any] | None = Field(default=None, description="Entry of `test_datasets:`; never chooses anything.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Further keys of Axolotl's.")


@dataclass(frozen=True)
class Prepared:
    """A task ready to be trained on: keys of Axolotl's YAML."""

    name: str
    title: str
    train: dict[str, Any]
    validation: dict[str, Any]
    test: dict[str, Any] | None
    settings: dict[str, Any]
    scoring: Scoring | None = None
    rows: list[Row] = field(default_factory=list)  # of the test set, for `scoring`
    floor: Scores = field(default_factory=dict)  # least losses possible, by split, in nats a token, where known

    def keys(self, test: bool = False) -> dict[str, Any]:
        """Return Axolotl's keys; with the test set in the validation set's place, if asked for."""
        held_out = self.test if test else self.validation
        return {**self.settings, "datasets": [self.train], "test_datasets": [held_out]}


def prepare(task: Task | Data, base: str, root: Path) -> Prepared:
    """Return a task, its data written to a folder in `root` if they are not there; whole or not at all.

    Args:
        task: the task.
        base: the base's folder or name.
        root: where the data go.

    Raises:
        ValueError: if its data cannot be made.
    """
    if isinstance(task, Data):
        return Prepared(task.name, task.name, task.train, task.validation, task.test, task.settings)
    folder = root / f"{task.name}-{_identity(task, Path(base))}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{task.name}-", dir=root))
        try:
            task.write(Path(base), scratch)
            os.rename(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    train, validation, test = ({"path": str(folder / f"{split}.jsonl"), **task.dataset} for split in SPLITS)
    held_out = {"split": "train"}  # Axolotl's name for all of a file
    meta = json.loads((folder / META).read_text()) if (folder / META).exists() else {}
    return Prepared(
        task.name,
        task.title,
        train,
        validation | held_out,
        test | held_out,
        task.settings,
        task.scoring,
        read(folder / "test.jsonl") if task.scoring else [],
        meta.get("floor", {}),
    )


def read(path: Path) -> list[Row]:
    """Return the rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(folder: Path, **splits: list[Row]) -> None:
    """Write a .jsonl file for each split."""
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _identity(task: Task, base: Path) -> str:
    """Return what decides on the data, as a few hexadecimal digits."""
    digest = hashlib.blake2b(f"{task.name} {task.version}".encode(), digest_size=4)
    for file in sorted(base.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
