"""Commands added to `axolotl` (entry point group `axolotl.cli_commands`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import refusal

if TYPE_CHECKING:
    from .circuit.ansatz import Ansatz
    from .config import QTHAConfig


@click.command("qtha-config-schema")
@click.option("--format", "output_format", type=click.Choice(["json", "yaml"]), default="yaml", show_default=True)
@click.option("--field", help="Show one key of the `qtha:` block only, e.g. `rank`.")
def config_schema(output_format: str, field: str | None) -> None:
    """Describe every key of the `qtha:` block.

    Axolotl's own `config-schema` shows Axolotl's keys only: it loads no plugin.
    """
    from .args import QTHABlock
    from .errors import close_names

    schema = QTHABlock.model_json_schema()
    if field is not None:
        properties = schema["properties"]
        if field not in properties:
            close = close_names(field, properties) or sorted(properties)
            raise click.BadParameter(f"{field!r} is not a key of the `qtha:` block. What works: {', '.join(close)}.")
        schema = {field: properties[field]}
    if output_format == "json":
        click.echo(json.dumps(schema, indent=2))
        return
    import yaml

    click.echo(yaml.safe_dump(schema, sort_keys=False, width=110, allow_unicode=True).rstrip())


@click.command("qtha-plan")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write what is printed to FILE.")
@click.option("--find-budget", type=float, help="Print rank, bond and mid settings within this share of LoRA, e.g. 0.24.")
@click.option("--gpu-memory", type=click.FloatRange(min=0, min_open=True), help="Plan for a GPU of this many GiB.")
def plan(config: Path, json_file: Path | None, find_budget: float | None, gpu_memory: float | None) -> None:
    """Say what training CONFIG will need: parameters, memory, circuits. No weights are downloaded or loaded."""
    from .args import adapter_config
    from .planner.base import read_config
    from .planner.estimate import find_settings, local_gpus, make_plan
    from .planner.show import console, show_plan, show_settings

    with _errors():
        cfg = read_config(config)
        if find_budget is not None:
            settings = find_settings(cfg, find_budget)
            show_settings(settings, find_budget, adapter_config(cfg).rank, console())
            content: object = [dataclasses.asdict(row) for row in settings]
        else:
            gpus = [("a GPU", int(gpu_memory * 2**30))] if gpu_memory else local_gpus()
            result = make_plan(cfg, gpus)
            show_plan(result, console())
            content = result.as_dict()
    if json_file:
        json_file.write_text(json.dumps(content, indent=2))


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
    with _errors():
        from .circuit.draw import SIMULATOR, costs, picture, table, text
        from .planner.show import console

        settings, circuit = _circuit(config)
        out = console()
        if backend is None:
            backend = settings.noise_model if settings.noise_model.startswith("fake:") else SIMULATOR
        rows = costs(circuit, backend)
        out.print(text(circuit, out.width), markup=False, highlight=False, soft_wrap=True)
        out.print(table(rows))
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
    with _errors():
        from .circuit.verify import compare, table, verdict
        from .planner.show import console

        settings, circuit = _circuit(config)
        rows = list(compare(circuit, settings.simulation, tokens, tolerance, seed))
        out = console()
        out.print(table(rows, circuit))
        out.print(verdict(rows, tolerance), markup=False, highlight=False)
    if not all(row.passed for row in rows):
        raise SystemExit(1)


def _circuit(config: Path) -> tuple[QTHAConfig, Ansatz]:
    """Return the adapter of a configuration and its circuit."""
    from .args import adapter_config
    from .plan import ansatz
    from .planner.base import read_yaml

    settings = adapter_config(read_yaml(config))
    if not settings.has_circuit:
        raise refusal("quantum", settings.quantum, "runs no circuit", "`quantum: qtha`, `frozen` or `qwthn`")
    return settings, ansatz(settings)


@contextmanager
def _errors() -> Iterator[None]:
    """Show what is wrong with a configuration, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise click.ClickException(str(error)) from error
