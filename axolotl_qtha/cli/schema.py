"""`axolotl qtha-config-schema`."""

from __future__ import annotations

import json

import click


@click.command("qtha-config-schema")
@click.option("--format", "output_format", type=click.Choice(["json", "yaml"]), default="yaml", show_default=True)
@click.option("--field", help="Show one key of the `qtha:` block only, e.g. `rank`.")
def config_schema(output_format: str, field: str | None) -> None:
    """Describe every key of the `qtha:` block.

    Axolotl's own `config-schema` shows Axolotl's keys only: it loads no plugin.
    """
    from ..errors import alternatives
    from ..settings.args import QTHABlock

    schema = QTHABlock.model_json_schema()
    if field is not None:
        properties = schema["properties"]
        if field not in properties:
            works = alternatives(field, properties)
            raise click.BadParameter(f"{field!r} is not a key of the `qtha:` block. What works: {works}.")
        schema = {field: properties[field]}
    if output_format == "json":
        click.echo(json.dumps(schema, indent=2))
        return
    import yaml

    click.echo(yaml.safe_dump(schema, sort_keys=False, width=110, allow_unicode=True).rstrip())
