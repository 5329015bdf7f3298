"""`axolotl qtha-bench`, from the options to the summary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...errors import refusal
from .adding import add
from .apart import stoppable
from .execution import Execution, count
from .part import Part
from .running import Call, prepare
from .spec import read_suite
from .summary import write_summary
from .table import entries


@dataclass(frozen=True)
class BenchOptions:
    """The command's options."""

    suite: Path
    jobs: int | None = None
    dry_run: bool = False
    summary_only: bool = False
    overwrite: bool = False
    minutes: float | None = None
    part: str | None = None
    add: tuple[Path, ...] = ()


def bench(options: BenchOptions, out: Console) -> bool:
    """Run a suite and write its summary; return whether no run failed. A limit of time that ends it is no failure.

    Raises:
        ValueError: naming the key, if something does not fit.
    """
    _check(options)
    part = None if options.part is None else Part.read(options.part)
    execution = Execution(read_suite(options.suite), options.jobs)
    if options.dry_run:
        out.print(plan(execution))
        return True
    same = "The same line without --overwrite" if options.overwrite else "The same line"
    call = Call(execution, out, options.minutes, part)
    try:
        with stoppable():
            if options.add:
                prepare(execution, out)
                add(execution, options.add, out)
            if not options.summary_only:
                call.run(options.overwrite)
    except KeyboardInterrupt:
        out.print(f"Stopped; the runs under way are lost. {same} goes on with the others.", markup=False)
        raise
    if words := _left(call, options, same):
        out.print(words, markup=False, highlight=False)
    if call.ended_early and not execution.found():
        return True
    path = write_summary(execution, f"axolotl qtha-bench {_shown(options.suite)}")
    failed = sum(entry.count("failed") for entry in entries(execution))
    out.print(f"{path} written.", markup=False, highlight=False)
    if failed:
        out.print(
            f"{failed} runs failed: see the logs in {execution.folder / 'logs'}; the same line tries them again.", markup=False
        )
    return not failed


def _check(options: BenchOptions) -> None:
    """Refuse options that do not go together, and a time that is none.

    Raises:
        ValueError: naming the option.
    """
    if options.minutes is not None and not (math.isfinite(options.minutes) and options.minutes > 0):
        raise refusal("--minutes", options.minutes, "is no time", "`--minutes 30`")
    for name, given in {"--dry-run": options.dry_run, "--summary-only": options.summary_only}.items():
        for key in ("minutes", "part"):
            if given and getattr(options, key) is not None:
                raise refusal(f"--{key}", getattr(options, key), f"is for runs, and {name} makes none", "one of the two")
    for name, given in {"--dry-run": options.dry_run, "--overwrite": options.overwrite}.items():
        if given and options.add:
            raise refusal("--add", str(options.add[0]), f"does not go with {name}", "one after the other")


def _left(call: Call, options: BenchOptions, same: str) -> str:
    """Return what is left of a suite, and what goes on with it; empty if nothing is."""
    done, total = call.execution.progress()
    if call.ended_early:
        stopped = f"; {call.stopped} under way were stopped" if call.stopped else ""
        return (
            f"The limit of {options.minutes:g} minutes: {done} of {total} runs are done{stopped}. {same} goes on with the others."
        )
    if options.part is not None and done < total:
        return (
            f"Part {options.part} has nothing left to run for now: {done} of {total} runs are done. What works: `--add FOLDER` "
            "with the output_dir of the other parts; the rates that all of them choose are then run at the other seeds."
        )
    return ""


def plan(execution: Execution) -> Table:
    """Return what would be run."""
    suite, sizes = execution.suite, execution.sizes
    grid, seeds = len(suite.learning_rates), len(suite.seeds)
    at = "every seed" if len(suite.search_seeds) == seeds else "the first seed"
    table = Table(
        title=f"{count(suite)} runs of {suite.max_steps} steps, {execution.count} at a time",
        caption=f"On each of {', '.join(suite.task_names)}: {grid} learning rates at {at}, the best at {seeds} seeds.",
    )
    for head in ("adapter", "rank", "parameters"):
        table.add_column(head, justify="left" if head == "adapter" else "right")
    for method, size in sizes.items():
        table.add_row(method.label, str(size.rank), f"{size.parameters:,}")
    return table


def _shown(path: Path) -> str:
    """Return a path that tells nothing of this machine."""
    return path.name if path.is_absolute() else str(path)
