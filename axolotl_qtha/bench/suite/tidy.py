"""A suite's results in the form that other programs and papers take: results.csv, comparisons.csv and results.json.

results.csv has a row for each run and figure, comparisons.csv one for each paired difference; results.json has both, and the
settings and versions that they came from. An empty cell, in JSON null, is a figure that a run does not have.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Any

from . import results
from .comparisons import Comparison
from .execution import Execution, without_paths
from .spec import Cell

RUNS, PAIRS, ALL = "results.csv", "comparisons.csv", "results.json"
SCHEMA = 1
NATS = "nats a token"
COSTS = {
    "train_time": "seconds",
    "cpu_memory_max": "bytes",
    "accelerator_memory_max": "bytes",
    "file_size": "bytes",
}
FAMILY = "Holm's correction is over all paired differences of the validation loss in this suite"


@dataclass(frozen=True)
class Row:
    """A figure of a run."""

    task: str
    adapter: str
    suite_rank: int  # the one of the suite's `ranks` that it is compared at
    rank: int  # its own: that of `lora-equal` is another
    budget: float | None  # param_budget, of QTHA adapters and what is to equal them
    parameters: int  # trained
    learning_rate: float
    chosen: bool  # whether the learning rate is the one that the figures of the summary are of
    seed: int
    status: str
    metric: str
    value: float | None
    unit: str
    commit: str  # of this project's clone, with "+" where files were changed since; empty where it is not known
    predictions: str  # file of its answers, from the suite's folder; empty where there is none


Runs = dict[Cell, dict[str, Any]]


def runs_of(execution: Execution) -> Runs:
    """Return the result of every run that there is."""
    return execution.found()


def rows(execution: Execution, done: Runs) -> list[Row]:
    """Return every figure of every run."""
    chosen = execution.chosen()
    return [row for cell, run in done.items() for row in _of_run(execution, cell, run, chosen.get((cell.task, cell.method)))]


def _of_run(execution: Execution, cell: Cell, run: dict[str, Any], rate: float | None) -> list[Row]:
    info, method = run["train_info"], cell.method
    answers = execution.predictions_path(cell)
    return [
        Row(
            task=cell.task,
            adapter=method.adapter,
            suite_rank=method.rank,
            rank=execution.sizes[method].rank,
            budget=method.budget,
            parameters=info.get("num_trainable_params") or execution.sizes[method].parameters,
            learning_rate=cell.learning_rate,
            chosen=cell.learning_rate == rate,
            seed=cell.seed,
            status=info["status"],
            metric=metric,
            value=_figure(run, metric),
            unit=unit,
            commit=commit(run),
            predictions=f"{answers.parent.name}/{answers.name}" if answers.exists() else "",
        )
        for metric, unit in _metrics(execution, cell.task).items()
    ]


def _metrics(execution: Execution, name: str) -> dict[str, str]:
    """Return the units of a task's figures, by their names."""
    task = execution.prepared(name)
    scores = task.scoring.metrics if task.scoring else {}
    tested = {"test loss": NATS} if task.test is not None else {}
    return {"valid loss": NATS, **tested, **{key: metric.unit for key, metric in scores.items()}, **COSTS}


def _figure(run: dict[str, Any], metric: str) -> float | None:
    """Return a figure of a run that came to its end."""
    if metric in COSTS:
        value = run["train_info"].get(metric) if run["train_info"]["status"] == "success" else None
        return None if value is None else float(value)
    return results.final(run, metric)


def commit(run: dict[str, Any]) -> str:
    """Return the commit that a run was made by, with "+" where files were changed since; empty where it is not known."""
    found = run["meta_info"].get("source_info") or {}  # results of earlier versions have none
    return f"{found['commit']}{'+' * bool(found['dirty'])}" if found else ""


def pair(made: Comparison) -> dict[str, Any]:
    """Return a paired difference as a row."""
    ours, other, value = made.difference.ours, made.difference.other, made.difference.value
    half = None if value is None else value.half
    test_half = None if made.test is None else made.test.half
    return {
        "task": ours.task,
        "adapter": ours.method.adapter,
        "other": other.method.adapter,
        "suite_rank": ours.method.rank,
        "budget": ours.method.budget,
        "other_budget": other.method.budget,
        "parameters": ours.parameters,
        "other_parameters": other.parameters,
        "metric": "valid loss",
        "unit": NATS,
        "seeds": None if value is None else value.count,
        "difference": None if value is None else value.mean,
        "half_interval_95": half,
        "p": made.p,
        "p_holm": made.p_holm,
        "verdict": made.verdict,
        "margin": made.margin,
        "p_equivalent": made.p_equivalent,
        "p_equivalent_holm": made.p_equivalent_holm,
        "equivalent": made.equivalent,
        "test_difference": None if made.test is None else made.test.mean,
        "test_half_interval_95": test_half,
    }


def versions(done: Runs) -> list[dict[str, Any]]:
    """Return what runs were made by and on, each once: packages, source, machine, and how many runs."""
    found: dict[str, dict[str, Any]] = {}
    for run in done.values():
        meta = {key: run["meta_info"].get(key) or {} for key in ("package_info", "source_info", "system_info")}
        found.setdefault(json.dumps(meta, sort_keys=True), {**meta, "runs": 0})["runs"] += 1
    return list(found.values())


def write(execution: Execution, made: list[Comparison], command: str) -> None:
    """Write the three files into the suite's folder, each whole or not at all.

    Args:
        execution: the suite.
        made: its paired differences.
        command: that made the results.
    """
    done = runs_of(execution)
    runs, pairs = [vars(row) for row in rows(execution, done)], [pair(each) for each in made]
    whole = {
        "schema_version": SCHEMA,
        "command": command,
        "suite": without_paths(execution.suite.model_dump()),
        "made_by": versions(done),
        "family": FAMILY,
        "runs": runs,
        "comparisons": pairs,
    }
    results.write_text(_csv(runs), execution.folder / RUNS)
    results.write_text(_csv(pairs), execution.folder / PAIRS)
    results.write(whole, execution.folder / ALL)


def _csv(lines: list[dict[str, Any]]) -> str:
    """Return rows of equal keys as CSV; numbers are written in full, so that they read back as they were."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
