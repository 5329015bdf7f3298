"""`axolotl qtha-diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shown import errors_shown


@click.command("qtha-diagnose")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--lora-model-dir",
    type=click.Path(path_type=Path),
    help="A trained adapter, whose circuits are looked at on the data's own z.  [default: none, and no model is loaded]",
)
@click.option("--qubits", default="4,6,8,10", show_default=True, help="Numbers of qubits, with commas.")
@click.option("--circuit-layers", default="1,2,4", show_default=True, help="Numbers of circuit layers, with commas.")
@click.option("--initialisations", type=int, default=200, show_default=True, help="Draws that the variance of gradients is over.")
@click.option("--pairs", type=int, default=2000, show_default=True, help="Pairs of states whose fidelities are taken.")
@click.option("--tokens", type=int, default=128, show_default=True, help="Tokens of the data looked at in each layer.")
@click.option("--modules", type=int, default=16, show_default=True, help="Adapted layers looked at, spread evenly.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random numbers.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to.  [default: output_dir/diagnose]")
@click.option("--overwrite", is_flag=True, help="Replace earlier diagnostics.")
def diagnose(**options: Any) -> None:
    """Say of CONFIG's circuit what papers print: gradients, expressibility, entanglement, Fourier spectrum, effective dimension.

    At initialisation, over numbers of qubits and layers; and of a trained adapter. Writes diagnose.json, which defines each
    number, and a figure.
    """
    with errors_shown():
        from ..diagnose.command import DiagnosisOptions, diagnose
        from ..terminal import console

        diagnose(DiagnosisOptions(**options), console())
