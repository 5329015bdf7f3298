"""docs/settings.md: every key of the `qtha:` block, written from the classes that read them."""

from __future__ import annotations

import re

from pydantic import BaseModel

from ..ibm.options import IBMOptions
from .args import QTHABlock

PAGE = """\
# Settings: the `qtha:` block

Every key of the `qtha:` block of an Axolotl YAML with `adapter: qtha`. A key that is not set has the default shown here; a
key that is not known, or that would do nothing beside the others, is an error that says what works.

This page is written by `axolotl qtha-config-schema --format markdown --output docs/settings.md`. `axolotl qtha-config-schema
--field rank` prints one key with its type. (Axolotl's own `config-schema` loads no plugins, and so shows none of these keys.)

{qtha}

## The `ibm:` block

Keys of `qtha: {{ibm: ...}}`, read with `quantum_backend: ibm`; see [IBM Quantum](ibm.md).

{ibm}
"""


def markdown() -> str:
    """Return the page."""
    return PAGE.format(qtha=table(QTHABlock), ibm=table(IBMOptions))


def table(block: type[BaseModel]) -> str:
    """Return a block's keys as a Markdown table: key, default (empty for none), meaning."""
    rows = ["| Key | Default | Meaning |", "| --- | --- | --- |"]
    for key, field in block.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        meaning = re.sub(r"<(\w+)>", r"`<\1>`", field.description or "")  # Markdown would take <Z> for HTML
        rows.append(f"| `{key}` | {default} | {meaning} |")
    return "\n".join(rows)
