"""Whether there is anything to train on: a row, and in it a token that counts.

Axolotl trains on rows whose labels are all masked: the loss is 0, and an adapter is saved that learned nothing. Without a row
it ends in whatever the first line that needs one raises. So its loading is watched (`watch_loading`): what it raises is told with
the data set and the column, and then the rows are looked at until one counts. Rows that are streamed come later: `watch_batches`
looks at them where the trainer takes its first batches.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from axolotl.common import datasets as host
from axolotl.utils.logging import get_logger
from datasets import Dataset
from datasets.exceptions import DatasetsError

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from transformers import Trainer

LOG = get_logger(__name__)
MASKED = -100
ROWS = 1000  # looked at in one go
STEPS = 8  # whose batches are looked at, where rows are streamed
# The columns of answers, by `type:`.
ANSWERS = {"alpaca": "output", "chat_template": "messages", "completion": "text", "pretrain": "text"}
TOLD = re.compile(r"dropp|truncat|skipp|empty", re.IGNORECASE)  # lines of Axolotl's that say what became of rows
NO_ROWS = (
    "corresponds to no data",
    "num_samples=0",
    "no samples left",
    'Field "input_ids"',
)  # in what Axolotl and datasets raise
BAD_ROW = ("keys are required", "text input must be of type")
RAISED = (StopIteration, LookupError, AttributeError, TypeError, ValueError, DatasetsError)


def watch_loading(cfg: DictDefault) -> None:
    """Have the data of a training checked as Axolotl loads them: the next time it does, for this configuration.

    The loading raises ValueError then if there is nothing to train on, or to evaluate on in `test_datasets:`; every rank loads
    all rows, so every rank stops.
    """
    for name in ("prepare_datasets", "prepare_preference_datasets"):
        load = getattr(host, name)
        setattr(host, name, _checked(cfg, name, getattr(load, "_unwatched", load)))


def _checked(watched: DictDefault, name: str, load: Callable[..., Any]) -> Callable[..., Any]:
    def checked(cfg: DictDefault, *args: Any, **kwargs: Any) -> Any:
        if cfg is not watched:
            return load(cfg, *args, **kwargs)
        setattr(host, name, load)
        with _Told() as told:
            try:
                found = load(cfg, *args, **kwargs)
            except RAISED as error:
                if (why := _why(error)) is None:
                    raise
                key, entries = _where(error, cfg)
                raise _nothing(cfg, key, entries, why, told.lines) from error
        train, evaluated = found[:2]
        for key, rows in ((_key(cfg), train), ("test_datasets" if cfg.test_datasets else "val_set_size", evaluated)):
            if rows is not None:
                check(cfg, key, rows, told.lines)
        return found

    checked._unwatched = load  # type: ignore[attr-defined]
    return checked


class _Told(logging.Handler):
    """Collects what Axolotl says of rows that it drops or shortens."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if TOLD.search(line := record.getMessage()) and line not in self.lines:
            self.lines.append(line)

    def __enter__(self) -> _Told:
        logging.getLogger("axolotl").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("axolotl").removeHandler(self)


def check(cfg: DictDefault, key: str, rows: Any, told: list[str]) -> None:
    """Refuse loaded rows of which none counts, and warn if most do not.

    Args:
        cfg: Axolotl's configuration.
        key: of the YAML, that names them.
        rows: as Axolotl loaded them; streamed ones, whose number is not known, are left to `watch_batches`.
        told: what it said of rows that it dropped.

    Raises:
        ValueError: naming the data sets, the column and `sequence_len`.
    """
    if not hasattr(rows, "__len__"):
        return
    entries = _entries(cfg, key)
    if len(rows) == 0:
        raise _nothing(cfg, key, entries, "no row is left", told)
    if not isinstance(rows, Dataset) or (columns := _columns(rows)) is None:
        return
    looked_at = rows.select_columns(columns).with_format("arrow")
    counts = [_count(looked_at[:ROWS])]
    for start in range(ROWS, len(rows), ROWS) if not counts[0] else ():
        counts.append(_count(looked_at[start : start + ROWS]))
        if counts[-1]:
            break
    if not any(counts):
        why = (
            "every label is masked (-100)" if columns == ["labels"] else "the answers are empty, or the two of a row are the same"
        )
        raise _nothing(cfg, key, entries, f"none of {len(rows):,} rows has anything to learn from: {why}", told)
    first = min(ROWS, len(rows))
    if 2 * counts[0] < first:
        LOG.warning(
            f"{key}: {first - counts[0]:,} of the first {first:,} rows have nothing to learn from (masked labels, empty or equal "
            f"answers), and count as rows all the same. {_works(cfg, key, entries)}"
        )


def _columns(rows: Dataset) -> list[str] | None:
    """Return the columns that tell whether a row counts, None where they are not known."""
    names = rows.column_names
    if "labels" in names:
        kind = rows.features.arrow_schema.field("labels").type
        return ["labels"] if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
    for columns in (["chosen", "rejected"], ["completion"]):
        if set(columns) <= set(names):
            return columns
    return None


def _count(table: Any) -> int:
    """Return how many rows of a table count: a label that is not masked, a better answer than the other, or any."""
    if table.column_names == ["labels"]:
        labels = table["labels"].combine_chunks()
        counted = pc.not_equal(pc.list_flatten(labels), MASKED)
        return len(pc.unique(pc.list_parent_indices(labels).filter(counted)))
    answers = [table[name].to_pylist() for name in table.column_names]
    return sum(first != second for first, second in zip(*answers, strict=True)) if len(answers) == 2 else sum(map(bool, *answers))


