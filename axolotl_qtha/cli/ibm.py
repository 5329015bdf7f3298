"""`axolotl qtha-estimate` and `qtha-hardware-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shown import errors_shown


@click.command("qtha-estimate")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--steps", type=click.IntRange(min=1), help="Training steps.  [default: max_steps]")
@click.option("--tokens", type=click.IntRange(min=1), default=100, show_default=True, help="Tokens of inference.")
def estimate(config: Path, steps: int | None, tokens: int) -> None:
    """Say what CONFIG will cost on IBM Quantum: circuits, jobs, QPU seconds. Nothing is submitted. Exits with 1 above the cap."""
    with errors_shown():
        from ..planner.qpu import estimate_run, explain, table
        from ..settings.training_run import read_run
        from ..terminal import console

        result = estimate_run(read_run(config), steps, tokens)
        out = console()
        out.print(table(result))
        out.print(explain(result), markup=False, highlight=False)
    if result.over is not None:
        raise SystemExit(1)


@click.command("qtha-hardware-eval")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--samples", type=int, default=8, show_default=True, help="Prompts and answers of the evaluation data.")
@click.option("--tokens", type=int, help="Run the circuits of the last this many tokens of each sample.  [default: all]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to.  [default: output_dir/hardware-eval]")
@click.option("--lora-model-dir", type=click.Path(path_type=Path), help="The trained adapter.  [default: output_dir]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier evaluation.")
def hardware_eval(**options: Any) -> None:
    """Evaluate the trained adapter of CONFIG on its `ibm:` device, beside exact circuits, shots alone, and a noise model.

    The answers are those of the data; circuits are run for every token in every adapted layer. The cost is shown first, and
    nothing is submitted above max_qpu_seconds.
    """
    with errors_shown():
        from ..hardware_eval.command import EvaluationOptions, hardware_eval
        from ..ibm.jobs import JobFailed
        from ..terminal import console

        try:
            hardware_eval(EvaluationOptions(**options), console())
        except JobFailed as error:
            raise click.ClickException(str(error)) from error
