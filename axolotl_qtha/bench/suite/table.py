"""What a suite's results come to: figures of each method on each task, and differences between them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from . import results
from .adapters import ADAPTERS, CONTROLS, EQUAL, LORA
from .execution import Execution
from .spec import Cell, Method
from .statistics import Interval, interval, paired

LOSSES = ("valid loss", "test loss")


@dataclass
class Entry:
    """A method on a task, at the learning rate chosen for it."""

    task: str
    method: Method
    parameters: int  # as counted in the runs
    learning_rate: float | None = None  # None: no run of the grid came to an end
    at_edge: bool = False  # of the grid: another rate might be better
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)  # results by seed
    missing: int = 0  # seeds not run
    unsearched: int = 0  # runs of the grid that are not there: another rate may turn out to be the best
    lost: dict[float, str] = field(default_factory=dict)  # other rates of the grid whose runs did not all come to an end

    def values(self, key: str) -> dict[int, float]:
        """Return a figure by seed, of the runs that have it."""
        return {seed: value for seed, run in self.runs.items() if (value := results.final(run, key)) is not None}

    def mean(self, key: str) -> Interval | None:
        """Return mean and interval over the seeds; None unless all came to an end."""
        return None if self.incomplete else interval(list(self.values(key).values()))

    def count(self, status: str) -> int:
        """Return how many runs ended so."""
        return ended(self.runs.values(), status)

    @property
    def incomplete(self) -> str:
        """Return what is wrong with the runs, in words; empty if nothing is."""
        words = troubles(self.runs.values(), len(self.runs) + self.missing)
        if self.missing:
            words.append(f"{self.missing} of {len(self.runs) + self.missing} not run")
        if self.unsearched:
            words.append(f"{self.unsearched} of its grid not run")
        return ", ".join(words)

    def curve(self, key: str) -> dict[int, list[float]]:
        """Return a loss over steps, of every seed that came to an end."""
        found: dict[int, list[float]] = {}
        for run in self.runs.values():
            if run["train_info"]["status"] == "success":
                for step, value in results.at_steps(run, key).items():
                    found.setdefault(step, []).append(value)
        return found

    def each(self, keys: Iterable[str]) -> list[float]:
        """Return seconds or bytes of every run, under the first of the names that it has."""
        infos = [run["train_info"] for run in self.runs.values()]
        return [value for info in infos if (value := next((info[key] for key in keys if info.get(key)), None))]

    def largest(self, key: str) -> float | None:
        """Return the median over runs of seconds or bytes."""
        values = sorted(value for run in self.runs.values() if (value := run["train_info"].get(key)))
        return values[len(values) // 2] if values else None


def ended(runs: Iterable[dict[str, Any]], status: str) -> int:
    """Return how many runs ended so."""
    return sum(run["train_info"]["status"] == status for run in runs)


def troubles(runs: Collection[dict[str, Any]], seeds: int) -> list[str]:
    """Return how many runs did not come to an end, and how they ended."""
    return [f"{n} of {seeds} {status}" for status in ("diverged", "failed") if (n := ended(runs, status))]


def entries(execution: Execution) -> list[Entry]:
    """Return every method on every task."""
    suite, chosen = execution.suite, execution.chosen()
    done, left = execution.found(), execution.unsearched()
    found = []
    for task in suite.task_names:
        for method in suite.methods():
            entry = Entry(task, method, execution.sizes[method].parameters, chosen.get((task, method)))
            rates = sorted(suite.learning_rates)
            entry.at_edge = len(rates) > 1 and entry.learning_rate in (rates[0], rates[-1])
            # Where no rate came to an end, the first seed's runs say how.
            rate = rates[0] if entry.learning_rate is None else entry.learning_rate
            for seed in suite.seeds:
                if (cell := Cell(task, method, rate, seed)) in done:
                    entry.runs[seed] = done[cell]
            entry.missing = len(suite.seeds) - len(entry.runs)
            entry.unsearched = left.get((task, method), 0)
            entry.parameters = next(
                (count for run in entry.runs.values() if (count := run["train_info"].get("num_trainable_params"))),
                entry.parameters,
            )
            for other in rates:
                grid = [run for seed in suite.search_seeds if (run := done.get(Cell(task, method, other, seed)))]
                if other != rate and (words := troubles(grid, len(suite.search_seeds))):
                    entry.lost[other] = ", ".join(words)
            found.append(entry)
    return found


@dataclass(frozen=True)
class Difference:
    """Two methods on one task: ours - other, over seeds that both have."""

    ours: Entry
    other: Entry
    key: str
    value: Interval | None

    def by_step(self) -> dict[int, Interval]:
        """Return the difference of a loss at each step at which both were measured, over seeds that both have."""
        ours, others = (
            {seed: results.at_steps(run, self.key) for seed, run in entry.runs.items()} for entry in (self.ours, self.other)
        )
        steps = sorted({step for curve in ours.values() for step in curve})
        values = {step: paired(_at(ours, step), _at(others, step)) for step in steps}
        return {step: value for step, value in values.items() if value is not None}

    @property
    def verdict(self) -> str:
        """Return what the difference of losses says."""
        if self.value is None:
            return "not known: runs are missing or diverged"
        if self.value.half is None:
            return "one seed: no interval"
        if self.value.below_zero:
            return "lower"
        return "higher" if self.value.above_zero else "not told apart (the interval includes zero)"


def _at(curves: dict[int, dict[int, float]], step: int) -> dict[int, float]:
    """Return the values of curves at a step, where they have one."""
    return {key: curve[step] for key, curve in curves.items() if step in curve}


def _compared(adapter: str) -> set[str]:
    """Return what an adapter is compared with besides LoRA, at one budget where both have one."""
    if adapter == "qtha":
        return {EQUAL, *CONTROLS}
    return set() if adapter in ADAPTERS else {"qtha"}  # a variant


def differences(found: list[Entry], key: str = "valid loss") -> list[Difference]:
    """Return every method against LoRA of its rank, `qtha` against LoRA of its size and each control, variants against `qtha`."""
    pairs = []
    for entry in found:
        for other in found:
            if other.task != entry.task or other.method.rank != entry.method.rank or other is entry:
                continue
            mine, its = entry.method.adapter, other.method.adapter
            budgets = {entry.method.budget, other.method.budget} - {None}
            if its == LORA or (its in _compared(mine) and len(budgets) <= 1):
                pairs.append((entry, other))
    return [
        Difference(a, b, key, None if a.incomplete or b.incomplete else paired(a.values(key), b.values(key))) for a, b in pairs
    ]
