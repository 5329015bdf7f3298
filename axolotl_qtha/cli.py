"""Commands added to `axolotl` (entry point group `axolotl.cli_commands`)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click


@click.command("qtha-config-schema")
@click.option("--format", "output_format", type=click.Choice(["json", "yaml"]), default="yaml", show_default=True)
@click.option("--field", help="Show one key of the `qtha:` block only, e.g. `rank`.")
def config_schema(output_format: str, field: str | None) -> None:
    """Describe every key of the `qtha:` block.

    Axolotl's own `config-schema` shows Axolotl's keys only: it loads no plugin.
    """
    from .args import QTHABlock
    from .config import close_names

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

    try:
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
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if json_file:
        json_file.write_text(json.dumps(content, indent=2))
