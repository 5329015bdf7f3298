"""`axolotl qtha-bench`, from the options to the summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .execution import Execution, count, stoppable
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


def bench(options: BenchOptions, out: Console) -> bool:
    """Run a suite and write its summary; return whether no run failed.

    Raises:
        ValueError: naming the key, if something does not fit.
    """
    execution = Execution(read_suite(options.suite), options.jobs)
    if options.dry_run:
        out.print(plan(execution))
        return True
    if not options.summary_only:
        try:
            with stoppable():
                execution.run(out, options.overwrite)
        except KeyboardInterrupt:
            out.print("Stopped; the runs under way are lost. The same line goes on with the others.", markup=False)
            raise
    path = write_summary(execution, f"axolotl qtha-bench {_shown(options.suite)}")
    failed = sum(entry.count("failed") for entry in entries(execution))
    out.print(f"{path} written.", markup=False, highlight=False)
    if failed:
        out.print(
            f"{failed} runs failed: see the logs in {execution.folder / 'logs'}; the same line tries them again.", markup=False
        )
    return not failed


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
