"""Takes over results of a suite that were made elsewhere: in another call's folder, on another machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from . import results
from .execution import Execution
from .spec import Cell, grid


@dataclass
class Found:
    """What a folder has for a suite."""

    folder: Path
    taken: dict[Cell, Path] = field(default_factory=dict)  # results that are missing here
    kept: int = 0  # those that are here already
    failed: int = 0
    others: int = 0  # files that are no runs of this suite
    differ: list[str] = field(default_factory=list)

    def words(self) -> str:
        """Return in words what became of its results."""
        parts = [f"{len(self.taken)} results taken over"]
        parts += [f"{self.kept} were here already"] * bool(self.kept)
        parts += [f"{self.failed} failed ones left"] * bool(self.failed)
        parts += [f"{self.others} are of no run of this suite"] * bool(self.others)
        return "\n".join([f"{self.folder}: {', '.join(parts)}.", *self.differ])


def add(execution: Execution, folders: Sequence[Path], out: Console) -> None:
    """Take over the results, and the answers, of runs of a suite that are missing here; what is here is never changed.

    Args:
        execution: the suite, its tasks' data made.
        folders: each the `output_dir` of another call, or the `results` in it; the first that has a run counts.
        out: where it is told.

    Raises:
        ValueError: naming the folder or file, if one is damaged, of another version or of other settings; then nothing is taken.
    """
    # all runs that the suite could have, whatever the rates that it chooses
    cells = {cell.name: cell for cell in grid(execution.suite, execution.suite.seeds)}
    here = {cell: run for cell, run in execution.results(cells.values()).items() if run["train_info"]["status"] != "failed"}
    for each in [_look(execution, folder, cells, here) for folder in folders]:
        for cell, path in each.taken.items():
            answers = _answers(path, cell)
            kept = execution.predictions_path(cell)
            kept.unlink(missing_ok=True)  # those of a run that failed here
            if answers.exists():
                results.write_text(answers.read_text(encoding="utf-8"), kept)
            results.write_text(path.read_text(encoding="utf-8"), execution.result_path(cell))
        out.print(each.words(), markup=False, highlight=False)


def _look(execution: Execution, folder: Path, cells: dict[str, Cell], here: dict[Cell, dict[str, Any]]) -> Found:
    """Read a folder's results; those that are taken count as here from then on."""
    inner = folder / "results"
    paths = sorted((inner if inner.is_dir() else folder).glob("*.json"))
    found = Found(folder)
    for path in paths:
        if (cell := cells.get(path.stem)) is None:
            found.others += 1
            continue
        run = _read(execution, path, cell)
        if run["train_info"]["status"] == "failed":
            found.failed += 1
        elif cell in here:
            found.kept += 1
            if json.dumps(run, sort_keys=True) != json.dumps(here[cell], sort_keys=True):
                found.differ.append(f"{cell.name} differs from the one there is, which is kept: {_difference(here[cell], run)}.")
        else:
            found.taken[cell], here[cell] = path, run
    if len(paths) == found.others:
        raise ValueError(
            f"--add: {str(folder)!r} holds no result of this suite. What works: the output_dir of a call with the same suite."
        )
    return found


def _answers(path: Path, cell: Cell) -> Path:
    """Return where the answers of a run are, if there are any, beside its result."""
    return path.parent.parent / "predictions" / f"{cell.name}.jsonl"


def _read(execution: Execution, path: Path, cell: Cell) -> dict[str, Any]:
    """Return the result of a run that was made elsewhere.

    Raises:
        ValueError: if it cannot be taken over.
    """
    try:
        run = results.read(path)
        method = asdict(cell.method)
        wanted = {"task": cell.task, **method, "learning_rate": cell.learning_rate, "seed": cell.seed}
        assert run["cell"] == wanted
        assert isinstance(run["settings"], str)
        assert {"error_msg", "created_at"} <= set(run["run_info"])
        assert isinstance(run["meta_info"]["package_info"], dict)
        assert all(isinstance(row["step"], int) for row in run["train_info"]["metrics"])
        assert run["train_info"]["status"] != "success" or results.final(run, "valid loss") is not None
        if (answers := _answers(path, cell)).exists():
            assert all(isinstance(json.loads(line), dict) for line in answers.read_text(encoding="utf-8").splitlines())
    except (OSError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"--add: {path} is damaged. What works: copy the folder once more.") from error
    except ValueError as error:
        why = str(error).split(". What works")[0].removeprefix("output_dir: ")
        raise ValueError(
            f"--add: {path} cannot be taken over ({why}). What works: copy the folder once more, or none of it."
        ) from error
    if run["settings"] != (mark := execution.settings(cell)[1]):
        raise ValueError(
            f"--add: {path} was run with other settings ({run['settings']}, here {mark}). What works: results of the same suite "
            "file and version of axolotl-qtha, with base and data at the same paths."
        )
    return run


def _difference(here: dict[str, Any], there: dict[str, Any]) -> str:
    """Return in words what is different in two results of one run."""
    states = [run["train_info"]["status"] for run in (here, there)]
    if states[0] != states[1]:
        return f"{states[0]} here, {states[1]} there"
    for key in ("valid loss", "test loss"):
        losses = [results.final(run, key) for run in (here, there)]
        if losses[0] != losses[1]:
            return f"{key} {losses[0]} here, {losses[1]} there"
    return "the same losses, other times or versions"
