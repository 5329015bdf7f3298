"""Runs what is left of a suite: the grid, then the rates it chose at the other seeds."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import gpu_memory, results
from .apart import apart
from .execution import Execution
from .part import Part
from .spec import Cell, repeats, search
from .worker import Job, Processes, has_gpu, import_all

Say = Callable[[str], None]


class Call:
    """One call of the command.

    Args:
        execution: the suite.
        out: where it is told.
        minutes: after which no run goes on, from now; None for no limit.
        part: of the suite that is run.
    """

    def __init__(self, execution: Execution, out: Console, minutes: float | None = None, part: Part | None = None) -> None:
        self.execution, self.out, self.part = execution, out, part or Part()
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.gpu = has_gpu()
        self.jobs = execution.count
        self.free: int | None = None  # bytes of the GPU
        self.stopped = 0  # runs that were under way at the limit
        self.ended_early = False  # whether runs are left that there was no time for
        self._told = ""

    def run(self, overwrite: bool = False) -> None:
        """Do what has not been done.

        Raises:
            ValueError: if there is a result from other settings or from another version, and `overwrite` is not set.
        """
        execution = self.execution
        if overwrite:
            for name in ("results", "predictions"):
                shutil.rmtree(execution.folder / name, ignore_errors=True)
        prepare(execution, self.out)
        phases = self._grid, self._seeds
        open_ = [cell for cells in phases for cell in execution.open(cells())]
        if open_ and not self.gpu:
            with self.out.status("importing Axolotl"):
                import_all()
        tokenise_all(execution, open_, self.out)
        if open_ and self.gpu and self.jobs > 1:
            self.free = gpu_memory.free()
        processes = Processes(self.jobs, not self.gpu, self.end, longest(execution, self.gpu))
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        # No thread that refreshes it: it could hold a lock while a run is forked.
        with Progress(*columns, console=self.out, auto_refresh=False) as progress:
            bar = progress.add_task("runs", total=self._total())
            for cells in phases:
                wanted = cells()
                todo = execution.open(wanted)
                progress.advance(bar, len(wanted) - len(todo))
                progress.refresh()

                def ended(job: Job) -> None:
                    _report(job, self._say)
                    progress.update(bar, advance=1, description=f"runs (last: {job.cell['task']}, {job.cell['adapter']})")
                    progress.refresh()

                self._phase(processes, todo, ended)
        self.stopped = processes.stopped

    def _grid(self) -> list[Cell]:
        return self.part.pick(search(self.execution.suite))

    def _seeds(self) -> list[Cell]:
        return repeats(self.execution.suite, self.execution.settled(), self.part)

    def _total(self) -> int:
        """Return the runs of this part, if each method gets a rate."""
        suite = self.execution.suite
        every = {(task, method): 0.0 for task in suite.task_names for method in suite.methods()}
        return len(self._grid()) + len(repeats(suite, every, self.part))

    def _phase(self, processes: Processes, cells: list[Cell], ended: Callable[[Job], None]) -> None:
        """Do runs; those that found the GPU's memory full beside others are done again at the end, each alone."""
        threads = None if self.gpu else max(1, (os.cpu_count() or 1) // self.jobs)
        waiting = [self.execution.job(cell, threads) for cell in cells]
        done, full = 0, list[Job]()
        while done < len(waiting):
            processes.count = self._at_a_time()
            # the first is alone where only it can tell what a run needs
            batch = waiting[done : done + 1] if self._unmeasured() else waiting[done:]
            most = processes.count
            with closing(processes.run(batch)) as each:
                for job in each:
                    done += 1
                    if most > 1 and self.gpu and gpu_memory.was_full(_error(job)):
                        Path(job.result).unlink()  # not counted as failed, and not lost if there is no time to repeat it
                        full.append(job)
                        self._say(f"GPU out of memory: {Path(job.result).stem} is run again at the end, alone.")
                    else:
                        ended(job)
                    processes.count = self._at_a_time()
                    most = max(most, processes.count)
            if done < len(waiting) and not processes.may_start():
                self.ended_early = True
                break
        processes.count = 1
        with closing(processes.run(full)) as each:
            repeated = 0
            for job in each:
                repeated += 1
                ended(job)
        self.ended_early |= repeated < len(full)

    def _unmeasured(self) -> bool:
        return self.free is not None and self._need() is None

    def _need(self) -> int | None:
        return gpu_memory.need(self.execution.found().values())

    def _at_a_time(self) -> int:
        """Return how many runs at a time there is room for now."""
        if self.free is None:
            return self.jobs
        need = self._need()
        if need is None:
            return 1
        if (at_a_time := gpu_memory.fitting(self.jobs, self.free, need)) < self.jobs:
            self._say_once(gpu_memory.words(self.jobs, self.free, need), f"{at_a_time} ")
        return at_a_time

    def _say(self, text: str) -> None:
        self.out.print(text, markup=False, highlight=False)

    def _say_once(self, text: str, key: str) -> None:
        """Say something, unless the last that was said so had the same key."""
        if key != self._told:
            self._told = key
            self._say(text)


def longest(execution: Execution, gpu: bool) -> float:
    """Return the seconds of the longest run that was made on a machine like this one; 0 if there is none."""
    here = {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()}
    seconds = [0.0]
    for run in execution.found().values():
        system = run["meta_info"].get("system_info") or {}
        alike = all(system.get(key) == value for key, value in here.items()) and (system.get("accelerator") != "CPU") == gpu
        if alike and run["train_info"]["status"] != "failed":
            seconds.append(run["run_info"].get("total_time") or 0.0)
    return max(seconds)


def prepare(execution: Execution, out: Console) -> None:
    """Make the tasks' data.

    Raises:
        ValueError: if they cannot be made.
    """

    def make() -> None:
        for name in execution.suite.task_names:
            execution.prepared(name)

    with out.status("making the tasks' data"):
        if (why := apart(make, execution.folder / "logs" / "data.log")) is not None:
            raise ValueError(f"tasks: their data could not be made: {why}")


def tokenise_all(execution: Execution, cells: list[Cell], out: Console) -> None:
    """Have Axolotl tokenise the data once, in the first seed's order, for all runs.

    Validation losses are means over batches, so all runs must see the same batches. Data that cannot be read make the runs
    fail, which report it.
    """
    from .cell import tokenise

    first = {cell.task: cell for cell in reversed(cells)}
    with out.status("tokenising the tasks' data"):
        for name, cell in first.items():
            job = execution.job(dataclasses.replace(cell, seed=execution.suite.seeds[0]), None)
            work = partial(tokenise, job.keys, execution.prepared(name), Path(job.scratch))
            apart(work, Path(job.log).with_name(f"{name}.log"))


def _error(job: Job) -> str:
    """Return the error of a run that failed; empty if it did not."""
    result = results.read(Path(job.result))
    error: Any = result["run_info"]["error_msg"]
    return str(error) if result["train_info"]["status"] == "failed" else ""


def _report(job: Job, say: Say) -> None:
    """Say what is wrong with a run that has ended, if anything is."""
    result = results.read(Path(job.result))
    if (status := result["train_info"]["status"]) != "success":
        say(f"{status}: {Path(job.result).stem}: {result['run_info']['error_msg']}")
