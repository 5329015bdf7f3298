"""`axolotl qtha-bench`."""

from __future__ import annotations

from pathlib import Path

import click

from .shown import errors_shown


@click.command("qtha-bench")
@click.argument("suite", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at a time.  [default: the suite's]")
@click.option("--dry-run", is_flag=True, help="List what would be run, with the parameters of each adapter.")
@click.option("--summary-only", is_flag=True, help="Write the summary of the results that are there.")
@click.option("--overwrite", is_flag=True, help="Run all again.")
def bench(suite: Path, jobs: int | None, dry_run: bool, summary_only: bool, overwrite: bool) -> None:
    """Train LoRA, QTHA and its controls as SUITE says, and compare them: summary.md, a JSON file for each run, pictures.

    What was done is not done again: the same line goes on after a stop. Exits with 1 if a run failed.
    """
    with errors_shown():
        from ..bench.suite.command import BenchOptions, bench
        from ..terminal import console

        complete = bench(BenchOptions(suite, jobs, dry_run, summary_only, overwrite), console())
    if not complete:
        raise SystemExit(1)
