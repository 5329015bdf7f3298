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
@click.option(
    "--minutes",
    type=float,
    help="Start no run that, by the longest so far, would not end in this time, and stop what is under way after it. The summary "
    "is then written of what there is.",
)
@click.option("--part", metavar="I/N", help="Run every Nth run alone, from the Ith on: one part on each of N machines.")
@click.option(
    "--add",
    multiple=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="First take over results of this suite that are missing here from another machine's output_dir. May be repeated.",
)
def bench(
    suite: Path,
    jobs: int | None,
    dry_run: bool,
    summary_only: bool,
    overwrite: bool,
    minutes: float | None,
    part: str | None,
    add: tuple[Path, ...],
) -> None:
    """Train LoRA, QTHA and its controls as SUITE says, and compare them: summary.md, a JSON file for each run, pictures.

    What was done is not done again: the same line goes on after a stop. Exits with 1 if a run failed; with 0 when the time that
    --minutes gives has run out.
    """
    with errors_shown():
        from ..bench.suite.command import BenchOptions, bench
        from ..terminal import console

        options = BenchOptions(suite, jobs, dry_run, summary_only, overwrite, minutes, part, add)
        complete = bench(options, console())
    if not complete:
        raise SystemExit(1)
