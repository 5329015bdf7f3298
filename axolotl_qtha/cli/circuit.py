"""`axolotl qtha-draw` and `qtha-verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from ..errors import refusal
from .shown import errors_shown

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

    from ..circuit.ansatz import Ansatz
    from ..circuit.draw import Format
    from ..tuner.config import QTHAConfig


@click.command("qtha-draw")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write to FILE (see --format).")
@click.option(
    "--format",
    type=click.Choice(["qasm3", "qpy", "png", "pdf", "svg"]),
    help="What to write: OpenQASM 3, Qiskit's QPY, or a picture.  [default: by the ending of --output: .qasm, .qpy, .png, .pdf, "
    ".svg; without --output the file is named after the layer, or circuit]",
)
@click.option(
    "--layer",
    help="Draw the trained circuit of this layer: its angles are numbers; z, the encoded inputs in radians, stays a parameter. "
    "A name in the base model, or the end of it, e.g. layers.0.self_attn.q_proj.",
)
@click.option(
    "--lora-model-dir", type=click.Path(path_type=Path), help="The trained adapter, for --layer.  [default: output_dir]"
)
@click.option("--block", type=int, help="Which of a layer's circuits, where its rank has several.  [default: 0]")
@click.option(
    "--backend",
    default=None,
    help="Gates to count in: `simulator` (RY, RZ, CX) or an IBM device as `fake:NAME`, e.g. fake:torino.  [default: that of "
    "noise_model, else simulator]",
)
def draw(
    config: Path,
    output: Path | None,
    format: Format | None,
    layer: str | None,
    lora_model_dir: Path | None,
    block: int | None,
    backend: str | None,
) -> None:
    """Draw the circuit of CONFIG, or of a trained layer, and count its gates before and after transpiling.

    The trained angles are read from the adapter's folder: no model is loaded.
    """
    with errors_shown():
        from ..circuit.draw import SIMULATOR, costs, format_of, table, text, write
        from ..terminal import console

        settings, ansatz = _circuit(config)
        circuit, blocks = ansatz.circuit(), settings.blocks
        if layer is not None or lora_model_dir is not None or block is not None:
            circuit, blocks = _trained(config, lora_model_dir, layer, block or 0)
        if output is not None or format is not None:
            format = format or format_of(cast(Path, output))
            output = output or Path(f"{circuit.name if layer else 'circuit'}.{'qasm' if format == 'qasm3' else format}")
        out = console()
        if backend is None:
            backend = settings.noise_model if settings.noise_model.startswith("fake:") else SIMULATOR
        rows = costs(circuit, backend)
        out.print(text(circuit, out.width), markup=False, highlight=False, soft_wrap=True)
        out.print(table(rows))
        if layer is not None:
            text_of = f"{circuit.name}: block {block or 0} of {blocks}. z stays free: the encoded inputs, in radians."
            out.print(text_of, markup=False, highlight=False)
        elif blocks > 1:
            out.print(
                f"Rank {settings.rank}: each token has {blocks} of these circuits side by side in every adapted layer, "
                "with angles of their own.",
                highlight=False,
            )
        if output is not None and format is not None:
            write(circuit, output, format)
            out.print(f"{output} written.", markup=False, highlight=False)


def _trained(config: Path, folder: Path | None, layer: str | None, block: int) -> tuple[QuantumCircuit, int]:
    """Return a trained layer's circuit, named after it, and how many the layer has."""
    from ..settings.training_run import trained_adapter
    from ..trained.adapter_folder import check_trained
    from ..trained.circuits import trained_circuit

    adapter, base = trained_adapter(config, folder)
    check_trained(adapter, base)
    return trained_circuit(adapter, layer, block)


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
