"""`axolotl qtha-config-schema`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..errors import alternatives


@click.command("qtha-config-schema")
@click.option("--format", "output_format", type=click.Choice(["json", "yaml", "markdown"]), default="yaml", show_default=True)
@click.option("--field", help="Show one key of the `qtha:` block only, e.g. `rank`.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to FILE, without Axolotl's banner.")
def config_schema(output_format: str, field: str | None, output: Path | None) -> None:
    """Describe every key of the `qtha:` block: a schema with types, or (markdown) the page docs/settings.md.

    Axolotl's own `config-schema` shows Axolotl's keys only: it loads no plugin.
    """
    if output_format == "markdown" and field is not None:
        raise click.BadParameter("--field does not go with `--format markdown`. What works: one of them.")
    text = _page() if output_format == "markdown" else _schema(output_format, field)
    if output:
        output.write_text(text + "\n")
    else:
        click.echo(text)


def _page() -> str:
    from ..settings.reference import markdown

    return markdown().rstrip()


def _schema(output_format: str, field: str | None) -> str:
    from ..settings.args import QTHABlock

    schema = QTHABlock.model_json_schema()
    if field is not None:
        properties = schema["properties"]
        if field not in properties:
            works = alternatives(field, properties)
            raise click.BadParameter(f"{field!r} is not a key of the `qtha:` block. What works: {works}.")
        schema = {field: properties[field]}
    if output_format == "json":
        return json.dumps(schema, indent=2)
    import yaml

    return yaml.safe_dump(schema, sort_keys=False, width=110, allow_unicode=True).rstrip()
