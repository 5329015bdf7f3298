"""`axolotl qtha-draw` and `qtha-verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import refusal
from .shown import errors_shown

if TYPE_CHECKING:
    from ..circuit.ansatz import Ansatz
    from ..tuner.config import QTHAConfig


@click.command("qtha-draw")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write a picture to FILE (.png, .pdf, .svg)."
)
@click.option(
    "--backend",
    default=None,
    help="Gates to count in: `simulator` (RY, RZ, CX) or an IBM device as `fake:NAME`, e.g. fake:torino.  [default: that of "
    "noise_model, else simulator]",
)
def draw(config: Path, output: Path | None, backend: str | None) -> None:
    """Draw the circuit of CONFIG, and count its gates before and after transpiling."""
    with errors_shown():
        from ..circuit.draw import SIMULATOR, costs, picture, table, text
        from ..terminal import console

        settings, circuit = _circuit(config)
        out = console()
        if backend is None:
            backend = settings.noise_model if settings.noise_model.startswith("fake:") else SIMULATOR
        rows = costs(circuit, backend)
        out.print(text(circuit, out.width), markup=False, highlight=False, soft_wrap=True)
        out.print(table(rows))
        if settings.blocks > 1:
            out.print(
                f"Rank {settings.rank}: each token has {settings.blocks} of these circuits side by side in every adapted layer, "
                "with angles of their own.",
                highlight=False,
            )
        if output:
            picture(circuit, output)
            out.print(f"{output} written.", markup=False, highlight=False)


@click.command("qtha-verify")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", type=click.IntRange(min=1), default=4, show_default=True, help="Random inputs.")
@click.option("--tolerance", type=click.FloatRange(min=0, min_open=True), default=1e-5, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random angles.")
def verify(config: Path, tokens: int, tolerance: float, seed: int) -> None:
    """Compare every circuit engine of this machine with Qiskit, on the circuit of CONFIG; exits with 1 if one is off."""
    with errors_shown():
        from ..bench.verify import compare, table, verdict
        from ..terminal import console

        settings, circuit = _circuit(config)
        rows = list(compare(circuit, settings.simulation, tokens, tolerance, seed, settings.blocks))
        out = console()
        out.print(table(rows, circuit, settings.blocks))
        out.print(verdict(rows, tolerance), markup=False, highlight=False)
    if not all(row.passed for row in rows):
        raise SystemExit(1)


def _circuit(config: Path) -> tuple[QTHAConfig, Ansatz]:
    """Return the adapter of a configuration and its circuit."""
    from ..settings.meta_base import read_yaml
    from ..settings.training_run import AdapterSettings
    from ..tuner.sizes import ansatz

    settings = AdapterSettings.of(read_yaml(config)).parsed
    if not settings.has_circuit:
        raise refusal("quantum", settings.quantum, "runs no circuit", "`quantum: qtha`, `frozen`, `product` or `qwthn`")
    return settings, ansatz(settings)