def watch_batches(trainer: Trainer, cfg: DictDefault) -> None:
    """Have the first batches of streamed rows looked at before the first step: up to eight steps' of them, until a label counts.

    The trainer gets them all, in their order. Ranks look together, so they stop together.
    """
    if hasattr(trainer.train_dataset, "__len__"):
        return
    take, ahead, key = trainer.get_batch_samples, deque[Any](), _key(cfg)
    looked = False

    def look(batches: Iterator[Any], count: int, device: torch.device) -> None:
        taken = 0
        with _Told() as told:
            for _ in range(STEPS):
                try:
                    ahead.append(take(batches, count, device))
                except RAISED as error:
                    if (why := _why(error)) is None:
                        raise
                    raise _nothing(cfg, key, _entries(cfg, key), why, told.lines) from error
                mine = torch.tensor([[len(ahead[-1][0]), sum(map(_labels, ahead[-1][0]))]], device=device)
                here, labels = trainer.accelerator.gather(mine).sum(0).tolist()
                taken += here
                if labels:
                    return
                if not here:
                    break
        why = f"all labels of the first {taken:,} batches are masked (-100)" if taken else "no row is left"
        raise _nothing(cfg, key, _entries(cfg, key), why, told.lines)

    def checked(batches: Iterator[Any], count: int, device: torch.device) -> Any:
        nonlocal looked
        if not looked:
            looked = True
            look(batches, count, device)
        return ahead.popleft() if ahead else take(batches, count, device)

    trainer.get_batch_samples = checked  # type: ignore[method-assign, assignment]


def _labels(batch: Any) -> int:
    """Return how many labels of a batch count; 1 for one that has none, and is learned from in another way."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    return int(labels.ne(MASKED).sum()) if isinstance(labels, torch.Tensor) else 1


def _why(error: BaseException) -> str | None:
    """Return in words what was raised over rows; None where Axolotl says by itself what is wrong."""
    text = str(error)
    if isinstance(error, StopIteration) or any(part in text for part in NO_ROWS):
        return "no row is left"
    if isinstance(error, KeyError) and (found := re.search(r"^'(\w+)'$|KeyError: '(\w+)'\s*$", text.strip())):
        return f"there is no column {found[1] or found[2]!r}"
    if isinstance(error, ValueError) and not any(part in text for part in BAD_ROW):
        return None
    last = str(error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error).strip().splitlines()[-1:]
    return f"a row cannot be read ({type(error).__name__}: {''.join(last)[:200]})"


def _where(error: BaseException, cfg: DictDefault) -> tuple[str, list[Any]]:
    """Return the YAML's key and the data set that Axolotl was reading, which its functions on the way to the error know."""
    key, entries = _key(cfg), None
    for frame, _ in walk_tb(error.__traceback__):
        found = frame.f_locals
        if not str(frame.f_globals.get("__name__")).startswith("axolotl.utils.data"):
            continue
        if found.get("split") == "test":
            key = "test_datasets"
        if "datasets_configs" in found and isinstance(found.get("i"), int):
            entries = [found["datasets_configs"][found["i"]]]
        elif found.get("dataset_config") is not None:
            entries = [found["dataset_config"]]
    return key, entries or _entries(cfg, key)


def _key(cfg: DictDefault) -> str:
    return "pretraining_dataset" if cfg.pretraining_dataset else "datasets"


def _entries(cfg: DictDefault, key: str) -> list[Any]:
    found = cfg["datasets" if key == "val_set_size" else key] or []
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _named(entry: Any) -> str:
    if not hasattr(entry, "get"):
        return repr(entry)
    kind = entry.get("type")
    return f"{entry.get('path')!r} (type: {kind if isinstance(kind, str) else 'of its own' if kind else 'none'})"


def _answer(entry: Any) -> str | None:
    """Return the column that the answers of a data set are read from, None if it is not known."""
    if not hasattr(entry, "get"):
        return "text"
    kind = str(entry.get("type") or "").split(":")[0].split(".")[0]
    field = entry.get("field_messages") if kind == "chat_template" else entry.get("field") or entry.get("text_column")
    return field or ANSWERS.get(kind)


def _works(cfg: DictDefault, key: str, entries: list[Any]) -> str:
    length = "eval_sequence_len" if key == "test_datasets" and cfg.eval_sequence_len else "sequence_len"
    columns = sorted({column for entry in entries if (column := _answer(entry))})
    answers = f"text in {' and '.join(f'column {column!r}' for column in columns)}" if columns else "answers that are not empty"
    masked = ", or `train_on_inputs: true`" if not cfg.rl and not cfg.train_on_inputs and key != "pretraining_dataset" else ""
    return f"What works: {answers}, a `{length}:` (now {cfg[length]}) that prompt and answer fit into{masked}."


def _nothing(cfg: DictDefault, key: str, entries: list[Any], why: str, told: list[str]) -> ValueError:
    names = ", ".join(map(_named, entries[:3])) + (", ..." if len(entries) > 3 else "")
    said = f" Axolotl says: {'; '.join(told[:4])}." if told else ""
    use = "evaluate on" if key in ("test_datasets", "val_set_size") else "train on"
    return ValueError(f"{key}: {names} leaves nothing to {use}: {why}.{said} {_works(cfg, key, entries)}")
