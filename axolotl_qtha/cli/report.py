"""`axolotl qtha-report`."""

from __future__ import annotations

from pathlib import Path

import click

from .shown import errors_shown


@click.command("qtha-report")
@click.argument("folder", metavar="OUTPUT_DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Picture to write.  [default: qtha-report.png there]"
)
def report(folder: Path, output: Path | None) -> None:
    """Draw what the adapters did in a training, from the log in OUTPUT_DIR or its last checkpoint."""
    with errors_shown():
        from ..terminal import console
        from ..training.diagnostics_report import draw, read_log, table

        rows = read_log(folder)
        path = output or folder / "qtha-report.png"
        draw(rows, path)
        out = console()
        out.print(table(rows))
        out.print(f"{path} written.", markup=False, highlight=False)
